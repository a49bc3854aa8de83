"""Checks of --output that a command makes before its work, so that it destroys nothing and does not fail at the end.

An output is never an input, never contains one and never lies in one. A file that exists is replaced only with
--overwrite.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from titok.checkpoints.writing import remove_abandoned

# Suffixes of files. A folder of such a name is taken for a mistake, unless it exists.
FILE_SUFFIXES = (".npz", ".safetensors", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")


def check_output(path: Path, *suffixes: str) -> None:
    """Checks that `path` can name a file with one of `suffixes` in any case, or, without suffixes, a folder.

    Raises:
        ValueError: it cannot.
    """
    suffix = path.suffix.lower()
    if suffixes and suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if suffixes and path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")
    if not suffixes and path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a folder, got a file")
    if not suffixes and suffix in FILE_SUFFIXES and not path.is_dir():
        raise ValueError(f"{path}: expected the name of a folder, got one that ends in {path.suffix}")


def check_apart(output: Path, inputs: Iterable[Path | str]) -> None:
    """Raises `ValueError` where the output is an input, is a folder that contains one, or lies in one.

    Links are followed before paths are compared.

    Args:
        output: a file or a folder, which need not exist.
        inputs: files and folders that the command reads. Where one does not exist, such as the name of a Hugging
            Face repository, it is passed over.
    """
    real_output = Path(os.path.realpath(output))
    for source in inputs:
        if not os.path.exists(source):
            continue
        real_input = Path(os.path.realpath(source))
        if real_output == real_input or (output.exists() and output.samefile(source)):
            found = "is the input"
        elif real_input.is_relative_to(real_output):
            found = "contains the input"
        elif real_output.is_relative_to(real_input):
            found = "lies in the input"
        else:
            continue
        raise ValueError(f"--output: expected a place apart from all inputs, but {output} {found} {source}")


def check_files(files: Sequence[Path], inputs: Iterable[Path] = (), *, overwrite: bool) -> None:
    """Checks the files that a command is going to write, and removes what killed commands left in their folders.

    Args:
        inputs: the files that the command reads.
        overwrite: the option --overwrite. It never replaces one of `inputs`.

    Raises:
        ValueError: a file is an input, also by a link; it exists and `overwrite` is False; or it is a folder.
        OSError: a file cannot be written, because a name is too long or the disk or folder refuses.
    """
    for file in files:
        _check_name(file)
    for folder in {_existing_ancestor(file) for file in files}:
        _check_writable(folder)
        remove_abandoned(folder)
    # The file behind a link is replaced, in its own folder.
    for folder in {_existing_ancestor(Path(os.path.realpath(file))) for file in files if file.is_symlink()}:
        _check_writable(folder)
    existing = [file for file in files if os.path.lexists(file)]
    if not existing:
        return
    inputs_by_inode = {_inode(path): path for path in inputs if path.exists()}
    for file in existing:
        if file.exists() and _inode(file) in inputs_by_inode:
            source = inputs_by_inode[_inode(file)]
            raise ValueError(f"--output: expected a place apart from all inputs, but {file} is the input {source}")
        if file.is_dir():
            raise ValueError(f"{file}: expected a file, got a folder")
    if not overwrite:
        others = f" (and {len(existing) - 1} other files that would be written)" if len(existing) > 1 else ""
        raise ValueError(f"{existing[0]}{others}: exists already; --overwrite replaces what exists")


def _check_name(path: Path) -> None:
    """Raises `OSError` where the system takes no such path: a name in it is too long, or a parent is a file."""
    with contextlib.suppress(FileNotFoundError):
        path.lstat()
    longest = os.pathconf(_existing_ancestor(path), "PC_NAME_MAX")  # `lstat` stops at the first missing folder
    for name in path.parts:
        if len(os.fsencode(name)) > longest:
            raise OSError(f"{path}: expected names of at most {longest} bytes, got {len(os.fsencode(name))}")


def _existing_ancestor(path: Path) -> Path:
    """The innermost folder above `path` that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _check_writable(folder: Path) -> None:
    """Raises `OSError` where no file can be made in `folder`. Permissions alone do not tell, such as those of root."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".titok-", suffix=".tmp"):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror})") from error


def _inode(path: Path) -> tuple[int, int]:
    """Device and number of a file, which are the same for all links to it."""
    status = path.stat()
    return status.st_dev, status.st_ino
