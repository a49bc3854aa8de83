"""One function that opens whatever holds pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from titok.data.huggingface import PREFIX, HuggingFaceSource
from titok.data.images import list_images
from titok.data.shards import ShardSource, find_shards
from titok.data.sources import FolderSource, PictureSource


def open_pictures(
    name: str | os.PathLike[str],
    *,
    classes: str | Sequence[str] = "sorted",
    labels_file: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
) -> PictureSource:
    """Opens a folder of pictures, one picture, shards, or a dataset of Hugging Face.

    Args:
        name: a folder or a picture; a .tar, a folder of .tar files and no pictures, or a pattern such as
            train-{000..319}.tar, for `ShardSource`; hf:FOLDER, hf:NAME or hf:NAME:SPLIT, for `HuggingFaceSource`.
        classes: order of the classes: "sorted", "natural" or all names. For shards, only names; the others know the
            order of theirs.
        labels_file: of a folder of pictures, see `titok.data.sources.read_labels_file`.
        index: of shards, see `ShardSource`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as the sources; or an option is given to a source that has
            no use for it.
    """
    text = os.fspath(name)
    if text.startswith(PREFIX):
        _refuse(text, classes=classes != "sorted", labels=labels_file is not None, index=index is not None)
        return HuggingFaceSource(text.removeprefix(PREFIX))
    if _names_shards(text):
        _refuse(text, labels=labels_file is not None)
        return ShardSource(find_shards(text), index=index, classes=None if isinstance(classes, str) else classes)
    _refuse(text, index=index is not None)
    return FolderSource(text, classes=classes, labels_file=labels_file)


def _names_shards(name: str) -> bool:
    path = Path(name)
    if not path.is_dir():
        return path.suffix.lower() == ".tar" and not path.is_dir()
    if not any(path.glob("*.tar")):
        return False
    try:
        list_images(path)
    except FileNotFoundError:
        return True
    return False


def _refuse(name: str, **given: bool) -> None:
    for option, is_given in given.items():
        if is_given:
            raise ValueError(f"--{option}: expected other pictures than those of {name}, which have no use for it")
