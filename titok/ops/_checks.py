"""Argument checks shared by the ops and the models: one line that names argument, expectation and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str | None] | None = None,
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
