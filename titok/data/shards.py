"""Shards: .tar files of pictures in the layout of WebDataset, read at random by an index of offsets.

In that layout the members of one sample lie next to each other and share their key, the path up to the first dot of the
file name: 000012.jpg and 000012.cls. A .cls holds the label as a number. The index is made with the standard library's
tarfile, which reads the headers only. A picture is then read with one `os.pread`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from titok.checkpoints.files import first_line
from titok.checkpoints.writing import atomic_path
from titok.data.images import readable_extensions
from titok.data.npz import read_arrays
from titok.data.sources import Picture, check_picture_bytes, order_classes

MAX_LABEL_BYTES = 64  # of a .cls file
INDEX_ARRAYS = ("files", "shards", "offsets", "sizes", "labels", "names", "left_out")


class ShardSource:
    """The pictures in .tar shards, in the order of the shards.

    Args:
        shards: the .tar files. They are not compressed.
        index: a file .npz that holds the index from one run to the next. It is made where it is missing, and made anew
            where a shard has another size or modification time. None makes the index in memory.
        classes: the names of the classes, by label. None calls them by their numbers.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: a shard is damaged or compressed, or holds no picture; only some pictures have a label; a label is
            no number; or there are more labels than names of classes.
    """

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        *,
        index: str | os.PathLike[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.shards: list[Path] = [Path(shard) for shard in shards]
        self.where: str = str(self.shards[0] if len(self.shards) == 1 else self.shards[0].parent)
        for shard in self.shards:
            if not shard.is_file():
                raise FileNotFoundError(f"{shard}: no such file")
        table = _index_of(self.shards, None if index is None else Path(index))
        self._shards, self._offsets, self._sizes = table["shards"], table["offsets"], table["sizes"]
        self.labels: torch.Tensor = torch.from_numpy(table["labels"])
        self.names: list[str] = table["names"].tobytes().decode("utf-8", "surrogateescape").split("\n")
        left_out = json.loads(str(table["left_out"]))
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        self.left_out: str = f"left out: {words}" if words else ""
        self._shard_bytes = [shard.stat().st_size for shard in self.shards]
        highest = int(self.labels.max())
        self.classes: list[str] = (
            order_classes(map(str, range(highest + 1)), "natural") if classes is None else list(classes)
        )
        if highest >= len(self.classes):
            raise ValueError(f"classes: expected {highest + 1} names or more, got {len(self.classes)}")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Picture:
        number, size = int(self._shards[index]), int(self._sizes[index])
        name = self.describe(index)
        check_picture_bytes(name, size)
        # Opened for each picture, because a thousand shards are more files than a process may hold open.
        handle = os.open(self.shards[number], os.O_RDONLY)
        try:
            if os.fstat(handle).st_size != self._shard_bytes[number]:
                raise ValueError(f"{name}: the shard was written since it was opened")
            content = os.pread(handle, size, int(self._offsets[index]))
        finally:
            os.close(handle)
        return Picture(content, int(self.labels[index]), self.names[index])

    def describe(self, index: int) -> str:
        """See `PictureSource.describe`."""
        return f"{self.shards[int(self._shards[index])]}: {self.names[index]}"

    def files(self, indices: Sequence[int]) -> list[Path]:
        """See `PictureSource.files`."""
        return self.shards


def find_shards(name: str) -> list[Path]:
    """The shards that a name stands for: one .tar, those in a folder, or those of a pattern such as a-{000..319}.tar.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.glob("*.tar") if not file.name.startswith("."))
    elif match := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", name):
        before, first, last, after = match.groups()
        found = [Path(f"{before}{n:0{len(first)}}{after}") for n in range(int(first), int(last) + 1)]
    else:
        found = [path]
    if not found:
        raise FileNotFoundError(f"{name}: no .tar file here")
    return found


class _Entry(NamedTuple):
    """A picture in a shard."""

    offset: int
    size: int
    label: int  # -1 where it has none
    name: str


