"""Sources of pictures: encoded pictures with labels and names, by index. Folders are here."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titok.checkpoints.files import first_line
from titok.data.images import ImageList, list_images

MAX_PICTURE_BYTES = 1 << 30  # of one encoded picture


class Picture(NamedTuple):
    """One picture of a source."""

    content: bytes  # of its file: encoded, such as a JPEG
    label: int  # the number of its class
    name: str  # unique within the source; a relative path with "/"


class PictureSource(Protocol):
    """Pictures with labels and names. Any of them may be read at any time, by several threads at once.

    Attributes:
        where: what the source is called in messages, such as the path of a folder.
        classes: the names of the classes, by label.
        labels: (n,) int64, the class of each picture.
        names: of the pictures.
        left_out: what was left out when the source was opened, in one line; "" where nothing was.
    """

    where: str
    left_out: str

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Picture:
        """Reads one picture.

        Raises:
            OSError, ValueError: it cannot be read. The message names it.
        """
        ...

    def describe(self, index: int) -> str:
        """Where a picture is, for messages."""
        ...

    def files(self, indices: Sequence[int]) -> list[Path]:
        """The files on disk that hold these pictures, and perhaps others."""
        ...


class FolderSource:
    """The pictures below a folder; the class of a picture is its sub-folder, or what a file of labels says.

    Pictures are found by `titok.data.images.list_images`. A picture in a deeper folder belongs to the sub-folder
    directly below `root`. A sub-folder without pictures is no class, and a folder without sub-folders is one class.

    Args:
        root: the folder, or one picture.
        classes: the order of the classes, which are numbered from 0: "sorted" by name; "natural", in which "class2"
            comes before "class10"; or all their names.
        labels_file: see `read_labels_file`. Pictures that it does not name are left out. With it, sub-folders are no
            classes.

    Attributes:
        paths: of the pictures, sorted.

    Raises:
        FileNotFoundError: there is no such folder or file, or no picture in the folder.
        ValueError: the names of the classes are not those of the sub-folders, or the labels cannot be read.
    """

    root: Path
    where: str
    paths: list[Path]
    names: list[str]

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        classes: str | Sequence[str] = "sorted",
        labels_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root, self.where = Path(root), str(root)
        found = list_images(self.root)
        self.paths, self._order = found.paths, classes
        self.names = [self._name_of(path) for path in self.paths]
        self._class_of: dict[str, str] | None = None
        if labels_file is not None:
            self._class_of = read_labels_file(Path(labels_file))
            found = self._with_labels(Path(labels_file), found)
            self.paths, self.names = found.paths, [self._name_of(path) for path in found.paths]
        self.left_out: str = found.describe_left_out()

    def _name_of(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _with_labels(self, labels_file: Path, found: ImageList) -> ImageList:
        """Those of the pictures that the file of labels names."""
        assert self._class_of is not None
        kept = [path for path in found.paths if self._name_of(path) in self._class_of]
        if not kept:
            raise ValueError(f"{labels_file}: names none of the {len(found.paths)} pictures in {self.root}")
        counts = {
            "picture without a label": len(found.paths) - len(kept),
            "label without a picture": len(self._class_of) - len(kept),
        }
        return ImageList(kept, {**found.left_out, **{kind: count for kind, count in counts.items() if count}})

    @functools.cached_property
    def _class_names(self) -> list[str]:
        """The name of the class of each picture."""
        if self._class_of is not None:
            return [self._class_of[name] for name in self.names]
        return [name.partition("/")[0] if "/" in name else "" for name in self.names]

    @functools.cached_property
    def classes(self) -> list[str]:
        """The names of the classes, by label. That of pictures in `root` itself is ""."""
        return order_classes(self._class_names, self._order, numbers=self._class_of is not None)

    @functools.cached_property
    def labels(self) -> Tensor:
        """(n,) int64."""
        number = {name: label for label, name in enumerate(self.classes)}
        return torch.tensor([number[name] for name in self._class_names], dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Picture:
        return Picture(read_file(self.paths[index]), int(self.labels[index]), self.names[index])

    def describe(self, index: int) -> str:
        """See `PictureSource.describe`."""
        return str(self.paths[index])

    def files(self, indices: Sequence[int]) -> list[Path]:
        """See `PictureSource.files`."""
        return [self.paths[index] for index in indices]


def read_file(path: Path) -> bytes:
    """The content of a file. Raises `ValueError` where it has more than `MAX_PICTURE_BYTES`."""
    with path.open("rb") as file:
        check_picture_bytes(str(path), os.fstat(file.fileno()).st_size)
        return file.read()


def check_picture_bytes(name: str, size: int) -> None:
    """Raises `ValueError` where an encoded picture has more than `MAX_PICTURE_BYTES`."""
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"{name}: not a readable picture ({size} bytes, more than {MAX_PICTURE_BYTES})")


def natural_key(name: str) -> list[Any]:
    """A key for sorting by which numbers in names are compared as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), part) if number % 2 else part for number, part in enumerate(parts)] + [name]


def order_classes(names: Iterable[str], order: str | Sequence[str], *, numbers: bool = False) -> list[str]:
    """The names of classes, each once.

    Args:
        names: of classes, as often as they occur.
        order: "sorted", "natural", or all names in their order. It may name classes that do not occur.
        numbers: True for names that may be labels already. Where all are, the classes are the numbers from 0 to the
            highest.

    Raises:
        ValueError: `order` names a class twice, or not all of them, or it is neither of the two words.
    """
    occurring = set(names)
    if isinstance(order, str):
        if order not in ("sorted", "natural"):
            raise ValueError(f"classes: expected 'sorted', 'natural' or a list of names, got {order!r:.80}")
        if numbers and all(name.isascii() and name.isdecimal() and len(name) < 7 for name in occurring):
            return [str(label) for label in range(max(map(int, occurring)) + 1)]
        return sorted(occurring, key=natural_key if order == "natural" else None)
    given = list(order)
    if len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise ValueError(f"classes: expected each name once, got {twice!r:.80} twice")
    if unknown := sorted(occurring - set(given)):
        raise ValueError(f"classes: expected the names of all classes, but {unknown[0]!r:.80} is not among them")
    return given


def read_class_names(path: Path) -> list[str]:
    """The names of classes in a file: a JSON list, such as classes.json of a generator, or one name on each line.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable list of classes ({first_line(error)})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected a list of names of classes")
    return [name.strip() for name in names if name.strip()]


def read_labels_file(path: Path) -> dict[str, str]:
    """The class of each picture in a file of labels, by the name of the picture: its path below the folder.

    The file is JSON, {name: class} or {"labels": [[name, class], ...]} as StyleGAN's dataset.json; or text with a name
    and a class on each line, with a comma, a tab or spaces between. A class is a name or a number.

    Raises:
        ValueError: the file cannot be read, or a line has other than two entries.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            values = json.loads(text)
            pairs = values["labels"] if isinstance(values.get("labels"), list) else list(values.items())
        else:
            delimiter = next((mark for mark in "\t," if mark in text), None)
            lines = [line for line in text.splitlines() if line.strip()]
            pairs = list(csv.reader(lines, delimiter=delimiter)) if delimiter else [s.split() for s in lines]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable file of labels ({first_line(error)})") from error
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], (str, int)):
            raise ValueError(f"{path}: expected a name and a class on each line, got {str(pair)!r:.80}")
    return {str(name).strip(): str(label).strip() for name, label in pairs}
