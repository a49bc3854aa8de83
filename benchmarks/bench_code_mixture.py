"""`code_mixture` against softmax and product as separate ops: `python -m benchmarks.bench_code_mixture`.

Peers: "official" takes logits (B, K, P) and mixes along axis 1, as the official code does; "eager" takes logits
(B, P, K); "compiled" is the second under torch.compile. Bytes: logits, codebook and result once. FLOP: those of
the product, 2 M K C with M = B * P rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.op_report import OpReport, op_parser
from titok.ops import code_mixture

CODES, WIDTH = 1024, 256
PATCHES = (256, 1024)  # P at 256 and at 512 pixels


def official(logits: Tensor, codebook: Tensor) -> Tensor:
    return torch.einsum("bkp,kc->bcp", torch.softmax(logits, 1), codebook)


def eager(logits: Tensor, codebook: Tensor) -> Tensor:
    return torch.softmax(logits, -1) @ codebook


def case(batch: int, patches: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """logits (B, P, K), codebook (K, C)."""
    return (
        (3 * torch.randn(batch, patches, CODES, device=device)).to(dtype),
        torch.randn(CODES, WIDTH, device=device).to(dtype),
    )


@pytest.mark.parametrize("run", [eager, code_mixture], ids=["eager", "titok"])
@pytest.mark.benchmark(group="code_mixture")
def test_bench(benchmark: Any, run: Callable[..., Tensor]) -> None:
    benchmark(run, *case(1, 256, torch.float32, "cpu"))


def parser() -> argparse.ArgumentParser:
    return op_parser(__doc__)


def main() -> None:
    arguments = parser().parse_args()
    report = OpReport("code_mixture", arguments)
    compiled = torch.compile(eager, dynamic=False)
    for batch in arguments.batch:
        for patches in PATCHES:
            x, codebook = case(batch, patches, report.dtype, report.device)
            runs: dict[str, Callable[[], Any]] = {
                "official": partial(official, x.mT.contiguous(), codebook),
                "eager": partial(eager, x, codebook),
                "titok": partial(code_mixture, x, codebook),
            }
            if arguments.compile:
                runs["compiled"] = partial(compiled, x, codebook)
            rows = batch * patches
            num_bytes = x.element_size() * (rows * (CODES + WIDTH) + CODES * WIDTH)
            sizes = {"B": batch, "P": patches, "K": CODES, "C": WIDTH}
            with torch.inference_mode():
                report.case(sizes, runs, num_bytes=num_bytes, flops=2.0 * rows * CODES * WIDTH)


if __name__ == "__main__":
    main()
