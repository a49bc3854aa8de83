"""oneDNN's linear and convolution ops on weights in its own blocked layout, called the way torch.compile calls
them.

PyTorch does not document these ops. Where a release lacks one of them, `available` is false and PyTorch's own
layers run. They have no gradient, so they serve inference only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops import runs_eagerly

# Padding, stride, dilation and groups of every convolution here.
_GEOMETRY: Any = ([1, 1], [1, 1], [1, 1], 1)


def available(x: Tensor) -> bool:
    """Whether the ops can be called on x: plain, not empty, float32 or bfloat16, on a CPU that supports them."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16)
        and runs_eagerly(x)
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn()
        and (x.dtype == torch.float32 or _takes_bfloat16())
    )


@functools.cache
def _has_onednn() -> bool:
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in needed)


@functools.cache
def _takes_bfloat16() -> bool:
    """Whether oneDNN packs and multiplies bfloat16 on this CPU. It refuses to on one with AVX2 alone."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linear(weight: Tensor) -> Tensor:
    """weight (O, C) -> the same in the layout that `packed_linear` reads fastest."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """F.linear(x, weight, bias), and with `gelu` the exact GELU of it in the same pass.

    Args:
        x: (..., C).
        packed: `pack_linear` of the weight (O, C).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu" if gelu else "none", [], "none")
    return y


def pack_conv(weight: Tensor, x: Tensor) -> Tensor:
    """weight (O, C, k, k) -> the same in the layout that `conv` reads fastest for inputs of the shape of x."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # PyTorch's type stub lacks some of its arguments
    packed: Tensor = reorder(weight.detach().to_mkldnn(), *_GEOMETRY, list(x.shape))
    return packed


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) + add, in one pass if the weight is packed.

    Args:
        x: (B, C, H, W).
        weight: (O, C, k, k), as it is or packed by `pack_conv`.
        bias: (O,) or None.
        add: of the shape of the result, or None.

    Returns:
        (B, O, H + 3 - k, W + 3 - k).
    """
    if not weight.is_mkldnn:
        y = F.conv2d(x, weight, bias, padding=1)
        return y if add is None else y + add
    pointwise = torch.ops.mkldnn._convolution_pointwise
    result: Tensor
    if add is None:
        result = pointwise(x, weight, bias, *_GEOMETRY, "none", [], "")
    else:
        result = pointwise.binary(x, add, weight, bias, *_GEOMETRY, "add", 1.0, None, [], None)
    return result
