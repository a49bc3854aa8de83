"""oneDNN's linear and convolution ops on weights in its own blocked layout, called as torch.compile calls them.

PyTorch does not document these ops. Where a release lacks one of them, `packs` is false and PyTorch's own layers run.
They have no gradient, so they serve inference only.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titok.inference.dtypes import bfloat16_is_native

# Padding, stride, dilation and groups of every convolution here.
_GEOMETRY: Any = ([1, 1], [1, 1], [1, 1], 1)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN can pack a weight and compute with it: dense, not empty, float32 or bfloat16, on a CPU.

    On a CPU without instructions for bfloat16, a bfloat16 weight is packed as float32: that is faster, and no less
    exact. The functions below convert their inputs and results then.
    """
    return (
        weight.device.type == "cpu"
        and weight.numel() > 0
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.layout == torch.strided
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn()
    )


@functools.cache
def _has_onednn() -> bool:
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_convolution_pointwise_")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in needed)


@functools.cache
def _packs_bfloat16() -> bool:
    """Whether oneDNN packs bfloat16, which it refuses on a CPU with AVX2 alone, and multiplies it fast."""
    return bfloat16_is_native() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _to_pack(weight: Tensor) -> Tensor:
    return weight.detach().float() if weight.dtype == torch.bfloat16 and not _packs_bfloat16() else weight.detach()


def pack_linear(weight: Tensor) -> Tensor:
    """weight (O, C) -> the same in the layout that `packed_linear` reads fastest."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(_to_pack(weight))
    return packed


def pack_conv(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """weight (O, C, k, k) -> the same in the layout that the convolutions below read fastest.

    Args:
        size: height and width of the maps that will be convolved, because oneDNN has several layouts and chooses one
            by them. Maps of another size are convolved as well, but oneDNN may have to lay the weight out again in
            each call, which can take longer than the convolution.
    """
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # PyTorch's type stub lacks some of its arguments
    packed: Tensor = reorder(_to_pack(weight).to_mkldnn(), *_GEOMETRY, [1, weight.shape[1], *size])
    return packed


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `pack_linear` or `pack_conv` was called with, bit for bit, of its dtype."""
    return packed.to_dense().to(dtype)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """F.linear(x, weight, bias), and with `gelu` the exact GELU of it in the same pass.

    Args:
        x: (..., C).
        packed: `pack_linear` of the weight (O, C).
        bias: (O,) or None.

    Returns:
        (..., O) in the dtype of x.
    """
    attribute = "gelu" if gelu else "none"
    y: Tensor
    dtype = packed.dtype
    y = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, _as(bias, dtype), attribute, [], "none")
    return y.to(x.dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) + add, in one pass if the weight is packed.

    Args:
        x: (B, C, H, W).
        weight: (O, C, k, k), as it is or packed by `pack_conv`.
        bias: (O,) or None.
        add: of the shape of the result, or None.

    Returns:
        (B, O, H + 3 - k, W + 3 - k) in the dtype of x.
    """
    if not weight.is_mkldnn:
        y = F.conv2d(x, weight, bias, padding=1)
        return y if add is None else y + add
    pointwise = torch.ops.mkldnn._convolution_pointwise
    dtype = weight.dtype
    inputs, bias, add = x.to(dtype), _as(bias, dtype), _as(add, dtype)
    result: Tensor
    if add is None:
        result = pointwise(inputs, weight, bias, *_GEOMETRY, "none", [], "")
    else:
        result = pointwise.binary(inputs, add, weight, bias, *_GEOMETRY, "add", 1.0, None, [], None)
    return result.to(x.dtype)


def add_conv(total: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Adds conv2d(x, weight, bias, padding=1) to `total`, in its memory, and returns `total`.

    Args:
        total: (B, O, H + 3 - k, W + 3 - k), channels-last.
        x: (B, C, H, W), channels-last.
        packed: `pack_conv` of the weight (O, C, k, k), of the dtype of x and `total`.
        bias: (O,) of any dtype, or None.
    """
    bias = _as(bias, packed.dtype)
    torch.ops.mkldnn._convolution_pointwise_.binary(total, x, packed, bias, *_GEOMETRY, "add", 1.0, None, [], None)
    return total


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _register_flop_formulas() -> None:
    """Lets `torch.utils.flop_counter` count these ops, which PyTorch has no formulas for."""

    def linear(_x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * math.prod(out_shape) * weight[1]

    def convolution(_first: Any, second: Any, third: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        # The arguments are x, weight and bias, or with a sum x, other and weight, or other, x and weight.
        weight = third if third is not None and len(third) == 4 else second
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    ops = torch.ops.mkldnn
    register_flop_formula(ops._linear_pointwise)(linear)
    register_flop_formula([ops._convolution_pointwise, ops._convolution_pointwise_])(convolution)


if _has_onednn():
    _register_flop_formulas()
