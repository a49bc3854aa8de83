"""Reading and writing models: a folder with `config.json` and `model.safetensors`, ours or in the official layout.

Nothing here unpickles code (`weights_only=True`), and nothing is left half-written: every file is written under a
temporary name beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

M = TypeVar("M", bound="Pretrained")

FORMAT = "titok"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Pretrained(nn.Module):
    """A module that is built from `config`, with `from_pretrained` and `save_pretrained`."""

    config: Any

    @staticmethod
    def convert_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of an official checkpoint under this model's names."""
        raise NotImplementedError

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> tuple[Any, bool]:
        """The model's configuration out of a config.json, and whether that has the official layout."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[M],
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> M:
        """A model in eval mode, from a folder, one weights file, or a Hugging Face repository id.

        Args:
            path_or_repo: a folder that holds `config.json` beside `model.safetensors` or `pytorch_model.bin`; one
                such file (`config.json` is looked for beside it); else the id of a repository, which is downloaded.
            dtype: of the networks. The codebook of a vector quantizer stays in float32 at least.
            revision: of the repository.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged or carries code, or configuration and weights contradict each other; lists
                missing, unexpected and misshapen names.
        """
        weights_file, config_file = _locate(path_or_repo, revision)
        values = _read_json(config_file) if config_file else {}
        if values.get("format") == FORMAT:
            if values.get("model") != cls.__name__:
                raise ValueError(f"{config_file}: expected a {cls.__name__}, got a {values.get('model')!r}")
            values = values["config"]
        elif config_file is None and cls.__name__ != "MaskGITVQGAN":
            raise ValueError(f"{weights_file}: no config.json beside it to tell what model this is")
        try:
            config, official = cls.read_config(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_file}: {error}") from error
        weights = read_weights(weights_file)
        if official:
            weights = cls.convert_official(weights)
        with torch.device("meta"):
            model = cls(config)
        _check_names(weights_file, {k: v.shape for k, v in model.state_dict().items()}, weights)
        keep = _at_least_float32(dtype)
        converted = {
            name: value.to(device=device, dtype=keep if name == "quantizer.codebook" else dtype)
            for name, value in weights.items()
        }
        model.load_state_dict(converted, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `directory`, making it where needed."""
        directory = Path(directory)
        config = {"format": FORMAT, "model": type(self).__name__, "config": self.config.to_dict()}
        write_safetensors(directory / "model.safetensors", self.state_dict())
        with atomic_path(directory / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not. Parent
    folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors (made contiguous, on the CPU) so that a reader sees the old file or the whole new one."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(ready, temporary, metadata)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name out of a .safetensors file or a pickled state dict, on the CPU.

    Raises `ValueError` for a damaged file and for a pickle that carries anything but tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own kinds
        raise ValueError(f"{path}: not a plain state dict of tensors ({_first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors")
    return state


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _locate(path_or_repo: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path | None]:
    """The weights file and, where there is one, the config.json."""
    path = Path(path_or_repo)
    if path.is_dir():
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: neither of {', '.join(_WEIGHT_FILES)} is in this folder")
        weights = found[0]
    elif path.is_file():
        weights = path
    else:
        # Before the hub is asked, which takes half a minute where there is no network.
        owner, *name = str(path_or_repo).split("/")
        if len(name) != 1 or Path(owner).is_dir():
            raise FileNotFoundError(f"{path}: no such file or folder (a repository is called owner/name)")
        return _download(str(path_or_repo), revision)
    config = weights.parent / "config.json"
    return weights, config if config.is_file() else None


def _download(repo: str, revision: str | None) -> tuple[Path, Path | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        config = Path(hf_hub_download(repo, "config.json", revision=revision))
        for name in _WEIGHT_FILES:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hf_hub_download(repo, name, revision=revision)), config
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError, OSError) as error:
        message = f"{repo}: no such file or folder, and no such repository to download ({_first_line(error)})"
        raise FileNotFoundError(message) from error
    raise FileNotFoundError(f"{repo}: the repository holds neither of {', '.join(_WEIGHT_FILES)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON file ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _check_names(path: Path, expected: Mapping[str, torch.Size], got: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - got.keys())
    unexpected = sorted(got.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(got[name].shape)}, expected {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in got and got[name].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if found := [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
        raise ValueError(f"{path}: the weights contradict the configuration; {'; '.join(found)}")
