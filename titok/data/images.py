"""Pictures in and out: reading with the evaluation transform, 8-bit conversion, PSNR, grids, PNG files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from titok.checkpoints.files import atomic_path
from titok.checks import check_tensor

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def check_rounding(rounding: str) -> None:
    if rounding not in ("nearest", "truncate"):
        raise ValueError(f"rounding: expected 'nearest' or 'truncate', got {rounding!r}")


def to_uint8(images: Tensor, rounding: Literal["nearest", "truncate"] = "nearest") -> Tensor:
    """images (..., C, H, W) around [0, 1] -> uint8 (..., H, W, C), clamped.

    "truncate" is what the published FID script does: it darkens by half a level on average.
    """
    check_rounding(rounding)
    levels = images.clamp(0, 1).float() * 255
    levels = levels.round() if rounding == "nearest" else levels
    return levels.to(torch.uint8).movedim(-3, -1)


def read_image(path: str | os.PathLike[str], size: tuple[int, int], channels: int = 3) -> Tensor:
    """One picture as float32 (channels, height, width) in [0, 1], by the evaluation transform of TiTok: resized
    (bicubic, antialiased) until it covers `size`, then cropped to it around the centre.

    As in that transform, EXIF orientation is not applied and transparency is dropped. 16-bit grey is scaled to 8 bits.

    Args:
        size: (height, width).
        channels: 3 for RGB, 1 for grey.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a readable picture, or one whose white level is unknown (32-bit pixels); names the file.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    try:
        with Image.open(path) as opened:
            picture = _as_8_bits(opened).convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    height, width = size
    # Rounded as torchvision's Resize and CenterCrop round, which the published evaluation ran.
    if width * picture.height >= height * picture.width:
        resized = (width, width * picture.height // picture.width)
    else:
        resized = (height * picture.width // picture.height, height)
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    array = np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return torch.from_numpy(array).reshape(height, width, channels).permute(2, 0, 1).contiguous()


def _as_8_bits(picture: Image.Image) -> Image.Image:
    """What Pillow converts to RGB or grey without a loss: its own conversion makes all 16-bit levels past 255 white,
    and warns of transparent palettes."""
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(levels.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels, which do not tell what is white")
    return picture.convert("RGBA") if picture.mode == "P" else picture


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The picture at `path`, or every picture below the folder `path`, sorted. Raises `FileNotFoundError`."""
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise FileNotFoundError(f"{root}: no picture here (looked for {', '.join(sorted(EXTENSIONS))})")
    return found


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2, scale: int = 1) -> Tensor:
    """uint8 (B, H, W, C) -> one uint8 picture (H', W', C), row by row on white; `scale` repeats pixels."""
    check_tensor("images", images, shape=("B", "H", "W", "C"), dtypes=(torch.uint8,))
    count, height, width, channels = images.shape
    columns = columns or max(1, math.ceil(math.sqrt(count)))
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
    """uint8 (B, H, W, C) twice -> peak signal-to-noise ratio of each pair in dB, float64 (B,); equal ones: inf."""
    check_tensor("images", images, shape=("B", "H", "W", "C"), dtypes=(torch.uint8,))
    check_tensor("references", references, shape=tuple(images.shape), dtypes=(torch.uint8,))
    errors = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    return 10 * (255**2 / errors).log10()


def write_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Writes one uint8 picture (H, W, C), C 1 or 3; an existing file is replaced only by a whole one."""
    check_tensor("image", image, shape=("H", "W", "C"), dtypes=(torch.uint8,))
    array = image.cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")
