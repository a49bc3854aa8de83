"""`add_layer_norm` against an add and torch's layer_norm: `python -m benchmarks.bench_add_layer_norm`.

Bytes: each input and each result once, which makes four tensors forward and four more backward. FLOP: about 8 an
element forward; they never bound the time. On a CPU all candidates run forward in memory that the process keeps,
as in titok's models.
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

from benchmarks.harness.op_report import OpReport, op_parser
from titok.ops import add_layer_norm

EPS = 1e-5
# (tokens, width) in the encoders of L-32, B-64 and S-128 at 256 pixels, and of L-64 at 512 pixels
SHAPES = ((289, 1024), (321, 768), (385, 512), (1089, 1024))
FEW_SHAPES = (SHAPES[0], SHAPES[3])


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)


def titok(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, residual, weight, bias, EPS)


def case(batch: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x (B, N, D), residual (B, N, D), weight (D,), bias (D,); all require gradients."""
    shapes = ((batch, tokens, width), (batch, tokens, width), (width,), (width,))
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def train(run: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor], grads: tuple[Tensor, Tensor]) -> Any:
    return torch.autograd.grad(run(*leaves), leaves, grads)


@pytest.mark.parametrize("run", [eager, titok])
@pytest.mark.benchmark(group="add_layer_norm")
def test_bench(benchmark: Any, run: Callable[..., Any]) -> None:
    with torch.no_grad():
        benchmark(run, *case(1, 289, 1024, torch.float32, "cpu"))


def parser() -> argparse.ArgumentParser:
    return op_parser(__doc__)


def main() -> None:
    arguments = parser().parse_args()
    report = OpReport("add_layer_norm", arguments)
    candidates: dict[str, Callable[..., Any]] = {"eager": eager, "titok": titok}
    if arguments.compile:
        candidates["compiled"] = torch.compile(eager, dynamic=False)
    for batch in arguments.batch:
        for tokens, width in FEW_SHAPES if arguments.few else SHAPES:
            leaves = case(batch, tokens, width, report.dtype, report.device)
            inputs, grads = [leaf.detach() for leaf in leaves], (torch.randn_like(leaves[0]),) * 2
            forward = {name: partial(run, *inputs) for name, run in candidates.items()}
            both = {name: partial(train, run, leaves, grads) for name, run in candidates.items()}
            directions = (("forward", forward, 4), ("forward+backward", both, 8))
            for direction, runs, tensors in directions[:1] if arguments.few else directions:
                sizes = {"direction": direction, "B": batch, "N": tokens, "D": width}
                count = leaves[0].numel()
                moved = tensors * count * leaves[0].element_size()
                with torch.set_grad_enabled(runs is both):
                    report.case(sizes, runs, num_bytes=moved, flops=2.0 * tensors * count)


if __name__ == "__main__":
    main()
