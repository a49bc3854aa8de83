"""Measures what is off until a GPU has shown it to be faster: `python -m benchmarks.choices --limit 120`.

- Linear layers of transformer blocks, with GELU, or with the residual sum and its norm, in one launch. A layer that is
  faster so at the batch sizes that matter belongs into `LINEAR_GELU_LAYERS` or `LINEAR_ADD_NORM_LAYERS` of
  `titok/inference/fused_linear.py`.
- `Pipeline.generate_many` with `decode_batch_size`: the tokens of a batch beside the pictures of the one before.

The rows are of the kind that `benchmarks.tune` writes: the first candidate of each is what titok does by default.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import tables
from benchmarks.harness.models import Models
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from benchmarks.tune import CURRENT, bf16
from titok import Pipeline
from titok.inference import fused_linear
from titok.ops import layer_norm_of_sum

# (K, N) of fc1, and of the layers before a residual sum, in the generator and in the ViT decoder of TiTok-L-64
GELU_LAYERS = ((768, 3072), (1024, 4096))
ADD_NORM_LAYERS = ((768, 768), (3072, 768), (1024, 1024), (4096, 1024))
ROWS = (130, 8320)  # guided passes of one sample and of 64 samples of 65 tokens
# batch_size and decode_batch_size of `generate_many`; None decodes after the tokens of the same batch
STAGES = ((64, None), (64, 64), (128, 64), (192, 64))
FEW_STAGES = ((1, None), (1, 1))
SECONDS = 0.5  # a layer
Runs = dict[str, Callable[[], Any]]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.choices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--preset", default="titok-l-64-512", help="of the pictures (default: %(default)s)")
    p.add_argument("--limit", type=float, default=300.0, help="seconds for everything (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="results file to append to (default: none)")
    return p


@contextlib.contextmanager
def chosen(constant: str, layers: Any) -> Iterator[None]:
    """Within, these layers are computed in one launch."""
    before = getattr(fused_linear, constant)
    setattr(fused_linear, constant, layers)
    try:
        yield
    finally:
        setattr(fused_linear, constant, before)


def gelu_layers(device: str) -> Iterator[tuple[str, Runs]]:
    """fc1 with its GELU: PyTorch's two launches, and one."""
    for K, N in GELU_LAYERS:
        for rows in ROWS:
            x, weight, bias = bf16(device, rows, K), bf16(device, N, K), bf16(device, N)

            def fused(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Any:
                with chosen("LINEAR_GELU_LAYERS", dict.fromkeys(GELU_LAYERS, 1 << 30)):
                    return fused_linear.gelu(x, weight, bias)

            def separate(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Any:
                return F.gelu(F.linear(x, weight, bias))

            yield f"M={rows} K={K} N={N}", {CURRENT: separate, "one launch": fused}


def add_norm_layers(device: str) -> Iterator[tuple[str, Runs]]:
    """The layers before a residual sum and its norm: two launches, and one."""
    zeros = torch.zeros(1 << 16, dtype=torch.int32, device=device)
    for K, N in ADD_NORM_LAYERS:
        for rows in ROWS:
            x, residual = bf16(device, rows, K), bf16(device, rows, N)
            layer = (bf16(device, N, K), bf16(device, N))
            norm = (bf16(device, N), bf16(device, N), 1e-6)

            def fused(x: Tensor = x, residual: Tensor = residual, layer: Any = layer, norm: Any = norm) -> Any:
                with (
                    chosen("LINEAR_ADD_NORM_LAYERS", frozenset(ADD_NORM_LAYERS)),
                    fused_linear.counters(zeros),
                ):
                    weight, bias = layer
                    return fused_linear.add_norm(x, weight, bias, residual, *norm)

            def separate(x: Tensor = x, residual: Tensor = residual, layer: Any = layer, norm: Any = norm) -> Any:
                return layer_norm_of_sum(residual, F.linear(x, *layer), *norm)

            yield f"M={rows} K={K} N={N}", {CURRENT: separate, "one launch": fused}


def stages(pipe: Pipeline, sizes: tuple[tuple[int, int | None], ...], pictures: int) -> Runs:
    """`generate_many` of so many pictures with each pair of sizes."""

    def run(batch_size: int, decode_batch_size: int | None) -> None:
        labels = [i % 1000 for i in range(pictures)]
        options: dict[str, Any] = {"batch_size": batch_size, "decode_batch_size": decode_batch_size}
        for _ in pipe.generate_many(labels, **options):
            pass

    names = [f"tokens of {size}, pictures of {at_once}" for size, at_once in sizes]
    return {
        CURRENT if at_once is None else name: partial(run, size, at_once)
        for name, (size, at_once) in zip(names, sizes, strict=True)
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.choices: no CUDA device here")
    end, results = time.monotonic() + arguments.limit, Results(arguments.json)

    def measure(kernel: str, constant: str, shape: str, runs: Runs, seconds: float, **options: bool) -> None:
        if time.monotonic() > end:
            print(f"{kernel} {shape}: no time left")
            return
        samples = interleave(runs, seconds, **options)
        row = results.row("tuning", {"kernel": kernel, "constant": constant, "shape": shape}, samples)
        tables.show(*tables.tuning_table([row]))

    with torch.no_grad():
        for shape, runs in gelu_layers("cuda"):
            measure("linear_gelu", "LINEAR_GELU_LAYERS", shape, runs, SECONDS, hide_launches=True)
        for shape, runs in add_norm_layers("cuda"):
            measure("linear_add_norm", "LINEAR_ADD_NORM_LAYERS", shape, runs, SECONDS, hide_launches=True)
    models = Models(arguments.preset, torch.bfloat16, "cuda")
    pipe = Pipeline(models.tokenizer, models.generator)
    for sizes, pictures in ((FEW_STAGES, 8), (STAGES, 384)):
        shape = f"{arguments.preset} {pictures} pictures"
        runs = stages(pipe, sizes, pictures)
        measure("generate_many", "decode_batch_size", shape, runs, max(1.0, (end - time.monotonic()) / 3))


if __name__ == "__main__":
    main()
