"""Linear layers that compute on 8-bit integers, on CPUs with AVX-512 VNNI (csrc/int8_linear).

Weights are quantised once, symmetrically, with one scale for each output; inputs in each call, with one scale and one
zero point for each row ("dynamic" quantisation), so that nothing has to be measured beforehand. docs/performance.md
says what this gains and how it changes pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops.core.available import extension, why_no_cpp

_PANEL, _GROUP = 64, 4  # kInt8Panel and kInt8Group of csrc/int8_linear/int8_linear.h
_MOST_INPUTS = 65536  # kInt8MostInputs


class Int8Weight(NamedTuple):
    """The weight (O, C) of a linear layer in 8 bits, as the kernel reads it."""

    values: Tensor  # (O / 64 rounded up, C / 4, 64 * 4) int8, padded with 0
    scale: Tensor  # float32, of each row of the padded weight
    total: Tensor  # float32, the sum of each row of the padded weight
    shape: tuple[int, int]


def why_no_int8(device: str | torch.device) -> str | None:
    """Why 8-bit layers cannot be computed fast on a device; None if they can be."""
    if torch.device(device).type != "cpu":
        return "8-bit layers are computed on CPUs alone"
    if (reason := why_no_cpp()) is not None:
        return reason
    return None if extension().multiplies_int8() else "this CPU has no AVX-512 VNNI"


def check_int8(device: str | torch.device) -> None:
    """Raises `ValueError` where 8-bit layers cannot be computed fast on a device."""
    if (reason := why_no_int8(device)) is not None:
        raise ValueError(f"dtype: expected another one than int8, because {reason}")


def takes(weight: Tensor) -> bool:
    """Whether the kernel computes a layer with such a weight."""
    return (
        weight.dtype in (torch.float32, torch.bfloat16)
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and weight.shape[1] <= _MOST_INPUTS
        and weight.shape[1] % _GROUP == 0
    )


def quantize(weight: Tensor) -> Int8Weight:
    """weight (O, C) float32 or bfloat16 -> the nearest integers in [-127, 127] times a scale for each output."""
    outputs, inputs = weight.shape
    values, scales, totals = [], [], []
    # In pieces, so that loading a model takes little more memory than the model.
    for rows in weight.detach().split(_PANEL):
        wide = F.pad(rows.float(), (0, 0, 0, _PANEL - len(rows)))
        scale = wide.abs().amax(1) / 127
        integers = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        values.append(integers.to(torch.int8).view(_PANEL, -1, _GROUP).transpose(0, 1).flatten(1))
        scales.append(scale)
        totals.append(integers.sum(1, dtype=torch.float64).float() * scale)
    return Int8Weight(torch.stack(values), torch.cat(scales), torch.cat(totals), (outputs, inputs))


def dequantize(weight: Int8Weight) -> Tensor:
    """The weight (O, C) float32 that the layer multiplies with."""
    outputs, inputs = weight.shape
    panels = weight.values.unflatten(2, (_PANEL, _GROUP)).transpose(1, 2)
    rows = panels.reshape(-1, inputs) * weight.scale[:, None]
    return rows[:outputs]


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, gelu: bool) -> Tensor:
    """F.linear(x, weight, bias), and with `gelu` the exact GELU of it in the same pass.

    Args:
        x: (..., C) float32 or bfloat16. A row that holds an infinity or a NaN gives NaN.
        bias: (O,) in the dtype of x, or None.

    Returns:
        (..., O) in the dtype of x.
    """
    outputs, inputs = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    extension().int8_linear(
        x.reshape(-1, inputs), weight.values, weight.scale, weight.total, bias, gelu, out.view(-1, outputs)
    )
    return out
