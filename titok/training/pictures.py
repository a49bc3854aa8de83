"""Pictures of what a model does while it is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from titok.checkpoints.writing import atomic_path


def rows_of_images(*rows: Tensor, gap: int = 2) -> Tensor:
    """One picture of several rows of images on white.

    Args:
        rows: each (n, C, H, W) in [0, 1], of the same shape.
        gap: pixels between images.

    Returns:
        (C, rows * (H + gap) - gap, n * (W + gap) - gap).
    """
    images = torch.stack([row.detach().float().cpu().clamp(0, 1) for row in rows])
    images = torch.nn.functional.pad(images, (0, gap, 0, gap), value=1.0)
    count, columns, channels, height, width = images.shape
    picture = images.permute(2, 0, 3, 1, 4).reshape(channels, count * height, columns * width)
    return picture[:, : count * height - gap, : columns * width - gap]


def save_png(path: Path, picture: Tensor) -> None:
    """Writes a picture (C, H, W) in [0, 1], of one channel or three, as a PNG."""
    from PIL import Image

    values = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(temporary)
