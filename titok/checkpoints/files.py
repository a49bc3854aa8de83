"""Files of checkpoints: finding them on disk or on the Hugging Face hub, reading and writing them.

No function here unpickles code. Every file is written by `titok.checkpoints.writing.atomic_path`, so that a reader
never sees half a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from titok.checkpoints.writing import atomic_path

# In the order in which they are looked for. An index lists the files, the shards, that hold the tensors.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# The official code reads YAML and publishes JSON of the same layout.
CONFIG_FILES = ("config.json", "config.yaml")
MAX_JSON_BYTES = 16 << 20  # config.json and indices take some kB; a larger file would only fill the memory


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors of any device and strides; an existing file is replaced once the new one is complete."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(on_cpu, temporary, metadata)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON; an existing file is replaced once the new one is complete."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, in memory that does not depend on the file any more.

    Args:
        path: of a .safetensors file, or of a pickled state dict.

    Raises:
        ValueError: the file is damaged, no file of weights, or a pickle that holds anything but dense tensors.
    """
    path = Path(path)
    check_weights_file(path)
    if path.suffix == ".safetensors":
        with safetensors_errors(path):
            # Copied, because the tensors of `load_file` stay mapped: truncating the file would kill the process.
            return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    return _read_pickle(path)


def check_weights_file(path: Path) -> None:
    """Raises `ValueError` for a file that cannot be read, a Git LFS pointer and JSON, by what they are."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(f"{path}: not a readable file ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`")
    # A .safetensors file begins with a length, whose high bytes are zero; JSON has no zero bytes.
    if start.lstrip()[:1] in (b"{", b"[") and b"\0" not in start:
        raise ValueError(f"{path}: expected weights (.safetensors or .bin), got JSON")


@contextlib.contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """A context in which the errors of reading a damaged .safetensors file become a `ValueError`."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, MemoryError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict. Errors of PyTorch are not passed on: they advise to allow code."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch writes neither. A compressed entry may become a thousand times as large in memory.
                if any(
                    entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in archive.filelist
                ):
                    raise ValueError("compressed or encrypted entries")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # pickle, zip and PyTorch each raise their own kinds
        message = f"{path}: not a plain state dict of tensors: it is damaged, or it holds other objects"
        raise ValueError(message) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: expected a state dict of tensors")
    for name, tensor in state.items():
        if not _is_dense(tensor):
            raise ValueError(f"{path}: {name!r:.60}: expected a dense tensor, got another kind")
    return state


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor holds all its values, unlike sparse, quantized, meta and expanded ones."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_shard_names(index: Path) -> dict[str, str]:
    """The file name of each tensor, from an index of shards.

    Raises:
        ValueError: the file is no such index, or a shard would lie outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map: expected a JSON object of file names")
    for name in set(weight_map.values()):
        suffix = Path(name).suffix
        if Path(name).name != name or "\0" in name or suffix not in (".safetensors", ".bin"):
            expected = "a .safetensors or .bin file of the same folder"
            raise ValueError(f"{index}: weight_map: expected {expected}, got {name!r:.60}")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_JSON_BYTES`. Raises `ValueError` where the file holds anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


class HubOptions(NamedTuple):
    """Where a repository is read from, as `huggingface_hub.hf_hub_download` takes it.

    Attributes:
        revision: branch, tag or commit; None takes the latest.
        token: of the hub; None takes the one that the machine is logged in with.
        cache_dir: folder of downloaded files; None takes that of the hub's client.
        local_files_only: do not ask the hub, and take what the cache has.
        subfolder: of the repository or of a local folder, in which the files of the model are.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    subfolder: str | None = None

    def as_arguments(self) -> dict[str, Any]:
        """Those that were given, by name."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if not self.local_files_only:
            del given["local_files_only"]
        return given


def read_config_file(path: Path) -> dict[str, Any]:
    """The values of a configuration file: YAML by its suffix .yaml or .yml, else JSON. Raises `ValueError`."""
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    import yaml  # huggingface_hub depends on it

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable YAML file ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a YAML mapping, got {type(values).__name__}")
    return values


def locate_checkpoint(
    path_or_repo: str | os.PathLike[str], hub: HubOptions, *, needs_config: bool = True
) -> tuple[Path, Path | None]:
    """The weights file and the configuration file of a checkpoint; None where there is no configuration file.

    Args:
        path_or_repo: a folder, a weights file, or else the id of a Hugging Face repository, which is downloaded.
        hub: how the repository is read.
        needs_config: False downloads the weights of a repository without its config.json.

    Raises:
        FileNotFoundError: none of the three exists, or there are no weights in it.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        path = path / (hub.subfolder or "")
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: neither of {', '.join(WEIGHT_FILES)} is in this folder")
        weights = found[0]
    elif path.is_file():
        weights = path
    else:
        # A path that cannot be a repository id is refused here, because asking the hub without a network takes 30 s.
        owner, *name = str(path_or_repo).split("/")
        if len(name) != 1 or Path(owner).is_dir():
            raise FileNotFoundError(f"{path}: no such file or folder (a repository is called owner/name)")
        return _download(str(path_or_repo), hub, needs_config)
    configs = [weights.parent / name for name in CONFIG_FILES]
    return weights, next((config for config in configs if config.is_file()), None)


def _download(repo: str, hub: HubOptions, needs_config: bool) -> tuple[Path, Path | None]:
    """Weights, or the index of all shards, and config.json of a repository, in the cache of the hub's client."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def download(name: str) -> Path:
        return Path(hf_hub_download(repo, name, **hub.as_arguments()))

    not_cached = False
    try:
        config = download("config.json") if needs_config else None
        for name in WEIGHT_FILES:
            try:
                weights = download(name)
            except LocalEntryNotFoundError:  # a kind of EntryNotFoundError: the hub was not asked
                not_cached = True
                continue
            except EntryNotFoundError:
                continue
            if name.endswith(".index.json"):
                for shard in sorted(set(read_shard_names(weights).values())):
                    download(shard)
            return weights, config
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError, OSError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            reason = "it is not in the local cache, and the hub is switched off or cannot be reached"
        else:
            reason = first_line(error)
        message = f"{repo}: no such file or folder, and no such repository to download ({reason})"
        raise FileNotFoundError(message) from error
    if not_cached:
        raise FileNotFoundError(
            f"{repo}: its weights are not in the local cache, and the hub is switched off or cannot be reached"
        )
    raise FileNotFoundError(f"{repo}: the repository holds neither of {', '.join(WEIGHT_FILES)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters of it; the error's kind where it has no message."""
    return f"{str(error).strip().partition(chr(10))[0] or type(error).__name__:.300}"
