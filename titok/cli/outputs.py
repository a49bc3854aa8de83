"""Checks of --output that a command makes before its work, so that it destroys nothing and does not fail at the end.

An output is never an input, never contains one and never lies in one. A file that exists is replaced only with
--overwrite.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def check_output(path: Path, *suffixes: str) -> None:
    """Raises `ValueError` unless `path` can name a file with one of `suffixes`, or, without suffixes, a folder."""
    if not suffixes and path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a folder, got a file")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if suffixes and path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")


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
    """Checks the files that a command is going to write.

    Args:
        inputs: the files that the command reads.
        overwrite: the option --overwrite. It never replaces one of `inputs`.

    Raises:
        ValueError: a file is an input, also by a link; it exists and `overwrite` is False; or it is a folder.
    """
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


def _inode(path: Path) -> tuple[int, int]:
    """Device and number of a file, which are the same for all links to it."""
    status = path.stat()
    return status.st_dev, status.st_ino
