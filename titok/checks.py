"""Checks of arguments, shared by every public entry: `ValueError` or `TypeError` in one line that names the argument.

Values (ids, classes, pixels) are looked at on the CPU only. On a GPU that would make the host wait in every call. There
the same condition is asserted on the device, and a violation surfaces as CUDA's device-side assertion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str | torch.SymInt] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raises `TypeError` for a wrong type or dtype and `ValueError` for a wrong shape or device.

    Args:
        shape: an int must match; a str names a free dimension in the message; a leading `...` is spelled `"..."`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if shape is not None:
        leading = bool(shape) and shape[0] == "..."
        tail = list(shape[1:]) if leading else list(shape)
        got = list(value.shape)
        fits = len(got) >= len(tail) if leading else len(got) == len(tail)
        aligned = got[len(got) - len(tail) :] if fits else []
        if not fits or any(isinstance(w, int) and w != g for w, g in zip(tail, aligned, strict=True)):
            wanted = ", ".join(str(s) for s in shape)
            raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_eps(eps: Any) -> None:
    """The number that a norm adds to the variance: finite and above 0."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number above 0, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a number above 0, got {eps}")


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
    check_tensor("images", images, shape=("B", channels, *size), dtypes=FLOAT_DTYPES)
    _check_values("images", images, (images >= 0) & (images <= 1), "values in [0, 1]")


def check_tokens(tokens: Any, length: int, bound: int) -> None:
    """tokens (B, length) int64 in [0, bound)."""
    check_tensor("tokens", tokens, shape=("B", length), dtypes=(torch.int64,))
    _check_values("tokens", tokens, (tokens >= 0) & (tokens < bound), f"ids in [0, {bound})")


def check_latents(latents: Any, length: int, dim: int) -> None:
    """latents (B, length, dim) of a VAE, a floating dtype, finite."""
    check_tensor("latents", latents, shape=("B", length, dim), dtypes=FLOAT_DTYPES)
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
