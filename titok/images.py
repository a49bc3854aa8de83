"""Pictures in and out: reading with the evaluation transform, 8-bit conversion, grids, PNG files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from titok.checkpoints import atomic_path

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def to_uint8(images: Tensor, rounding: Literal["nearest", "truncate"] = "nearest") -> Tensor:
    """images (..., C, H, W) around [0, 1] -> uint8 (..., H, W, C), clamped.

    "truncate" is what the published FID script does: it darkens by half a level on average.
    """
    if rounding not in ("nearest", "truncate"):
        raise ValueError(f"rounding: expected 'nearest' or 'truncate', got {rounding!r}")
    levels = images.clamp(0, 1).float() * 255
    levels = levels.round() if rounding == "nearest" else levels
    return levels.to(torch.uint8).movedim(-3, -1)


def read_image(path: str | os.PathLike[str], size: tuple[int, int], channels: int = 3) -> Tensor:
    """One picture as float32 (channels, height, width) in [0, 1], by the evaluation transform of TiTok: resized
    (bicubic, antialiased) until it covers `size`, then cropped to it around the centre.

    Args:
        size: (height, width).
        channels: 3 for RGB, 1 for grey.

    Raises:
        FileNotFoundError; ValueError: not a readable picture. Both name the file.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    array = np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return torch.from_numpy(array).reshape(height, width, channels).permute(2, 0, 1).contiguous()


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The picture at `path`, or every picture below the folder `path`, sorted. Raises `FileNotFoundError`."""
    root = Path(path)
    if root.is_file():
        return [root]
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise FileNotFoundError(f"{root}: no picture here (looked for {', '.join(sorted(EXTENSIONS))})")
    return found


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2, scale: int = 1) -> Tensor:
    """uint8 (B, H, W, C) -> one uint8 picture (H', W', C), row by row on white; `scale` repeats pixels."""
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


def write_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Writes one uint8 picture (H, W, C), C 1 or 3; an existing file is replaced only by a whole one."""
    array = image.cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")
