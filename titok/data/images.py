"""Pictures: finding, reading with the evaluation transform, conversion to 8 bits, PSNR, grids, writing."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from titok.checkpoints.writing import atomic_path
from titok.checks import check_tensor
from titok.config import Rounding, as_integer
from titok.data.crops import Transform, evaluation

# Pillow recognises files of these formats and cannot read their pixels, or runs another program for it (EPS).
UNREADABLE_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Folders that archives, network disks and Windows add to folders of pictures. Hidden ones are left out anyway.
FOLDERS_OF_PROGRAMS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"})
MAX_PIXELS = 178_956_970  # of a picture that is read; Pillow's own limit by default
_TRANSPOSITIONS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WRITTEN_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix: Pillow's name


def check_rounding(rounding: str) -> None:
    """Raises `ValueError` unless `rounding` is one of the two rules of `to_uint8`."""
    if rounding not in ("nearest", "truncate"):
        raise ValueError(f"rounding: expected 'nearest' or 'truncate', got {rounding!r}")


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Images (..., C, H, W) as 8-bit pictures (..., H, W, C). Values outside [0, 1] are clamped.

    Args:
        rounding: "nearest"; or "truncate", as the published FID script does, which makes pictures darker by half a
            level on average.
    """
    check_rounding(rounding)
    levels = images.clamp(0, 1).float() * 255
    levels = levels.round() if rounding == "nearest" else levels
    return levels.to(torch.uint8).movedim(-3, -1)


class Preprocessing(NamedTuple):
    """What happens to a picture before it is resized."""

    apply_orientation: bool = True  # turn it upright, as its EXIF orientation says
    white_background: bool = True  # lay transparent pixels over white; else their colours are taken as stored


UPRIGHT_ON_WHITE = Preprocessing()
PUBLISHED_PREPROCESSING = Preprocessing(apply_orientation=False, white_background=False)


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels, from two integers of Python or NumPy, or from one for a square.

    Raises:
        TypeError: not integers. A bool is none.
        ValueError: not two of them, or one is below 1.
    """
    sides = list(size) if isinstance(size, Sequence) else [size, size]
    if len(sides) != 2:
        raise ValueError(f"size: expected (height, width), got {size!r}")
    height, width = (_check_count("size", side) for side in sides)
    return height, width


def _check_count(name: str, value: Any) -> int:
    """An integer of Python or NumPy that is at least 1, as an int; otherwise `TypeError` or `ValueError`."""
    count = as_integer(value)
    if count is None:
        raise TypeError(f"{name}: expected integers, got {value!r}")
    if count < 1:
        raise ValueError(f"{name}: expected integers >= 1, got {count}")
    return count


def read_image(
    path: str | os.PathLike[str],
    size: int | Sequence[int],
    channels: int = 3,
    *,
    preprocessing: Preprocessing = UPRIGHT_ON_WHITE,
) -> Tensor:
    """Reads one picture by the evaluation transform of TiTok: float32 (channels, height, width) in [0, 1].

    The transform resizes the picture (bicubic, antialiased) to the smallest size that covers `size`, and crops it
    to `size` around the centre. 16-bit grey is scaled to 8 bits. Of an animation, the first frame is read.

    Reading takes at most 12 bytes for each pixel of the picture and 256 bytes for each pixel of `size`. Pictures
    have `MAX_PIXELS` pixels at most.

    Args:
        size: (height, width) in pixels, or an integer for a square.
        channels: 3 for RGB, 1 for grey.
        preprocessing: the published evaluation corresponds to `PUBLISHED_PREPROCESSING`. Pillow applies the
            orientation of TIFF files in any case.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: `size` is not as described.
        ValueError: the file is no readable picture, its pixels have 32 bits and so no known white level, or it has
            too many pixels.
    """
    size = check_size(size)
    return transform_picture(path, evaluation, size, channels, preprocessing=preprocessing, name=str(path))


def transform_picture(
    content: bytes | str | os.PathLike[str],
    transform: Transform,
    size: tuple[int, int],
    channels: int = 3,
    *,
    preprocessing: Preprocessing = UPRIGHT_ON_WHITE,
    name: str,
) -> Tensor:
    """Decodes one picture and applies a transform, as `read_image` does, with the same limits.

    Args:
        content: of a file, or the path of a file.
        transform: takes the picture, of mode RGB or L, and `size` = (height, width).
        name: of the picture, for messages.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels, more than {MAX_PIXELS}")
            picture = _as_8_bits(opened, preprocessing).convert("RGB" if channels == 3 else "L")
            turn = _orientation(opened) if preprocessing.apply_orientation else None
        if turn is not None:
            picture = picture.transpose(turn)
        return transform(picture, size)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable picture (Pillow knows no such format)") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{name}: not a readable picture ({error})") from error


