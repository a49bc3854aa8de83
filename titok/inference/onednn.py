"""oneDNN's linear and convolution ops, on weights in a layout of its own: what `torch.compile` emits, called directly.

They are not public; where a release lacks one, `available` says no and PyTorch's own layers run. Only for inference.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops import runs_eagerly

_GEOMETRY: Any = ([1, 1], [1, 1], [1, 1], 1)  # of every convolution here: padding, stride, dilation, groups

_WITHOUT_LAYOUTS: ContextVar[bool] = ContextVar("titok_onednn_without_layouts", default=False)


@contextmanager
def without_layouts() -> Iterator[None]:
    """Within, layers of this thread or task use neither oneDNN's packed weights nor its fused sums."""
    token = _WITHOUT_LAYOUTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_LAYOUTS.reset(token)


def available(x: Tensor) -> bool:
    """Whether they may be called on x: a plain float32 or bfloat16 tensor on a CPU that has them."""
    return (
        x.device.type == "cpu"
        and not _WITHOUT_LAYOUTS.get()
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
    """Whether oneDNN packs and multiplies bfloat16 on this CPU; on one with AVX2 alone it refuses to."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linear(weight: Tensor) -> Tensor:
    """weight (O, C) in the layout that `packed_linear` reads without rearranging it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """F.linear, and the exact GELU of it before it is stored: x (..., C) -> (..., O)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu" if gelu else "none", [], "none")
    return y


def pack_conv(weight: Tensor, x: Tensor) -> Tensor:
    """weight (O, C, k, k) in the layout that `conv` reads fastest for maps of x's size, padded by 1."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub leaves arguments out
    packed: Tensor = reorder(weight.detach().to_mkldnn(), *_GEOMETRY, list(x.shape))
    return packed


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) + add, the sum in the same pass where `pack_conv` made the weight."""
    if not weight.is_mkldnn:
        y = F.conv2d(x, weight, bias, padding=1)
        return y if add is None else y + add
    ops = torch.ops.mkldnn._convolution_pointwise
    done: Tensor
    if add is None:
        done = ops(x, weight, bias, *_GEOMETRY, "none", [], "")
    else:
        done = ops.binary(x, add, weight, bias, *_GEOMETRY, "add", 1.0, None, [], None)
    return done
