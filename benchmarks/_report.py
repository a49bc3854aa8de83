"""What the op benchmarks share: their options, the measured ceilings, and a table that sets every rate beside them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks._results import Results, quantiles, results_folder
from benchmarks._timing import interleave


def options(description: str | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    dtypes = ("float32", "bfloat16", "float16")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=dtypes)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=gpu, help="torch.compile as peer"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="append raw samples here (default with a GPU or $OUT: a file there)"
    )
    return parser.parse_args()


class Report:
    """One op's table, on the GPU where there is one. JSON lines go to results_folder() on a GPU or if `$OUT` is set."""

    def __init__(self, op: str, options: argparse.Namespace) -> None:
        self.op, self.options = op, options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        saved = self.device == "cuda" or os.environ.get("OUT")
        self.results = Results(options.json or (results_folder() / f"{op}.jsonl" if saved else None))
        self.copy_rate, self.product_rate = self._ceilings()
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"{op} {options.dtype} on {name}, torch {torch.__version__}; medians of interleaved runs")
        print(f"measured copy {self.copy_rate / 1e9:.0f} GB/s, product {self.product_rate / 1e12:.2f} TFLOP/s")

    def _ceilings(self) -> tuple[float, float]:
        """Bytes per second of a large copy (read + write) and FLOPs per second of a 4096^3 product."""
        source = torch.randn(1 << 26, device=self.device)
        target = torch.empty_like(source)
        square = source[: 1 << 24].view(4096, 4096).to(self.dtype)
        samples = interleave({"copy": lambda: target.copy_(source), "product": lambda: square @ square}, 2.0)
        copy, product = (quantiles(samples[name])[0] for name in ("copy", "product"))
        self.results.row("ceilings", {"dtype": self.options.dtype}, samples)
        return 2 * source.nbytes / copy, 2 * 4096**3 / product

    def case(
        self,
        case: Mapping[str, Any],
        candidates: Mapping[str, Callable[[], Any]],
        *,
        num_bytes: float,
        flops: float,
        ours: str = "titok",
    ) -> None:
        """Times the candidates in turns and prints a row for each.

        Args:
            num_bytes, flops: what one call has to move and to compute, whoever computes it.
        """
        samples = interleave(candidates, self.options.seconds)
        self.results.row(self.op, {**case, "dtype": self.options.dtype}, samples, num_bytes=num_bytes, flops=flops)
        label = " ".join(f"{key}={value}" for key, value in case.items())
        print(f"\n{label}: {num_bytes / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP, {len(samples[ours])} calls each")
        print(
            f"{'':12}{'ms':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'of copy':>9}{'TFLOP/s':>9}{'of product':>12}{ours:>8}"
        )
        reference = quantiles(samples[ours])[0]
        for name, times in samples.items():
            median, p20, p80 = quantiles(times)
            rate, speed = num_bytes / median, flops / median
            of_copy, of_product = rate / self.copy_rate, speed / self.product_rate
            times_ms = f"{median * 1e3:9.4f}{p20 * 1e3:9.4f}{p80 * 1e3:9.4f}"
            rates = f"{rate / 1e9:8.1f}{of_copy:9.0%}{speed / 1e12:9.2f}{of_product:12.0%}"
            print(f"{name:12}{times_ms}{rates}{median / reference:7.2f}x")