def _orientation(picture: Image.Image) -> Image.Transpose | None:
    """How the picture is turned upright; None where it is upright, or where its EXIF data are damaged."""
    try:
        return _TRANSPOSITIONS.get(picture.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data raise many kinds, and do not matter to the pixels
        return None


def _as_8_bits(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The picture in a mode that Pillow converts to RGB and to grey without loss or warning.

    Pillow itself turns all 16-bit levels above 255 into white, and warns of palettes with transparency.
    """
    picture.load()  # some formats tell of transparency only then
    if picture.mode.startswith("I;16"):
        raw = np.asarray(picture)
        levels = (raw.astype(np.float32) / 257).round().astype(np.uint8)
        if preprocessing.white_background and "transparency" in picture.info:
            levels[raw == picture.info["transparency"]] = 255
        return Image.fromarray(levels)
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels, which do not tell what is white")
    if preprocessing.white_background and _has_transparency(picture):
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGBA") if picture.mode == "P" else picture


def _has_transparency(picture: Image.Image) -> bool:
    in_palette = picture.palette is not None and picture.palette.mode == "RGBA"
    return picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or in_palette or "transparency" in picture.info


class ImageList(NamedTuple):
    """The pictures below a folder."""

    paths: list[Path]  # sorted
    left_out: dict[str, int]  # how many files and folders were left out, by suffix or by kind

    def describe_left_out(self) -> str:
        """One line, such as "left out: 2 hidden, 3 .heic"; "" where nothing was left out."""
        if not self.left_out:
            return ""
        return "left out: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.left_out.items()))


def list_images(path: str | os.PathLike[str]) -> ImageList:
    """The picture at `path`, or all pictures below the folder `path`.

    A picture is a file with a suffix of `readable_extensions()`, in any case. Links to files and folders are
    followed, except for a link to a folder that it lies in. Left out are other files, and files and folders that
    are hidden or that programs leave behind (`FOLDERS_OF_PROGRAMS`).

    Raises:
        FileNotFoundError: there is no such file or folder, or no picture in the folder.
        OSError: a folder cannot be read.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    if root.is_file():
        return ImageList([root], {})
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    _search(root, (), readable_extensions(), found, left_out)
    images = ImageList(sorted(found), dict(left_out))
    if not found:
        details = [f"looked for {', '.join(sorted(readable_extensions()))}", images.describe_left_out()]
        raise FileNotFoundError(f"{root}: no picture here ({'; '.join(filter(None, details))})")
    return images


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The paths of `list_images`."""
    return list_images(path).paths


def _search(
    folder: Path,
    above: tuple[tuple[int, int], ...],
    extensions: frozenset[str],
    found: list[Path],
    left_out: Counter[str],
) -> None:
    """Adds the pictures below `folder` to `found`, and counts in `left_out` what is no picture.

    Args:
        above: device and number of the folders that this one was reached through.
    """
    status = folder.stat()
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif entry.name in FOLDERS_OF_PROGRAMS:
                left_out[entry.name] += 1
            elif path.is_dir():
                if entry.is_symlink() and (path.stat().st_dev, path.stat().st_ino) in above:
                    left_out["link to a folder above it"] += 1
                else:
                    _search(path, above, extensions, found, left_out)
            elif not path.is_file():
                left_out["broken link" if entry.is_symlink() else "special file"] += 1
            elif path.suffix.lower() in extensions:
                found.append(path)
            else:
                left_out[path.suffix.lower() or "file without a suffix"] += 1


def readable_extensions() -> frozenset[str]:
    """Suffixes in lower case of the files that the installed Pillow reads, with plug-ins that are registered."""
    Image.init()
    formats = (Image.OPEN.keys() | {"MPO"}) - UNREADABLE_FORMATS  # Pillow opens MPO as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2, scale: int = 1) -> Tensor:
    """Places pictures on a white one, row by row.

    Args:
        images: (B, H, W, C) uint8.
        columns: pictures in a row; None makes about as many rows as columns.
        gap: in pixels, between pictures.
        scale: each pixel becomes a square of scale x scale pixels.

    Returns:
        (H', W', C) uint8.
    """
    check_tensor("images", images, shape=("B", "H", "W", "C"), dtypes=(torch.uint8,))
    count, height, width, channels = images.shape
    scale = _check_count("scale", scale)
    columns = max(1, math.ceil(math.sqrt(count))) if columns is None else _check_count("columns", columns)
    rows = max(1, math.ceil(count / columns))
    images = images.cpu().repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    height, width = height * scale, width * scale
    canvas = torch.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=torch.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each pair in dB, (B,) float64; infinite where the two are equal.

    Args:
        images, references: (B, H, W, C) uint8.
    """
    check_tensor("images", images, shape=("B", "H", "W", "C"), dtypes=(torch.uint8,))
    check_tensor("references", references, shape=tuple(images.shape), dtypes=(torch.uint8,))
    errors = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    return 10 * (255**2 / errors).log10()


def write_image(path: str | os.PathLike[str], image: Tensor) -> None:
    """Writes one picture (H, W, C) uint8, C = 1 or 3, in the format that the suffix of `path` names in any case.

    An existing file is replaced once the new one is complete. JPEG and WebP are lossy, with quality 95.

    Raises:
        ValueError: the suffix is not in `WRITTEN_FORMATS`.
        OSError: the file cannot be written, for example because the disk is full. The message names it.
    """
    check_tensor("image", image, shape=("H", "W", "C"), dtypes=(torch.uint8,))
    kind = WRITTEN_FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(WRITTEN_FORMATS)}")
    array = image.cpu().numpy()
    quality = {} if kind == "PNG" else {"quality": 95}
    # The file is written here and not by Pillow, whose JPEG encoder does not report a full disk.
    encoded = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(encoded, format=kind, **quality)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(encoded.getvalue())
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
