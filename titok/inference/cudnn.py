"""cuDNN's convolutions of channels-last maps on a GPU, tuned without a switch of the whole process.

`torch.backends.cudnn.benchmark` lets cuDNN try its algorithms for each new shape, but it holds for all threads.
`torch.cudnn_convolution`, which `torch.nn.functional.conv2d` ends in, takes the same choice as an argument. PyTorch
keeps the algorithm that it found, and takes it in later calls of the same shape, also in a captured graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# 16-bit products run on tensor cores in groups of so many channels.
_CHANNELS_AT_ONCE = 8

_tuning: ContextVar[bool] = ContextVar("titok_cudnn_tuning", default=False)


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """A context in which `conv` tries cuDNN's algorithms for shapes that it has not met, which takes far longer.

    It holds for the current context (`contextvars`), not for other threads. It cannot be captured in a CUDA graph. Two
    processes may choose different algorithms, which round differently; where PyTorch is to be deterministic, none is
    tried.
    """
    token = _tuning.set(True)
    try:
        yield
    finally:
        _tuning.reset(token)


def is_used(tensor: Tensor) -> bool:
    """Whether convolutions of a map, or with a weight, are those of this file."""
    return tensor.is_cuda


def lay_out(weight: Tensor) -> Tensor:
    """weight (O, C, k, k) on a GPU -> the same as `conv` reads it fastest: channels-last, in memory of its own.

    In 16 bits O is filled up to a multiple of 8 with zeros.
    """
    missing = -len(weight) % _CHANNELS_AT_ONCE if weight.dtype.itemsize == 2 else 0
    weight = F.pad(weight.detach(), (0, 0, 0, 0, 0, 0, 0, missing))
    return weight.clone(memory_format=torch.channels_last)


def restore(weight: Tensor, outputs: int) -> Tensor:
    """What `lay_out` was called with, bit for bit. `outputs`: its O."""
    return weight[:outputs].clone(memory_format=torch.contiguous_format)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """conv2d(x, weight, bias, padding=1) on a GPU.

    Args:
        x: (B, C, H, W), channels-last.
        weight: (O', C, k, k), channels-last, where O' is `outputs` or, with zeros behind it, more.
        bias: (outputs,) or None.

    Returns:
        (B, outputs, H + 3 - k, W + 3 - k), channels-last.
    """
    if x.is_cuda and x.dtype.itemsize == 2 and _has_cudnn():
        is_deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        one = (1, 1)
        tunes = _tuning.get() and not is_deterministic
        y = torch.cudnn_convolution(x, weight, one, one, one, 1, tunes, is_deterministic, False)
    else:
        y = F.conv2d(x, weight, padding=1)
    if outputs == len(weight):
        return y if bias is None else y.add_(bias[:, None, None])  # as PyTorch adds it
    return y[:, :outputs] if bias is None else y[:, :outputs] + bias[:, None, None]


def _has_cudnn() -> bool:
    return bool(torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()) and torch.version.hip is None
