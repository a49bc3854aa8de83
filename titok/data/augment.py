"""Augmentation: images of a batch moved by given numbers, and random numbers that depend on the sample alone."""

from __future__ import annotations

import numpy as np
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


def random_numbers(seed: int, epoch: int, sample: int, *, count: int) -> list[int]:
    """`count` integers, uniform in [0, 2^64), that depend on the arguments and on nothing else.

    Args:
        seed: in [0, 2^63).
        epoch, sample: from 0.
    """
    stream = 2  # `titok.training.order` uses 0 and 1 in this place, for steps and for the order of the samples
    return np.random.SeedSequence((seed, stream, epoch, sample)).generate_state(count, np.uint64).tolist()
