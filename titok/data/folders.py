"""Images for models: pictures of any source, resized and cropped when they are asked for, and read in batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titok.data.augment import random_numbers
from titok.data.crops import Transform, evaluation, random_crop, to_tensor
from titok.data.images import UPRIGHT_ON_WHITE, Preprocessing, check_size, transform_picture
from titok.data.sources import FolderSource, PictureSource


class Images(Protocol):
    """Images (C, H, W) in [0, 1] by index. A tensor (B, C, H, W) is one example, `ImageFolder` another."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class Pictures:
    """The pictures of a source as images, each read when it is asked for.

    Args:
        source: of the pictures.
        size: (height, width) in pixels, or an integer for a square.
        channels: 3 for RGB, 1 for grey.
        preprocessing: what happens to EXIF orientation and transparency.
        transform: makes an image, or copies of it, of a picture; that of the evaluation by default.

    Attributes:
        indices: of the pictures in the source, those that `remove` took out left out.

    Raises:
        TypeError, ValueError: `size` is not as described. On access: a file is no picture.
    """

    source: PictureSource
    channels: int
    preprocessing: Preprocessing
    transform: Transform

    def __init__(
        self,
        source: PictureSource,
        size: int | Sequence[int],
        channels: int = 3,
        *,
        preprocessing: Preprocessing = UPRIGHT_ON_WHITE,
        transform: Transform = evaluation,
    ) -> None:
        self.source, self.channels, self.preprocessing, self.transform = source, channels, preprocessing, transform
        self.size: tuple[int, int] = check_size(size)
        self.indices: Sequence[int] = range(len(source))

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by label."""
        return self.source.classes

    @property
    def labels(self) -> Tensor:
        """The class of each picture, (n,) int64.

        Raises:
            ValueError: some pictures of a folder are in sub-folders and others are not.
        """
        labels = self.source.labels[torch.as_tensor(self.indices, dtype=torch.int64, device="cpu")]
        if len(self.classes) > 1 and "" in self.classes:
            loose = self.source.describe(int((self.source.labels == self.classes.index("")).nonzero()[0]))
            raise ValueError(f"{loose}: expected every picture in a sub-folder (its class), as others here are")
        return labels

    @property
    def names(self) -> list[str]:
        """The names of the pictures."""
        return [self.source.names[index] for index in self.indices]

    @property
    def paths(self) -> list[Path]:
        """The files that hold the pictures."""
        return self.source.files(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index, self.transform)

    def read(self, index: int, transform: Transform) -> Tensor:
        """A picture with another transform than that of this object."""
        number = self.indices[index]
        return transform_picture(
            self.source[number].content,
            transform,
            self.size,
            self.channels,
            preprocessing=self.preprocessing,
            name=self.source.describe(number),
        )

    def augmented(self, seed: int, *, crop: bool = True, flip: bool = False) -> AugmentedPictures:
        """The same pictures with crops, and mirror images, that are drawn anew in each epoch."""
        return AugmentedPictures(self, seed, crop=crop, flip=flip)

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
        kept = [number for index, number in enumerate(self.indices) if index not in removed]
        if not kept:
            raise ValueError(f"{self.source.where}: none of its pictures is readable")
        self.indices = kept

    def _problem(self, index: int) -> str:
        try:
            self[index]
        except (OSError, ValueError) as error:
            return str(error)
        return ""


class ImageFolder(Pictures):
    """The pictures below a folder, each read when it is asked for. The class of a picture is its sub-folder.

    Pictures are found by `titok.data.images.list_images`, and resized and cropped as by `read_image`. Sub-folders are
    numbered in sorted order; one without pictures is no class, and a folder without sub-folders is one class. A
    picture in a deeper folder belongs to the sub-folder directly below `root`.

    Args:
        root: the folder.
        size, channels, preprocessing: as for `Pictures`.

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
        size = check_size(size)
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{root}: no such folder")
        super().__init__(FolderSource(root), size, channels, preprocessing=preprocessing)
        _ = self.labels  # raises


