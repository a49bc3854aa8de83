"""What the op benchmarks share: options, measured ceilings, and a table with every rate beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness.checks import Checked
from benchmarks.harness.compiled import compiled_parts
from benchmarks.harness.conditions import disturbances
from benchmarks.harness.results import FOLDER, Results, quantiles
from benchmarks.harness.timing import Candidate, interleave, measure


def op_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of an op benchmark."""
    gpu = torch.cuda.is_available()
    dtypes = ("float32", "bfloat16", "float16")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=dtypes)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="batch sizes (default: 1 8 64)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=gpu,
        help="also time the eager expression under torch.compile; slow to compile (default: on a GPU)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="results file to append to (default: on a GPU benchmarks/results/<op>.jsonl, on a CPU none)",
    )
    parser.add_argument(
        "--few", action="store_true", help="only the shapes of the presets that matter most, and only forward"
    )
    return parser


class OpReport:
    """Measures one op on the GPU, or on the CPU where there is none, and prints its table as it grows."""

    def __init__(self, op: str, options: argparse.Namespace) -> None:
        self.op, self.options = op, options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        default = FOLDER / f"{op}.jsonl" if self.device == "cuda" else None
        self.results = Results(options.json or default)
        self.copy_rate, self.product_rate = self._ceilings()
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"{op} {options.dtype} on {name}, torch {torch.__version__}; medians of interleaved runs")
        print(f"measured copy {self.copy_rate / 1e9:.0f} GB/s, product {self.product_rate / 1e12:.2f} TFLOP/s")

    def _ceilings(self) -> tuple[float, float]:
        """Bytes per second of a large copy (read plus written), and FLOP per second of a 4096^3 product."""
        source = torch.randn(1 << 26, device=self.device)
        target = torch.empty_like(source)
        square = source[: 1 << 24].view(4096, 4096).to(self.dtype)
        samples = interleave({"copy": lambda: target.copy_(source), "product": lambda: square @ square}, 2.0)
        copy, product = (quantiles(samples[name])[0] for name in ("copy", "product"))
        work = {"copy": 2.0 * source.nbytes, "product": 2.0 * 4096**3}
        self.results.row("ceilings", {"dtype": self.options.dtype}, samples, work=work)
        return work["copy"] / copy, work["product"] / product

    def case(
        self,
        case: Mapping[str, Any],
        candidates: Mapping[str, Candidate],
        *,
        num_bytes: float,
        flops: float,
        ours: str = "titok",
    ) -> None:
        """Times the candidates in turns, writes their samples, and prints a line for each.

        "compiled" is compiled anew, because PyTorch runs a function uncompiled after a number of recompilations. It is
        left out where it does not run compiled.

        Args:
            case: sizes, as the results file and the table name them.
            candidates: name -> what is timed, a `Checked` or a function without arguments.
            num_bytes: bytes that one call has to read and write, whoever computes it.
            flops: FLOP of one call, whoever computes it.
            ours: the candidate that the last column compares the others with.
        """
        if "compiled" in candidates:
            torch.compiler.reset()
            candidates["compiled"]()
            if not compiled_parts(candidates["compiled"]):
                candidates = {name: run for name, run in candidates.items() if name != "compiled"}
                self.results.note(f"{self.op} {dict(case)}: the compiled peer ran uncompiled and is left out")
        measured = measure(candidates, self.options.seconds, hide_launches=True)
        samples = measured.samples
        for name, problem in measured.problems.items():
            print(f"{name} was not timed: {problem}")
            self.results.note(f"{self.op} {dict(case)}: {name} was not timed: {problem}")
        if ours not in samples:
            return
        about = {"checked": measured.checked, "conditions": measured.conditions}
        self.results.row(
            self.op, {**case, "dtype": self.options.dtype}, samples, num_bytes=num_bytes, flops=flops, **about
        )
        label = " ".join(f"{key}={value}" for key, value in case.items())
        print(f"\n{label}: {num_bytes / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP, {len(samples[ours])} calls each")
        header = f"{'':12}{'ms':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'of copy':>9}{'TFLOP/s':>9}{'of product':>12}"
        print(f"{header}{ours:>8}")
        reference = quantiles(samples[ours])[0]
        for disturbance in disturbances(measured.conditions):
            print(f"disturbed: {disturbance}")
        for name, times in samples.items():
            median, p20, p80 = quantiles(times)
            rate, speed = num_bytes / median, flops / median
            of_copy, of_product = rate / self.copy_rate, speed / self.product_rate
            times_ms = f"{median * 1e3:9.4f}{p20 * 1e3:9.4f}{p80 * 1e3:9.4f}"
            rates = f"{rate / 1e9:8.1f}{of_copy:9.0%}{speed / 1e12:9.2f}{of_product:12.0%}"
            print(f"{name:12}{times_ms}{rates}{median / reference:7.2f}x")


def checked(
    runs: Mapping[str, Callable[..., Any]], inputs: Callable[[int], tuple[Any, ...]], plain: str, **options: Any
) -> dict[str, Candidate]:
    """Candidates with the same inputs, whose results are compared with those of the one that is called `plain`."""
    expected = runs[plain]
    return {name: Checked(run, inputs, expected, **options) for name, run in runs.items()}
