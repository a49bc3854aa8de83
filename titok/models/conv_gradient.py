"""A 3x3 convolution whose weight gradient is computed by matrix products, where that is faster.

On CPUs with AVX2 alone, oneDNN computes the weight gradient of a channels-last map with many channels at a fraction of
its rate for the other two products of a training step. docs/performance.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops.core.mode import is_plain

# From these numbers of channels on, matrix products were faster: in maps of at least this many pixels, and in others.
_MIN_PIXELS = 1024
_MIN_CHANNELS, _MIN_CHANNELS_OF_SMALL_MAPS = 128, 256


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)`, for x (B, C, H, W) and weight (O, C, 3, 3)."""
    if weight.requires_grad and torch.is_grad_enabled() and _gains(x, weight):
        y: Tensor = _Conv3x3.apply(x, weight, bias)
        return y
    return F.conv2d(x, weight, bias, padding=1)


def _gains(x: Tensor, weight: Tensor) -> bool:
    channels = _MIN_CHANNELS if _is_large(x) else _MIN_CHANNELS_OF_SMALL_MAPS
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape[:2]) >= channels
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.cpu._is_avx512_supported()
        and not is_plain()
    )


def _is_large(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] >= _MIN_PIXELS


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight of a 3x3 convolution with padding 1 and without bias.

    Of a small map, the 3x3 windows are stored, and one product with the gradient of the result gives all of it. Of a
    large map, that would be too much memory. There x, surrounded by zeros, and the gradient of the result, with two
    columns and two rows of zeros behind it, are matrices of as many pixels each. Then the offset between two pixels
    that one weight connects is the same number of rows everywhere, so that the gradient for each of the 9 positions is
    the product of two slices.

    Args:
        x: (B, C, H, W), channels-last.
        grad: (B, O, H, W), channels-last.

    Returns:
        (O, C, 3, 3), channels-last.
    """
    channels, height, width = x.shape[1:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    places = [(row, column) for row in range(3) for column in range(3)]
    if not _is_large(x):
        windows = torch.cat([padded[:, r : r + height, c : c + width] for r, c in places], dim=-1)
        gradient = grad.permute(0, 2, 3, 1).flatten(0, 2).mT @ windows.flatten(0, 2)
    else:
        pixels = padded.flatten(0, 2)
        slopes = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2)).flatten(0, 2)
        offsets = [row * (width + 2) + column for row, column in places]
        gradient = torch.stack([slopes[: len(slopes) - n].mT @ pixels[n:] for n in offsets], dim=1)
    return gradient.reshape(-1, 3, 3, channels).permute(0, 3, 1, 2)


class _Conv3x3(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_x = F.conv_transpose2d(grad, weight, padding=1) if needs_x else None
        of_weight = weight_gradient(x, grad) if needs_weight else None
        return of_x, of_weight, grad.sum((0, 2, 3)) if needs_bias else None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        saved_x, saved_weight = ctx.saved_tensors
        terms = []
        if x is not None:
            terms.append(F.conv2d(x, saved_weight, padding=1))
        if weight is not None:
            terms.append(F.conv2d(saved_x, weight, padding=1))
        if bias is not None:
            total = terms[0] if terms else torch.zeros_like(saved_x[:, :1]).expand(-1, len(bias), -1, -1)
            terms = [total + bias[:, None, None], *terms[1:]]
        return sum(terms[1:], terms[0])
