"""The dtype that the networks compute in, as callers name it."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Literal

import torch

from titok.inference.int8 import check_int8

Dtype = torch.dtype | Literal["auto", "int8"]


def choose_dtype(dtype: Dtype, device: str | torch.device) -> torch.dtype:
    """The dtype that weights and activations have for `dtype`.

    "auto" is bfloat16 on a GPU that multiplies it, and float32 on any other device. GPUs multiply bfloat16 from compute
    capability 8.0 on, at least twice as fast as float32. For "int8" it is the dtype of whatever is not quantised:
    bfloat16 on a CPU that multiplies it, else float32.

    Raises:
        TypeError: `dtype` is neither a dtype nor "auto" nor "int8".
        ValueError: "int8" where it cannot be computed fast.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("auto", "int8"):
        raise TypeError(f"dtype: expected a torch.dtype, 'auto' or 'int8', got {dtype!r}")
    device = torch.device(device)
    if dtype == "int8":
        check_int8(device)
        return torch.bfloat16 if bfloat16_is_native() else torch.float32
    on_new_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if on_new_gpu else torch.float32


# Values of ONEDNN_MAX_CPU_ISA that forbid oneDNN the instructions for bfloat16.
_ISA_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@functools.cache
def bfloat16_is_native() -> bool:
    """Whether this CPU has instructions for bfloat16 products, and `ONEDNN_MAX_CPU_ISA` allows them."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISA_WITHOUT_BFLOAT16:
        return False
    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")
    if (capabilities := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return any(capabilities().get(name, False) for name in names)
    with contextlib.suppress(OSError):  # PyTorch releases without that function
        return not set(names).isdisjoint(Path("/proc/cpuinfo").read_text().split())
    return False
