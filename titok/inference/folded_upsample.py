"""Nearest-neighbour upsampling by 2 and a 3x3 convolution, computed as four 2x2 convolutions of the small map.

An output pixel reads a 3x3 window of the enlarged map. That window holds only 2x2 distinct pixels of the small
map, and which taps of the kernel meet on each of them depends on whether the pixel's row and column are even or
odd. Along one axis, with s[i] the pixel of the small map that the output pixels 2i and 2i + 1 were copied from:

    output 2i     (even) reads  s[i-1] s[i]   s[i]      taps:  w0 on s[i-1],  w1 + w2 on s[i]
    output 2i + 1 (odd)  reads  s[i]   s[i]   s[i+1]    taps:  w0 + w1 on s[i],  w2 on s[i+1]

Adding the taps up beforehand leaves 4 * 4 products for each input pixel in place of 4 * 9, and the enlarged map is
never stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.inference import cudnn
from titok.inference.fused_linear import is_ordinary_call
from titok.inference.onednn import add_conv, conv
from titok.inference.workspace import Buffers
from titok.ops.core.available import why_no_triton


class FoldedUpsampleConv(NamedTuple):
    """The folded form of a 3x3 convolution with C input and O output channels.

    Attributes:
        weight: two tensors (2 * O, C, 2, 2), for even and for odd output rows. In each, the first O output
            channels are those of odd output columns and the others those of even ones.
        bias: (O,) or None.
    """

    weight: tuple[Tensor, ...]
    bias: Tensor | None


def fold_upsample_conv(weight: Tensor, bias: Tensor | None = None) -> FoldedUpsampleConv:
    """Folds a 3x3 convolution for `upsample_conv`.

    Taps are added in float64 and rounded once, to the weight's dtype.

    Args:
        weight: (O, C, 3, 3) of any floating dtype.
        bias: (O,) of the same dtype, or None.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device; it is named.
    """
    check_tensor("weight", weight, shape=("O", "C", 3, 3), dtypes=FLOAT_DTYPES)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=(weight.dtype,), device=weight.device)
    # taps[parity, pixel, tap] is 1 where that tap of the kernel meets that one of the two pixels; parity 0 is
    # even. See the table at the top of this file.
    taps = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64, device=weight.device
    )
    # p and q are the parities of row and column, a and b the pixels, k and l the taps. Odd columns come first.
    folded = torch.einsum("pak,qbl,ockl->pqocab", taps, taps.flip(0), weight.double()).to(weight.dtype)
    by_row_parity = tuple(row.flatten(0, 1).contiguous() for row in folded)
    return FoldedUpsampleConv(by_row_parity, bias)


def upsample_conv(x: Tensor, folded: FoldedUpsampleConv) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1), exact up to rounding.

    Args:
        x: (B, C, H, W) in the dtype of the folded weight. Channels-last maps stay channels-last and are the fast
            ones.

    Returns:
        (B, O, 2H, 2W).

    Raises:
        TypeError, ValueError: x has a wrong type, dtype, shape or device.
    """
    weight, bias = folded
    channels, outputs = weight[0].shape[1], weight[0].shape[0] // 2
    dtypes = (weight[0].dtype, *([torch.bfloat16] if weight[0].is_mkldnn else []))  # `onednn.conv` converts it
    check_tensor("x", x, shape=("B", channels, "H", "W"), dtypes=dtypes, device=weight[0].device)
    batch, _, height, width = x.shape
    result = x.new_empty(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)
    if cudnn.is_used(x):
        for parity in (0, 1):
            place_on_gpu(result, cudnn.conv(x, weight[parity], None, 2 * outputs), parity, bias)
    else:
        twice_bias = None if bias is None else torch.cat([bias, bias])
        for parity in (0, 1):
            copy_windows(result, conv(x, weight[parity], twice_bias), parity)
    return result if x.stride(1) == 1 else result.contiguous()


def upsample_conv_in(buffers: Buffers, x: Tensor, folded: FoldedUpsampleConv) -> Tensor:
    """`upsample_conv` with packed weights of the dtype of x, in buffers.

    Args:
        x: (B, C, H, W), channels-last, in none of the blocks "hidden" and "map".

    Returns:
        (B, O, 2H, 2W), channels-last, in the block "map".
    """
    weight, bias = folded
    batch, _, height, width = x.shape
    outputs = weight[0].shape[0] // 2
    result = buffers.map("map", (batch, outputs, 2 * height, 2 * width), x.dtype)
    twice_bias = None if bias is None else torch.cat([bias, bias])
    for parity in (0, 1):
        windows = buffers.map("hidden", (batch, 2 * outputs, height + 1, width + 1), x.dtype).zero_()
        copy_windows(result, add_conv(windows, x, weight[parity], twice_bias), parity)
    return result


def place_on_gpu(result: Tensor, windows: Tensor, parity: int, bias: Tensor | None) -> None:
    """`copy_windows` on a GPU: in Triton where it can run, at three times the speed of PyTorch's strided sum."""
    tensors = [t for t in (result, windows, bias) if t is not None]
    channels_last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (result, windows))
    fits = channels_last and windows.dtype != torch.float64  # the kernel adds in float32
    if not fits or why_no_triton(*tensors) is not None or not is_ordinary_call(tensors):
        copy_windows(result, windows, parity, bias)
        return
    from titok.kernels import place_windows

    place_windows.place(windows, bias, result, parity)


def copy_windows(result: Tensor, windows: Tensor, parity: int, bias: Tensor | None = None) -> None:
    """Copies the result of one 2x2 convolution to the rows of the enlarged map that it computed.

    A 2x2 convolution of the padded map has H + 1 rows of W + 1 windows. Window (i, j) holds the small map's rows i - 1
    and i and its columns j - 1 and j, which is what the output rows 2i - 1 and 2i and the output columns 2j - 1 and 2j
    read. So even rows take the windows 0 to H - 1 and odd rows the windows 1 to H. The channels of window j are the
    output columns 2j - 1 and 2j, so a row of windows is a row of the result in its order in memory, with one column
    too many at either end.

    Args:
        result: (B, O, 2H, 2W), channels-last.
        windows: (B, 2 * O, H + 1, W + 1).
        parity: 0 for even rows of the result, 1 for odd ones.
        bias: (O,), added on the way; None adds nothing.
    """
    batch, outputs, height, width = result.shape
    columns = windows.permute(0, 2, 3, 1).reshape(batch, height // 2 + 1, width + 2, outputs)
    rows, read = result.permute(0, 2, 3, 1)[:, parity::2], columns[:, parity : parity + height // 2, 1:-1]
    if bias is None:
        rows.copy_(read)
    else:
        torch.add(read, bias, out=rows)
