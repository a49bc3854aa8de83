"""The parts of `benchmarks.gpu`, in order of importance: what each command runs, and its share of the time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

OPS = (
    "nearest_codebook",
    "masked_attention",
    "code_mixture",
    "group_norm_silu",
    "add_layer_norm",
    "maskgit_decode_step",
)
TITOK_BATCHES = "1,64"  # on an H200, 128 images at once gained less than 1%
TUNED_KERNELS = 3
# Tests of the decoding step: the kernel whose bits are promised.
DECODE_TESTS = ("tests/ops/test_maskgit_decode_gpu.py", "tests/ops/test_maskgit_decode_triton.py")
SMALL_CASES = "tests/gpu/test_gpu_small_cases.py"


class Context(NamedTuple):
    """What the commands of a run have in common.

    Attributes:
        results: the results file, to which every command appends.
        dry: True where nothing is computed: benchmarks only check their arguments, and tests are only collected.
        python: the interpreter.
    """

    results: Path
    dry: bool = False
    python: str = sys.executable

    def module(self, name: str, *arguments: str) -> list[str]:
        """The command line of a benchmark."""
        checked = ["benchmarks.harness.dry_run", name] if self.dry else [name]
        return [self.python, "-m", *checked, *arguments]

    def tests(self, name: str, *arguments: str, workers: int = 8) -> list[str]:
        """The command line of a run of pytest, which writes a line for each test."""
        pytest = [
            self.python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "benchmarks.harness.pytest_lines",
        ]
        lines = ["--lines", str(self.results), "--lines-of", name, "--continue-on-collection-errors"]
        if self.dry:
            return [*pytest, "--collect-only", *lines, *arguments]
        return [*pytest, *lines, *(["-n", str(workers), "--dist", "worksteal"] if workers else []), *arguments]


class LeftOut(Exception):
    """Why a command is not run. That is no failure."""


class Command(NamedTuple):
    """One command of a part.

    Attributes:
        name: in the table of what was run.
        weight: the command's share of the time that is left, relative to those after it.
        line: (context, seconds) -> the command line, or raises `LeftOut`; called when the command's turn has come.
        environment: variables for it.
        least: seconds below which it is not started.
    """

    name: str
    weight: float
    line: Callable[[Context, float], list[str]]
    environment: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple has no mutable class state)
    least: float = 10.0


class Part(NamedTuple):
    """Commands that belong together."""

    title: str
    commands: tuple[Command, ...]


def limit_within(seconds: float) -> str:
    """The time limit that a command is told, so that it ends by itself before it is stopped."""
    return f"{max(1.0, seconds - max(3.0, 0.08 * seconds)):.0f}"


# ---------------------------------------------------------------------------------------------------------------
# 1 and 4: tests


def _decode_tests(context: Context, seconds: float) -> list[str]:
    return context.tests("decode step", *DECODE_TESTS)


def _gpu_tests(context: Context, seconds: float) -> list[str]:
    ignored = [f"--ignore={path}" for path in DECODE_TESTS]
    return context.tests("GPU tests", "-m", "gpu", *ignored, "tests")


def _triton_tests(context: Context, seconds: float) -> list[str]:
    ignored = [f"--ignore={path}" for path in DECODE_TESTS]
    return context.tests("Triton kernels at odd shapes", "-m", "not gpu", "-k", "triton", *ignored, "tests/ops")


def _sanitizer(tool: str) -> Command:
    """The small cases under a tool of compute-sanitizer, in one process."""

    def line(context: Context, seconds: float) -> list[str]:
        tests = context.tests(tool, "-m", "gpu", SMALL_CASES, workers=0)
        if context.dry:
            return tests
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            raise LeftOut("compute-sanitizer is not installed")
        return [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests]

    # PyTorch's allocator gives out parts of larger blocks, in which an access past the end of a tensor is no error.
    return Command(tool, 6, line, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


# ---------------------------------------------------------------------------------------------------------------
# 2, 3 and 5: benchmarks


def _headline(preset: str, resolution: int) -> Callable[[Context, float], list[str]]:
    def line(context: Context, seconds: float) -> list[str]:
        return context.module(
            "benchmarks.speedup", "--device", "cuda", "--dtype", "bf16", "--resolution", str(resolution),
            "--rows", f"={preset},compiled,as published", "--batches", TITOK_BATCHES, "--seconds", "6",
            "--limit", limit_within(seconds), "--out", str(context.results),
        )  # fmt: skip

    return line


def _latency(context: Context, seconds: float) -> list[str]:
    return context.module(
        "benchmarks.engine", "--device", "cuda", "--preset", "titok-l-32", "--rows", "titok", "--batch", "1",
        "--seconds", "3", "--out", str(context.results),
    )  # fmt: skip


def _op(name: str) -> Command:
    def line(context: Context, seconds: float) -> list[str]:
        arguments = ["--few", "--batch", "1", "64", "--seconds", "0.4", "--json", str(context.results)]
        return context.module(f"benchmarks.bench_{name}", *arguments)

    return Command(
        name, 4 if name in ("masked_attention", "group_norm_silu") else 2, line
    )  # these have most cases


def _ladder(context: Context, seconds: float) -> list[str]:
    return context.module(
        "benchmarks.speedup", "--device", "cuda", "--dtype", "bf16", "--ladder", "titok-l-32", "--batches", "32",
        "--seconds", "5", "--limit", limit_within(seconds), "--out", str(context.results),
    )  # fmt: skip


def _roofline(preset: str, batch: int) -> Callable[[Context, float], list[str]]:
    def line(context: Context, seconds: float) -> list[str]:
        return context.module(
            "benchmarks.roofline", "--device", "cuda", "--preset", preset, "--batch", str(batch), "--seconds", "5",
            "--out", str(context.results),
        )  # fmt: skip

    return line


# ---------------------------------------------------------------------------------------------------------------
# 6: the slowest kernels, and choices that are off


def _kernel_times(context: Context, seconds: float) -> list[str]:
    return context.module(
        "benchmarks.kernel_times", "--preset", "titok-l-64-512", "--batch", "64", "--out", str(context.results)
    )


def slowest_kernels(results: Path, count: int) -> list[str]:
    """The kernels of titok that took longest in the last row of "kernel_times", the slowest first.

    Raises:
        LeftOut: the file has no such row, or the row no such kernel.
    """
    rows = []
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # cut off
        if record.get("bench") == "kernel_times":
            rows.append(record)
    ours: dict[str, Any] = rows[-1]["ours"] if rows else {}
    if not ours:
        raise LeftOut("the kernels' times were not measured in this run")
    return sorted(ours, key=lambda name: -float(ours[name]["seconds"]))[:count]


def _tuning(context: Context, seconds: float) -> list[str]:
    kernels = (
        ["masked_attention_forward_tiled"] if context.dry else slowest_kernels(context.results, TUNED_KERNELS)
    )
    return context.module(
        "benchmarks.tune", *kernels, "--limit", limit_within(seconds), "--json", str(context.results)
    )


def _choices(context: Context, seconds: float) -> list[str]:
    return context.module("benchmarks.choices", "--limit", limit_within(seconds), "--json", str(context.results))


def _ncu(context: Context, seconds: float) -> list[str]:
    target = [
        "--target", "generate", "--preset", "titok-l-64-512", "--batch", "64", "--repeats", "1", "--device", "cuda",
    ]  # fmt: skip
    profiled = context.module("benchmarks.profile", *target)
    if context.dry:
        return profiled
    ncu = shutil.which("ncu")
    if ncu is None:
        raise LeftOut("ncu is not installed")
    kernels = "|".join(slowest_kernels(context.results, TUNED_KERNELS))
    return [
        ncu, "--set", "basic", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "24",
        "--kernel-name", f"regex:^({kernels})$", *profiled,
    ]  # fmt: skip


PARTS: dict[int, Part] = {
    1: Part(
        "GPU tests",
        (
            Command("tests of the decode step", 8, _decode_tests),
            Command("tests marked gpu", 14, _gpu_tests),
            Command("tests of Triton kernels", 8, _triton_tests),
        ),
    ),
    2: Part(
        "TiTok against DiT",
        (
            Command("TiTok-L-64 and DiT at 512 px", 16, _headline("titok-l-64-512", 512)),
            Command("TiTok-L-32 and DiT at 256 px", 12, _headline("titok-l-32", 256)),
            Command("TiTok-L-32 at batch 1", 3, _latency),
        ),
    ),
    3: Part("ops against their peers", tuple(_op(name) for name in OPS)),
    4: Part("compute-sanitizer", (_sanitizer("memcheck"), _sanitizer("racecheck"))),
    5: Part(
        "ladder and roofline",
        (
            Command("ladder of TiTok-L-32", 5, _ladder),
            Command("roofline of TiTok-L-64", 2, _roofline("titok-l-64-512", 64)),
            Command("roofline of TiTok-L-32", 2, _roofline("titok-l-32", 128)),
        ),
    ),
    6: Part(
        "the slowest kernels, and choices that are off",
        (
            # CUPTI, which the profiler uses, is not to be unloaded while graphs are replayed.
            Command(
                "times of all kernels", 3, _kernel_times, {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
            ),
            Command("tuning", 6, _tuning),
            Command("choices that are off by default", 4, _choices),
            Command("ncu", 2, _ncu),
        ),
    ),
}
