"""The dtype that the networks compute in where the caller leaves the choice to titok."""

from __future__ import annotations

from typing import Literal

import torch

Dtype = torch.dtype | Literal["auto"]


def choose_dtype(dtype: Dtype, device: str | torch.device) -> torch.dtype:
    """`dtype`, or for "auto" bfloat16 on a GPU that multiplies it, and float32 on any other device.

    GPUs multiply bfloat16 from compute capability 8.0 on, at least twice as fast as float32.

    Raises:
        TypeError: `dtype` is neither a dtype nor "auto".
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        raise TypeError(f"dtype: expected a torch.dtype or 'auto', got {dtype!r}")
    device = torch.device(device)
    on_new_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if on_new_gpu else torch.float32
