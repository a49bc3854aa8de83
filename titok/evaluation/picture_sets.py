"""Sets of 8-bit pictures for `evaluate_samples`: an .npz in ADM's layout, or a folder."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from titok.checkpoints.files import first_line
from titok.data.folders import Pictures, read_batches
from titok.data.images import UPRIGHT_ON_WHITE, Preprocessing, to_uint8
from titok.data.npz import read_arrays
from titok.data.sources import PictureSource

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # names that ADM's evaluator gives them
LOOKED_AT = 1000  # pictures of a folder whose size is looked at


class PictureSet(Protocol):
    """Pictures of one size with three channels.

    Attributes:
        size: (height, width).
        labels: (N,) int64, or None where they are unknown.
    """

    size: tuple[int, int]
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def batches(self, ranges: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pictures of each range of consecutive numbers, uint8 (B, H, W, 3)."""

    def warnings(self) -> list[str]:
        """What of these pictures makes figures differ from published ones, one sentence each."""


class NpzPictures:
    """The pictures `arr_0` and labels `arr_1` of an .npz, and the statistics in it.

    An array that is not compressed is read by batches, whatever its size. A compressed one is read into memory.

    Args:
        path: of the .npz. `arr_0` is uint8 (N, H, W, 3), or grey (N, H, W, 1) or (N, H, W).

    Attributes:
        statistics: arrays by the names `STATISTICS`; empty where the file has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds neither pictures nor statistics.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)
        small = read_arrays(self.path, ["arr_1", *STATISTICS])
        self.statistics: dict[str, np.ndarray] = {name: small[name] for name in STATISTICS if name in small}
        labels = small.get("arr_1")
        self.labels: np.ndarray | None = (
            labels if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" else None
        )
        self._pictures: np.ndarray | None = None
        self._offset, shape, dtype = self._find_pictures()
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
            raise ValueError(f"{self.path}: arr_0: expected uint8 (N, H, W, 3), got {dtype} {shape}")
        self._count, *sides = shape
        self.size: tuple[int, int] = (sides[0], sides[1])
        self.channels: int = sides[2] if len(sides) == 3 else 1
        if self.labels is not None and len(self.labels) != self._count:
            raise ValueError(
                f"{self.path}: arr_1: expected {self._count} labels, as there are pictures, got {len(self.labels)}"
            )

    def __len__(self) -> int:
        return self._count

    def batches(self, ranges: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pictures of each range of consecutive numbers, uint8 (B, H, W, 3); grey ones as RGB."""
        shape = (*self.size, self.channels)
        row_bytes = math.prod(shape)
        with self.path.open("rb") as file:
            for numbers in ranges:
                start, count = int(numbers[0]), len(numbers)
                if self._pictures is not None:
                    array = self._pictures[start : start + count].reshape(count, *shape)
                else:
                    file.seek(self._offset + start * row_bytes)
                    content = file.read(count * row_bytes)
                    if len(content) != count * row_bytes:
                        raise ValueError(f"{self.path}: became shorter while it was read")
                    array = np.frombuffer(content, dtype=np.uint8).reshape(count, *shape)
                yield torch.from_numpy(array.copy()).expand(-1, -1, -1, 3)

    def warnings(self) -> list[str]:
        """See `PictureSet`."""
        found = []
        if self.channels == 1:
            found.append(f"{self.path}: grey pictures, read here as RGB; ADM's evaluator needs three channels")
        if self.labels is not None:
            counts = np.unique(self.labels, return_counts=True)[1]
            if len(counts) and counts.min() != counts.max():
                found.append(
                    f"{self.path}: {counts.min()} to {counts.max()} pictures of a class; published samples have "
                    "equally many of each"
                )
        return found

    def _find_pictures(self) -> tuple[int, tuple[int, ...], np.dtype]:
        """Where the pictures begin in the file, their shape and their dtype. Compressed ones are read."""
        try:
            with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
                entry = archive.getinfo("arr_0.npy")
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    self._pictures = read_arrays(self.path, ["arr_0"])["arr_0"]
                    return 0, self._pictures.shape, self._pictures.dtype
                # The local header repeats the name, with a length of its own for further fields.
                file.seek(entry.header_offset)
                header = file.read(30)
                start = (
                    entry.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
                )
                file.seek(start)
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran_order, dtype = read_header(file)
                size = math.prod(shape) * dtype.itemsize
                if fortran_order or dtype.hasobject or size != entry.file_size - (file.tell() - start):
                    raise ValueError(f"arr_0: expected pictures one after the other, got {dtype} {shape}")
                return file.tell(), shape, dtype
        except KeyError:
            raise ValueError(f"{self.path}: expected pictures named arr_0, got none") from None
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self.path}: not a readable .npz of pictures ({first_line(error)})") from error


class SourcePictures:
    """The pictures of a source, such as a folder, as RGB.

    They are resized and cropped at the centre as TiTok's evaluation does it. ADM's reference files were made from
    pictures that were halved by a box filter first, so that distances to them differ.

    Args:
        source: of the pictures, see `titok.data.opening.open_pictures`.
        size: (height, width) of the pictures to compare with.
        preprocessing: what happens to EXIF orientation and transparency.
    """

    size: tuple[int, int]
    images: Pictures

    def __init__(
        self, source: PictureSource, size: tuple[int, int], preprocessing: Preprocessing = UPRIGHT_ON_WHITE
    ) -> None:
        self.size, self.images = size, Pictures(source, size, 3, preprocessing=preprocessing)
        self.labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, ranges: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `PictureSet`."""
        for images in read_batches(self.images, ranges):
            yield to_uint8(images)

    def warnings(self) -> list[str]:
        """See `PictureSet`."""
        source = self.images.source
        looked_at = range(0, len(self), max(1, len(self) // LOOKED_AT))
        others = sum(_size_of(source, index) != self.size for index in looked_at)
        if not others:
            return []
        height, width = self.size
        return [
            f"{source.where}: {others} of {len(looked_at)} pictures looked at are not {width} x {height} pixels; they "
            "are resized and cropped at the centre here, and reference files of ADM were made otherwise"
        ]


def _size_of(source: PictureSource, index: int) -> tuple[int, int] | None:
    """(height, width) of a picture, from its header; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(source[index].content)) as picture:
            return picture.height, picture.width
    except Exception:  # Pillow raises many kinds; reading the pixels will name the problem
        return None
