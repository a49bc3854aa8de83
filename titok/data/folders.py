"""Images to train on: a folder of them, scikit-learn's handwritten digits, and what is done to a batch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.data.images import find_images, read_image


class Images(Protocol):
    """What the training loops read: images (C, H, W) in [0, 1] by index. A tensor (B, C, H, W) is one as well."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class ImageFolder:
    """The pictures below a folder, read when asked for; the class of each is the sub-folder it lies in.

    Pictures are resized and cropped as `titok.data.images.read_image` does. Sub-folders are numbered in sorted order; a
    folder without any is one class. Deeper folders belong to the sub-folder that they lie in.

    Args:
        size: (height, width), or an int for a square.
        channels: 3 for RGB, 1 for grey.

    Raises:
        FileNotFoundError: no folder, or no picture in it.
        ValueError: pictures both in the folder itself and in sub-folders; on access, a file that is no picture.
    """

    def __init__(self, root: str | os.PathLike[str], size: int | tuple[int, int], channels: int = 3) -> None:
        self.root, self.channels = Path(root), channels
        self.size = (size, size) if isinstance(size, int) else size
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder")
        self.paths = find_images(self.root)
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
        return read_image(self.paths[index], self.size, self.channels)


def read_batches(images: Images | Tensor, batches: Iterable[Tensor], *, ahead: int = 2) -> Iterator[Tensor]:
    """The images at each batch of indices (B,), all of one shape: (B, C, H, W). Files are read by threads, some batches
    ahead (decoding and resizing hold no lock of Python's)."""
    if isinstance(images, Tensor):
        yield from (images[indices] for indices in batches)
        return

    def read(index: int, row: Tensor) -> None:
        image = images[index]
        if image.shape != row.shape:
            raise ValueError(f"images: expected {tuple(row.shape)}, as the first, got {tuple(image.shape)}")
        row.copy_(image)

    # Every image is freed by the thread that read it, and batches are made by this one alone: where threads free each
    # other's memory, the allocator's share of it grows for thousands of images.
    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    first: Tensor | None = None

    def finished() -> Tensor:
        batch, reads = waiting.popleft()
        for done in reads:
            done.result()
        return batch

    with ThreadPoolExecutor() as pool:
        try:
            for indices in batches:
                numbers = indices.tolist()
                first = images[numbers[0]] if first is None else first  # for its shape; it is read once more
                batch = first.new_empty(len(numbers), *first.shape)
                reads = [pool.submit(read, index, row) for index, row in zip(numbers, batch, strict=True)]
                waiting.append((batch, reads))
                if len(waiting) > ahead:
                    yield finished()
            while waiting:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)


def shifted(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """images (B, C, H, W), each moved by its own whole number of pixels (B,) int64; edges are repeated."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right[:, None]).clamp(0, width - 1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images.movedim(1, -1)[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


class Digits(NamedTuple):
    """Handwritten digits: images (n, 1, 32, 32) float32 in [0, 1] and labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1,797 digits that scikit-learn carries (8x8, 17 grey levels; UCI "optical recognition of handwritten
    digits"), enlarged to 32x32 by bicubic interpolation. Every fifth image of each class is held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; says what to install.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn, which carries the digits, is not installed: pip install 'titok[quickstart]'"
        ) from error
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images).float()[:, None] / 16
    images = F.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)
    labels = torch.from_numpy(raw.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[::5, 0]] = True
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])
