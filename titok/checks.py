"""Checks of what users hand to the models: images, tokens, labels. `ValueError`/`TypeError`, one line each.

Values are looked at on the CPU only. On a GPU that would make the host wait in every call; there the same condition
is asserted on the device, and a violation surfaces as CUDA's device-side assertion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titok.ops._checks import check_tensor

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_values(name: str, value: Tensor, fine: Tensor, expected: str) -> None:
    """`fine` holds one bool for each element of `value`."""
    if torch.compiler.is_compiling() or value.numel() == 0:
        return
    if value.is_cuda:
        torch._assert_async(fine.all(), f"{name}: expected {expected}")
    elif not bool(fine.all()):
        bad = value[~fine]
        raise ValueError(f"{name}: expected {expected}, got {bad[0].item()!r} ({bad.numel()} such values)")


def check_images(images: Any, channels: int, size: tuple[int, int]) -> None:
    """images (B, C, H, W), a floating dtype, every value in [0, 1] (NaN is not)."""
    if isinstance(images, Tensor) and not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise TypeError(
            f"images: expected a floating dtype with values in [0, 1], got {kind} (divide uint8 by 255)"
        )
    check_tensor("images", images, shape=("B", channels, *size), dtypes=_FLOATS)
    _check_values("images", images, (images >= 0) & (images <= 1), "values in [0, 1]")


def check_tokens(tokens: Any, length: int, bound: int) -> None:
    """tokens (B, length) int64 in [0, bound)."""
    check_tensor("tokens", tokens, shape=("B", length), dtypes=(torch.int64,))
    _check_values("tokens", tokens, (tokens >= 0) & (tokens < bound), f"ids in [0, {bound})")


def check_latents(latents: Any, length: int, dim: int) -> None:
    """latents (B, length, dim) of a VAE, a floating dtype, finite."""
    check_tensor("latents", latents, shape=("B", length, dim), dtypes=_FLOATS)
    _check_values("latents", latents, latents.isfinite(), "finite values")


def check_labels(labels: Any, num_classes: int) -> None:
    """labels (B,) int64 in [0, num_classes]; num_classes itself stands for "class dropped"."""
    check_tensor("labels", labels, shape=("B",), dtypes=(torch.int64,))
    _check_values("labels", labels, (labels >= 0) & (labels <= num_classes), f"classes in [0, {num_classes}]")


def labels_on_host(labels: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """Labels as a user gives them, checked: a tensor on the CPU."""
    labels = labels.cpu() if isinstance(labels, Tensor) else torch.tensor(labels, dtype=torch.int64)
    check_labels(labels, num_classes)
    return labels
