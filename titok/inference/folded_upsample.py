"""Nearest-neighbour x2 followed by a 3x3 convolution, as four 2x2 convolutions of the small map.

An output pixel sees a 3x3 window of the enlarged map, which holds only 2x2 distinct pixels of the small one; which
taps meet on each depends on whether its row and column are even or odd. Adding those taps up beforehand leaves
4 * 4 instead of 4 * 9 products for each input pixel, 4/9 of the FLOPs, and the enlarged map is never stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.inference.onednn import conv


class FoldedUpsampleConv(NamedTuple):
    """`weight`: of even and of odd output rows, (2*O, C, 2, 2) each, odd columns' channels before even columns';
    `bias` (2*O,) or None."""

    weight: tuple[Tensor, ...]
    bias: Tensor | None


def fold_upsample_conv(weight: Tensor, bias: Tensor | None = None) -> FoldedUpsampleConv:
    """Prepares a 3x3 convolution, weight (O, C, 3, 3) and bias (O,), for `upsample_conv`.

    Taps are added in float64 and rounded once to weight's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit, by name.
    """
    check_tensor("weight", weight, shape=("O", "C", 3, 3), dtypes=FLOAT_DTYPES)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=(weight.dtype,), device=weight.device)
    # rows of the small map that the taps of an even output row meet: before, itself, itself; of an odd one: itself,
    # itself, after
    meets = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64, device=weight.device
    )
    folded = torch.einsum("pak,qbl,ockl->pqocab", meets, meets.flip(0), weight.double()).to(weight.dtype)
    rows = tuple(row.flatten(0, 1).contiguous() for row in folded)
    return FoldedUpsampleConv(rows, None if bias is None else torch.cat([bias, bias]))


def upsample_conv(x: Tensor, folded: FoldedUpsampleConv) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1), exact up to rounding.

    Args:
        x: (B, C, H, W) in the dtype of the folded weight; channels-last maps stay channels-last and are the fast ones.

    Returns:
        (B, O, 2H, 2W)

    Raises:
        TypeError, ValueError: an argument does not fit, by name.
    """
    weight, bias = folded
    first = weight[0]
    check_tensor("x", x, shape=("B", first.shape[1], "H", "W"), dtypes=(first.dtype,), device=first.device)
    batch, _, height, width = x.shape
    out = x.new_empty(batch, 2 * height, 2 * width, first.shape[0] // 2)
    for row in (0, 1):
        # Window (i, j) of the padded map holds the pixels around its corner, where output columns 2j - 1 and 2j meet:
        # side by side in memory they are the whole row of the result, and one column too many at either end.
        wide = (
            conv(x, weight[row], bias).permute(0, 2, 3, 1).reshape(batch, height + 1, 2 * width + 2, out.shape[3])
        )
        out[:, row::2] = wide[:, row : row + height, 1:-1]
    result = out.permute(0, 3, 1, 2)
    return result if x.stride(1) == 1 else result.contiguous()