def _index_of(shards: Sequence[Path], cache: Path | None) -> dict[str, np.ndarray]:
    """The arrays of `INDEX_ARRAYS`, read from the cache if it is that of these shards, else made and cached."""
    status = [shard.stat() for shard in shards]
    listed = [
        [str(shard.name), entry.st_size, entry.st_mtime_ns] for shard, entry in zip(shards, status, strict=True)
    ]
    files = np.array(hashlib.sha256(json.dumps(listed).encode()).hexdigest())
    if cache is not None and cache.exists():
        table = read_arrays(cache, INDEX_ARRAYS)
        if set(table) != set(INDEX_ARRAYS):
            raise ValueError(f"{cache}: expected an index of shards with {', '.join(INDEX_ARRAYS)}")
        if str(table["files"]) == str(files):
            return table
    rows: list[tuple[int, _Entry]] = []
    left_out: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        rows += [(number, entry) for entry in _entries_of(shard, left_out)]
    _check_labels(shards, rows)
    entries = [entry for _, entry in rows]
    table = {
        "files": files,
        "shards": np.array([number for number, _ in rows], np.int32),
        "offsets": np.array([entry.offset for entry in entries], np.int64),
        "sizes": np.array([entry.size for entry in entries], np.int64),
        "labels": np.array([max(0, entry.label) for entry in entries], np.int64),
        # As one text, because an array of texts takes four bytes for each character of the longest one.
        "names": np.frombuffer(
            "\n".join(entry.name for entry in entries).encode("utf-8", "surrogateescape"), np.uint8
        ),
        "left_out": np.array(json.dumps(left_out)),
    }
    if cache is not None:
        with atomic_path(cache) as temporary, temporary.open("wb") as file:
            np.savez(file, **table)  # type: ignore[arg-type]
    return table


def _check_labels(shards: Sequence[Path], rows: Sequence[tuple[int, _Entry]]) -> None:
    if not rows:
        raise ValueError(f"{shards[0]}: no picture here, nor in {len(shards) - 1} other shards")
    labelled = [entry.label >= 0 for _, entry in rows]
    if any(labelled) and not all(labelled):
        number, entry = rows[labelled.index(False)]
        raise ValueError(f"{shards[number]}: {entry.name}: expected a .cls file beside it, as others have")
    names: set[str] = set()
    for number, entry in rows:
        if entry.name in names:
            raise ValueError(f"{shards[number]}: {entry.name}: expected each name once in all shards")
        names.add(entry.name)


def _entries_of(shard: Path, left_out: Counter[str]) -> Iterator[_Entry]:
    """The pictures of a shard in its order. Other members are counted in `left_out`."""
    extensions = readable_extensions()
    handle = os.open(shard, os.O_RDONLY)
    try:
        key, label = "", -1
        pictures: list[_Entry] = []
        for member in _members_of(shard):
            folder, _, file = member.name.rpartition("/")
            stem, dot, extension = file.partition(".")
            if not member.isreg() or member.issparse():
                if not member.isdir():
                    left_out["special file"] += 1
                continue
            if file.startswith(("._", "__")) or folder.startswith("__") or not stem:
                left_out["hidden"] += 1
                continue
            if f"{folder}/{stem}" != key:
                yield from (entry._replace(label=label) for entry in pictures)
                key, pictures, label = f"{folder}/{stem}", [], -1
            extension = f".{extension.lower()}" if dot else ""
            if extension == ".cls":
                label = _label_of(shard, handle, member)
            elif extension not in extensions:
                left_out[extension or "file without a suffix"] += 1
            elif pictures:
                left_out["further picture of a sample"] += 1
            else:
                pictures.append(_Entry(member.offset_data, member.size, -1, member.name))
        yield from (entry._replace(label=label) for entry in pictures)
    finally:
        os.close(handle)


def _members_of(shard: Path) -> Iterator[tarfile.TarInfo]:
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.offset_data + (member.size if member.isreg() else 0) > size:
                    raise tarfile.ReadError("it ends within a member")
                if "\n" in member.name:
                    raise tarfile.ReadError("a name of several lines")
                yield member
                archive.members.clear()  # type: ignore[attr-defined]  # else they fill the memory
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{shard}: not a readable .tar file; one that is compressed must be unpacked ({first_line(error)})"
        ) from error


def _label_of(shard: Path, handle: int, member: tarfile.TarInfo) -> int:
    text = (
        os.pread(handle, min(member.size, MAX_LABEL_BYTES), member.offset_data).decode("ascii", "replace").strip()
    )
    if not text.isdecimal() or len(text) > 6:
        raise ValueError(f"{shard}: {member.name}: expected the number of a class, got {text!r:.40}")
    return int(text)
