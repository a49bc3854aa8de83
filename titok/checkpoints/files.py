"""Files of checkpoints: finding them on disk or on the Hugging Face hub, reading and writing them.

No function here unpickles code. Every file is written under a temporary name in its folder and renamed when it is
complete, so a reader never sees half a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, made where it is missing, to write to instead of `path`.

    When the block ends, the temporary file replaces `path`; when the block raises, the temporary file is removed
    and `path` stays as it was. A new file gets the permissions that the process's umask gives, and a file that is
    replaced passes on its own. Where `path` is a link, the file that it leads to is replaced.

    The name of the temporary file is short, so that `path` may have the longest name that the disk allows.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".titok-{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the kernel applies the umask
    try:
        mode = stat.S_IMODE(os.stat(path if path.exists() else temporary).st_mode)
        yield temporary
        # Set at the end, because safetensors replaces the temporary file by one with other permissions.
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """The tensors of a .safetensors file, or of any other file as a pickled state dict, by name and on the CPU.

    Raises:
        ValueError: the file is damaged, or it is a pickle that holds anything but tensors.
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
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` where the file holds anything else."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON file ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def locate_checkpoint(path_or_repo: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path | None]:
    """The weights file and the config.json of a checkpoint; None where there is no config.json.

    Args:
        path_or_repo: a folder, a weights file, or else the id of a Hugging Face repository, which is downloaded.
        revision: of the repository; None takes the latest.

    Raises:
        FileNotFoundError: none of the three exists, or there are no weights in it.
    """
    path = Path(path_or_repo)
    if path.is_dir():
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
        return _download(str(path_or_repo), revision)
    config = weights.parent / "config.json"
    return weights, config if config.is_file() else None


def _download(repo: str, revision: str | None) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        config = Path(hf_hub_download(repo, "config.json", revision=revision))
        for name in WEIGHT_FILES:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hf_hub_download(repo, name, revision=revision)), config
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError, OSError) as error:
        message = f"{repo}: no such file or folder, and no such repository to download ({_first_line(error)})"
        raise FileNotFoundError(message) from error
    raise FileNotFoundError(f"{repo}: the repository holds neither of {', '.join(WEIGHT_FILES)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
