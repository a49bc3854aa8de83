"""The way from `group_norm_silu` to its C++ kernel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from titok.ops._extension import extension, why_no_cpp
from titok.ops._registry import ran

DTYPES = (torch.float32, torch.bfloat16)


def _is_map(value: Any, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether this is a map as the C++ kernel reads and writes it."""
    return (
        type(value) is Tensor
        and value.is_cpu
        and value.dtype is dtype
        and value.shape == shape
        and value.is_contiguous(memory_format=torch.channels_last)
    )


def usual_call(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
    out: Tensor | tuple[Tensor, Tensor] | None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The result of a usual eager call, with the least Python; None for all others, whose arguments are then looked at
    one by one. Arguments that must be tensors are."""
    if not (
        x.is_cpu
        and (dtype := x.dtype) in DTYPES
        and (out_dtype is None or out_dtype in DTYPES)
        and len(shape := x.shape) == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(num_groups) is int
        and num_groups > 0
        and shape[1] % num_groups == 0
        and weight.dtype is bias.dtype
        and (weight.dtype is torch.float32 or weight.dtype is dtype)
        and weight.is_cpu
        and bias.is_cpu
        and weight.shape == bias.shape == shape[1:2]
        and weight.is_contiguous()
        and bias.is_contiguous()
        and eps > 0
        and why_no_cpp() is None
    ):
        return None
    if residual is None:
        normalised = torch.empty_like(x, dtype=out_dtype) if out is None else out
        if not (out is None or _is_map(out, out_dtype or dtype, shape)):
            return None
        launch(x, None, weight, bias, eps, None, cast(Tensor, normalised), None, None, num_groups)
        return normalised
    if not _is_map(residual, dtype, shape):
        return None
    if out is None:
        total, normalised = torch.empty_like(x), torch.empty_like(x, dtype=out_dtype)
    elif not (type(out) is tuple and _is_map(out[0], dtype, shape) and _is_map(out[1], out_dtype or dtype, shape)):
        return None
    else:
        total, normalised = out
    launch(x, residual, weight, bias, eps, total, normalised, None, None, num_groups)
    return total, normalised


def launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor | None,
    normalised: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    num_groups: int,
) -> None:
    """Channels-last maps, contiguous parameters of one dtype. Positional: names would cost microseconds."""
    ran("group_norm_silu", "cpp")
    total = None if residual is None else total
    extension().group_norm_silu(x, residual, num_groups, weight, bias, eps, total, normalised, mean, rstd)
