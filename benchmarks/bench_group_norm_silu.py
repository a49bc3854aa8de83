"""`group_norm_silu` on channels-last maps against torch's ops: `python -m benchmarks.bench_group_norm_silu`.

The maps are those of the pixel decoder at 256 and 512 pixels, in 32 groups. Bytes, in passes over B * C * H * W
elements: maps of at most 32 x 32 pixels are read once and written once. Larger maps are read twice, for the
statistics and to be normalised, because they need not fit in a cache. That makes 3 passes, and 5 with the residual
sum (two inputs read, sum written, sum read, result written). FLOP: about 20 an element.

On a CPU all candidates run in memory that the process keeps, as in titok's models, because page faults of fresh
memory would take longer than the ops do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.op_report import OpReport, checked, op_parser
from titok.ops import group_norm_silu

EPS, GROUPS = 1e-6, 32
SHAPES = ((512, 16), (512, 32), (256, 64), (512, 64), (256, 128), (128, 128), (128, 256))  # (C, H = W)
FEW_SHAPES = (SHAPES[1], SHAPES[4], SHAPES[6])


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def titok(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, GROUPS, weight, bias, EPS)


def add_eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, eager(total, weight, bias)


def add_titok(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return group_norm_silu(x, GROUPS, weight, bias, EPS, residual=residual)


def case(batch: int, channels: int, side: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x (B, C, side, side), residual (like x), weight (C,), bias (C,)."""
    maps = torch.randn(2, batch, channels, side, side, device=device).to(dtype)
    affine = torch.randn(2, channels, device=device).to(dtype)
    return [*(m.contiguous(memory_format=torch.channels_last) for m in maps), *affine]


def shifted(inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """The same maps, shifted sideways by `seed` pixels, and the same weights."""
    return tuple(
        t.roll(seed, -1).contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs
    )


@pytest.mark.parametrize("run", [eager, titok])
@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.benchmark(group="group_norm_silu")
def test_bench(benchmark: Any, side: int, run: Callable[..., Any]) -> None:
    benchmark.group += f"[C=128, {side} px]"
    x, _, weight, bias = case(1, 128, side, torch.float32, "cpu")
    with torch.no_grad():
        benchmark(run, x, weight, bias)


def parser() -> argparse.ArgumentParser:
    return op_parser(__doc__)


def main() -> None:
    arguments = parser().parse_args()
    report = OpReport("group_norm_silu", arguments)
    alone: dict[str, Callable[..., Any]] = {"eager": eager, "titok": titok}
    added: dict[str, Callable[..., Any]] = {"eager": add_eager, "titok": add_titok}
    if arguments.compile:
        alone["compiled"] = torch.compile(eager, dynamic=False)
        added["compiled"] = torch.compile(add_eager, dynamic=False)
    for batch in arguments.batch:
        for channels, side in FEW_SHAPES if arguments.few else SHAPES:
            x, residual, *affine = case(batch, channels, side, report.dtype, report.device)
            second_read = int(side > 32)
            variants = (
                ("no", alone, (x, *affine), 2 + second_read),
                ("yes", added, (x, residual, *affine), 4 + second_read),
            )
            for with_residual, runs, inputs, passes in variants:
                sizes = {"B": batch, "C": channels, "px": side, "residual": with_residual}
                calls = checked(runs, partial(shifted, inputs), "eager")
                with torch.no_grad():
                    report.case(sizes, calls, num_bytes=passes * x.nbytes, flops=20.0 * x.numel())


if __name__ == "__main__":
    main()
