"""A 3x3 convolution whose weight gradient is computed by matrix products, where that is faster.

On CPUs with AVX2 alone, oneDNN computes the weight gradient of a large channels-last map at a fraction of its rate for
the other two products of a training step. docs/performance.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops.core.mode import is_plain

# From these numbers of channels and pixels on, matrix products were faster.
_MIN_CHANNELS, _MIN_PIXELS = 128, 1024


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)`, for x (B, C, H, W) and weight (O, C, 3, 3)."""
    if weight.requires_grad and torch.is_grad_enabled() and _gains(x, weight):
        y: Tensor = _Conv3x3.apply(x, weight, bias)
        return y
    return F.conv2d(x, weight, bias, padding=1)


def _gains(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and x.shape[2] * x.shape[3] >= _MIN_PIXELS
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.cpu._is_avx512_supported()
        and not is_plain()
    )


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight, (O, C, 3, 3), of a 3x3 convolution with padding 1 and without bias.

    x, surrounded by zeros, and the gradient of the result, with two columns and two rows of zeros behind it, are
    matrices of as many pixels each. Then the offset between two pixels that one weight connects is the same number of
    rows everywhere, so that the gradient for each of the 9 positions is the product of two slices.

    Args:
        x: (B, C, H, W), channels-last.
        grad: (B, O, H, W), channels-last.
    """
    width = x.shape[3] + 2
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).view(-1, x.shape[1])
    slopes = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2)).view(-1, grad.shape[1])
    offsets = [row * width + column for row in range(3) for column in range(3)]
    products = [slopes[: len(slopes) - offset].mT @ pixels[offset:] for offset in offsets]
    return torch.stack(products, dim=-1).unflatten(-1, (3, 3))


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
