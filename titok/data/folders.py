"""Folders of pictures, and reading batches of images by threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from titok.data.images import UPRIGHT_ON_WHITE, Preprocessing, check_size, list_images, read_image


class Images(Protocol):
    """Images (C, H, W) in [0, 1] by index. A tensor (B, C, H, W) is one example, `ImageFolder` another."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class ImageFolder:
    """The pictures below a folder, each read when it is asked for. The class of a picture is its sub-folder.

    Pictures are found by `titok.data.images.list_images`, and resized and cropped by `read_image`. Sub-folders are
    numbered in sorted order; one without pictures is no class, and a folder without sub-folders is one class. A
    picture in a deeper folder belongs to the sub-folder directly below `root`.

    Args:
        root: the folder.
        size: (height, width) in pixels, or an integer for a square.
        channels: 3 for RGB, 1 for grey.
        preprocessing: what happens to EXIF orientation and transparency.

    Attributes:
        found: what `list_images` found and left out.
        paths: of the pictures, sorted.
        classes: names of the sub-folders, sorted; [""] where there are none.
        labels: (n,) int64, the class of each picture.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        TypeError, ValueError: `size` is not as described.
        ValueError: some pictures are in sub-folders and others in `root` itself; on access, a file is no picture.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | Sequence[int],
        channels: int = 3,
        *,
        preprocessing: Preprocessing = UPRIGHT_ON_WHITE,
    ) -> None:
        self.root, self.channels, self.preprocessing = Path(root), channels, preprocessing
        self.size = check_size(size)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder")
        self.found = list_images(self.root)
        self.paths = self.found.paths
        folders = [p.relative_to(self.root).parts[0] if p.parent != self.root else "" for p in self.paths]
        self.classes = sorted(set(folders))
        if len(self.classes) > 1 and "" in self.classes:
            loose = self.paths[folders.index("")]
            raise ValueError(f"{loose}: expected every picture in a sub-folder (its class), as others here are")
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[name] for name in folders])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.size, self.channels, preprocessing=self.preprocessing)

    def find_unreadable(self) -> dict[int, str]:
        """Reads every picture once, by threads, and returns what is wrong with those that cannot be read, by index."""
        with ThreadPoolExecutor() as pool:
            problems: dict[int, str] = {}
            for start in range(0, len(self), 1024):  # a task for each of millions of pictures would take gigabytes
                indices = range(start, min(start + 1024, len(self)))
                for index, problem in zip(indices, pool.map(self._problem, indices), strict=True):
                    if problem:
                        problems[index] = problem
        return problems

    def remove(self, indices: Iterable[int]) -> None:
        """Takes pictures out. The numbers of the classes stay.

        Raises:
            ValueError: no picture would be left.
        """
        removed = set(indices)
        kept = [index for index in range(len(self)) if index not in removed]
        if not kept:
            raise ValueError(f"{self.root}: none of its pictures is readable")
        self.paths = [self.paths[index] for index in kept]
        self.labels = self.labels[kept]

    def _problem(self, index: int) -> str:
        try:
            self[index]
        except (OSError, ValueError) as error:
            return str(error)
        return ""


def read_batches(images: Images | Tensor, batches: Iterable[Tensor], *, ahead: int = 2) -> Iterator[Tensor]:
    """Yields the images at each batch of indices (B,), as one tensor (B, C, H, W).

    Threads read the next `ahead` batches meanwhile, because decoding and resizing release Python's global lock. A
    tensor is only indexed.

    Raises:
        ValueError: an image has another shape than the first one. Errors of reading an image pass through.
    """
    if isinstance(images, Tensor):
        yield from (images[indices] for indices in batches)
        return
    pending: deque[_PendingBatch] = deque()
    first: Tensor | None = None
    with ThreadPoolExecutor() as pool:
        try:
            for indices in batches:
                numbers = indices.tolist()
                if first is None:
                    first = images[numbers[0]]  # gives the shape of all images; a thread reads it once more
                # The batch is allocated here, and each image by the thread that reads and frees it. If threads
                # freed each other's memory, the allocator's arenas would grow over thousands of images.
                batch = first.new_empty(len(numbers), *first.shape)
                reads = [
                    pool.submit(_read_into, row, images, index) for index, row in zip(numbers, batch, strict=True)
                ]
                pending.append(_PendingBatch(batch, reads))
                if len(pending) > ahead:
                    yield pending.popleft().wait()
            while pending:
                yield pending.popleft().wait()
        finally:
            pool.shutdown(cancel_futures=True)


class _PendingBatch(NamedTuple):
    """A batch, and the reads that fill its rows."""

    batch: Tensor
    reads: list[Future[None]]

    def wait(self) -> Tensor:
        """The batch when all rows are filled; raises what a read raised."""
        for read in self.reads:
            read.result()
        return self.batch


def _read_into(row: Tensor, images: Images, index: int) -> None:
    image = images[index]
    if image.shape != row.shape:
        raise ValueError(f"images: expected {tuple(row.shape)}, as the first, got {tuple(image.shape)}")
    row.copy_(image)
