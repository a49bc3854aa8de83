"""The C++ kernel of 8-bit linear layers against the same arithmetic in NumPy, on every instruction set."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import forked
from titok.ops.core.available import extension, why_no_cpp

if reason := why_no_cpp():
    pytest.skip(reason, allow_module_level=True)

ISAS = ("generic", "avx2", "avx512", None)
# rows, inputs, outputs: few of each, parts of a vector, of a tile and of a panel, and two panels and more
SHAPES = [
    (1, 4, 1),
    (2, 8, 5),
    (5, 4, 64),
    (6, 36, 65),
    (7, 48, 130),
    (13, 72, 200),
    (50, 260, 96),
    (1200, 12, 70),
]
F32, BF16 = torch.float32, torch.bfloat16


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def expected(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, gelu: bool
) -> np.ndarray:
    """In float64, but for the integers that a row becomes: those depend on float32 rounding.

    Args:
        x: (M, C) float32.
        weight: (O, C) int8.
        scale: (O,) float32.
        bias: (O,) float32 or None.
    """
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    spread = high - low
    with np.errstate(divide="ignore"):
        factor = np.where(spread > 0, np.float32(255) / spread, np.float32(0)).astype(np.float32)
    integers = np.rint((x - low) * factor).astype(np.int64)
    assert integers.min() >= 0
    assert integers.max() <= 255
    step = (spread / np.float32(255)).astype(np.float64)
    y = (integers @ weight.T.astype(np.int64)) * step * scale.astype(np.float64)
    y = y + low.astype(np.float64) * (weight.sum(1, dtype=np.int64) * scale.astype(np.float64))
    y = y if bias is None else y + bias
    return y * 0.5 * (1 + erf(y / math.sqrt(2))) if gelu else y


def packed(weight: np.ndarray) -> Tensor:
    """The layout of csrc/int8_linear/int8_linear.h, written element by element."""
    outputs, inputs = weight.shape
    values = np.zeros((-(-outputs // 64), inputs // 4, 256), dtype=np.int8)
    for o in range(outputs):
        for k in range(inputs):
            values[o // 64, k // 4, o % 64 * 4 + k % 4] = weight[o, k]
    return torch.from_numpy(values)


def padded(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.pad(values.astype(np.float32), (0, -len(values) % 64)))


def run_shape(shape: tuple[int, int, int], dtype: torch.dtype, gelu: bool) -> None:
    rows, inputs, outputs = shape
    noise = torch.Generator().manual_seed(rows + inputs + outputs)
    x = (torch.randn(rows, inputs, generator=noise) * 3 + 1).to(dtype)
    x[0] = 0.5  # a row without a range
    weight = torch.randint(-127, 128, (outputs, inputs), generator=noise, dtype=torch.int8).numpy()
    scale = (torch.rand(outputs, generator=noise) + 0.5).numpy() / (60 * math.sqrt(inputs))
    for bias in (torch.randn(outputs, generator=noise).to(dtype), None):
        out = torch.full((rows, outputs), float("nan"), dtype=dtype)
        totals = weight.sum(1, dtype=np.int64) * scale
        extension().int8_linear(x, packed(weight), padded(scale), padded(totals), bias, gelu, out)
        numbers = None if bias is None else bias.float().numpy()
        want = expected(x.float().numpy(), weight, scale, numbers, gelu)
        # Rounding of float32 is relative to the largest of the two terms, which cancel.
        rounding = 1e-6 * np.abs(expected(np.abs(x.float().numpy()), np.abs(weight), scale, None, False)) + 1e-6
        rounding += np.abs(want) * (2**-8 if dtype == BF16 else 0)
        assert (np.abs(out.double().numpy() - want) <= rounding).all(), (shape, dtype, gelu)


def run_all() -> None:
    for shape in SHAPES:
        for dtype in (F32, BF16):
            for gelu in (False, True):
                run_shape(shape, dtype, gelu)


@pytest.mark.parametrize("isa", ISAS)
def test_every_shape_on_every_instruction_set(isa: str | None) -> None:
    code = "import test_int8_linear_cpp as t; t.run_all()"
    forked.in_processes(1, code, Path(__file__).parent, **({} if isa is None else {"TITOK_CPU_ISA": isa}))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_in_this_process(shape: tuple[int, int, int]) -> None:
    run_shape(shape, BF16, True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_number_of_threads(dtype: torch.dtype) -> None:
    """Any number of threads gives the same bits."""
    x, weight = torch.randn(300, 256).to(dtype), torch.randint(-127, 128, (2, 64, 256), dtype=torch.int8)
    ones, results, before = torch.ones(128), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(x.new_empty(300, 128))
            extension().int8_linear(x, weight, ones, ones, None, False, results[-1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite(value: float) -> None:
    x = torch.randn(8, 20)
    x[3, 17] = value
    weight = torch.randint(-127, 128, (1, 5, 256), dtype=torch.int8)
    out, ones = torch.empty(8, 64), torch.ones(64)
    for gelu in (False, True):
        extension().int8_linear(x, weight, ones, ones, None, gelu, out)
        assert out[3].isnan().all()
        assert out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gelu_over_its_whole_range(dtype: torch.dtype) -> None:
    """Of inputs that are 0, the layer gives the GELU of its bias."""
    bias = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, 1e30, 0.0, -0.0, 1e-30])]).to(dtype)
    outputs = len(bias)
    panels = -(-outputs // 64)
    weight, zeros = torch.zeros(panels, 1, 256, dtype=torch.int8), torch.zeros(panels * 64)
    out = torch.empty(1, outputs, dtype=dtype)
    extension().int8_linear(torch.zeros(1, 4, dtype=dtype), weight, zeros, zeros, bias, True, out)
    wide = bias.double()
    want = wide * 0.5 * torch.special.erfc(-wide / math.sqrt(2))
    allowed = 3e-7 * wide.abs() + (want.abs() * 2**-8 if dtype == BF16 else 0)
    assert ((out[0].double() - want).abs() <= allowed).all()