class AugmentedPictures:
    """Pictures with random crops and mirror images. They are images by the number of a draw, not of a picture.

    Draw number epoch * n + index is picture `index` of n in that epoch. Its crop depends on (seed, epoch, index) alone:
    not on the process or thread that reads it, nor on what was read before. `titok.training.order` makes the numbers.

    Args:
        pictures: that are drawn from.
        seed: in [0, 2^63).
        crop: True takes a window of the resized picture that is anywhere with equal chance; False takes the centre.
        flip: True mirrors left to right with probability 1/2.
    """

    pictures: Pictures
    seed: int
    crop: bool
    flip: bool

    def __init__(self, pictures: Pictures, seed: int, *, crop: bool, flip: bool) -> None:
        self.pictures, self.seed, self.crop, self.flip = pictures, seed, crop, flip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: int) -> Tensor:
        epoch, index = divmod(draw, len(self.pictures))
        down, right, mirror = random_numbers(self.seed, epoch, index, count=3)
        transform: Transform = evaluation
        if self.crop:
            transform = lambda picture, size: to_tensor(random_crop(picture, size, down, right))  # noqa: E731
        image = self.pictures.read(index, transform)
        return image.flip(-1) if self.flip and mirror >> 63 else image


class ReadablePictures:
    """Pictures, of which those that cannot be read are noted in place of raising an error.

    Attributes:
        problems: what is wrong with each picture that was asked for and cannot be read, by index. In its place there
            is a black image.
    """

    pictures: Pictures
    problems: dict[int, str]

    def __init__(self, pictures: Pictures, *, copies: int | None = None) -> None:
        self.pictures, self.problems = pictures, dict[int, str]()
        self._shape = (*(() if copies is None else (copies,)), pictures.channels, *pictures.size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.pictures[index]
        except (OSError, ValueError) as error:
            self.problems[index] = str(error)
            return torch.zeros(self._shape, device="cpu")


def read_batches(
    images: Images | Tensor,
    batches: Iterable[Tensor],
    *,
    ahead: int = 2,
    workers: int | None = None,
    processes: bool = False,
) -> Iterator[Tensor]:
    """Yields the images at each batch of indices (B,), as one tensor (B, C, H, W).

    The next batches are read meanwhile. Neither the images nor their order depend on how. A tensor is only indexed.

    Args:
        ahead: batches that threads read in advance.
        workers: that read images; None means as many threads as `ThreadPoolExecutor` starts, and one process for each
            core. 0 reads in the thread that asks, nothing in advance.
        processes: True reads by processes in place of threads. Threads are the better default, because decoding and
            resizing release Python's global lock: see docs/data.md.

    Raises:
        ValueError: an image has another shape than the first one. Errors of reading an image pass through.
    """
    if isinstance(images, Tensor):
        yield from (images[indices] for indices in batches)
    elif workers == 0:
        first: Tensor | None = None
        for indices in batches:
            rows = [images[index] for index in indices.tolist()]
            first = rows[0] if first is None else first
            for row in rows:
                _check_shape(row, first)
            yield torch.stack(rows)
    elif processes:
        yield from _read_by_processes(images, batches, workers or os.cpu_count() or 1)
    else:
        yield from _read_by_threads(images, batches, ahead, workers)


def _read_by_processes(images: Images, batches: Iterable[Tensor], workers: int) -> Iterator[Tensor]:
    loader: DataLoader[Tensor] = DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=(indices.tolist() for indices in batches),
        num_workers=workers,
        collate_fn=torch.stack,
        # Its own generator, because the loader would draw a number from PyTorch's global one.
        generator=torch.Generator("cpu"),
    )
    yield from loader


def _read_by_threads(
    images: Images, batches: Iterable[Tensor], ahead: int, workers: int | None
) -> Iterator[Tensor]:
    pending: deque[_PendingBatch] = deque()
    first: Tensor | None = None
    with ThreadPoolExecutor(workers) as pool:
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
    _check_shape(image, row)
    row.copy_(image)


def _check_shape(image: Tensor, first: Tensor) -> None:
    if image.shape != first.shape:
        raise ValueError(f"images: expected {tuple(first.shape)}, as the first, got {tuple(image.shape)}")
