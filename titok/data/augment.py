"""Augmentation of a batch of images. The random numbers come in as arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_images(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moves each image by a whole number of pixels; the pixels at its edge are repeated.

    Args:
        images: (B, C, H, W).
        down, right: (B,) int64, in pixels; a negative number moves up or left.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right[:, None]).clamp(0, width - 1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images.movedim(1, -1)[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
