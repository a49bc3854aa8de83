"""One region under the profiler: `python -m benchmarks.profile --target generate --preset titok-l-32`.

On a GPU the target is warmed up, then run between cudaProfilerStart and cudaProfilerStop with titok's NVTX ranges
on. On a CPU the command writes a Chrome trace of `torch.profiler` and prints how much time went into each range.
It also prints the `nsys` and `ncu` command lines that record this region on a machine with a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import tables
from benchmarks.harness.models import Models, half_masked, middle_step, train_step
from benchmarks.harness.options import DTYPES, add_preset, command_parser
from benchmarks.harness.sides import class_labels
from titok import Pipeline, profiling, sample_tokens

TARGETS = ("decode_step", "generate", "tokenize", "train_step")
ROOT = Path(__file__).parents[1]


def parser() -> argparse.ArgumentParser:
    p = command_parser("profile", __doc__)
    p.add_argument("--target", required=True, choices=TARGETS)
    add_preset(p)
    p.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    p.add_argument("--repeats", type=int, default=3, help="calls in the profiled region (default: %(default)s)")
    p.add_argument(
        "--folder", type=Path, default=Path("runs/profile"), help="for traces and reports (default: %(default)s)"
    )
    return p


def target(name: str, models: Models, batch: int) -> Callable[[], Any]:
    """The function that is profiled; it takes no arguments."""
    if name == "train_step":
        return train_step(models.generator, batch)
    labels, pipe = class_labels(batch), Pipeline(models.tokenizer, models.generator)
    tokenizer, generator = pipe.tokenizer, pipe.generator
    if name == "generate":
        return lambda: pipe(labels)
    if name == "tokenize":
        config = tokenizer.config
        images = torch.rand(batch, config.channels, *config.image_size, device=tokenizer.device)
        return torch.no_grad()(lambda: tokenizer.encode(images))
    step, tokens = middle_step(generator.config.sampling), half_masked(generator).repeat(batch, 1)
    return lambda: sample_tokens(generator, labels, step, init_tokens=tokens)


def kernel_names() -> list[str]:
    """The names of this repository's GPU kernels as profilers show them, read from the sources."""
    names = []
    paths = list((ROOT / "kernels").glob("*.py"))
    modules = tuple(path.stem for path in paths if not path.stem.startswith("_"))
    for path in paths:
        functions = re.findall(r"^@triton\.jit\b.*\ndef (\w+)\(", path.read_text(), re.MULTILINE)
        names += [name for name in functions if name.startswith(modules)]  # the others are inlined into these
    for path in (ROOT / "csrc").rglob("*.cu*"):
        names += re.findall(r"__global__[^;{]*?(\w+)\s*\([^()]*\)\s*{", path.read_text())
    return sorted(set(names))


def command_lines(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Profiler -> the command line that records this target with it."""
    profiled = ["python", "-m", "benchmarks.profile"]
    for name in ("target", "preset", "dtype", "batch", "repeats"):
        profiled += [f"--{name}", str(getattr(arguments, name))]
    # Without the package nvtx, PyTorch's ranges have no domain: see `titok.profiling.NVTX`.
    has_domains = importlib.util.find_spec("nvtx") is not None
    measured = f"{profiling.DOMAIN}@profiled/" if has_domains else f"{profiling.DOMAIN}: profiled/"
    report = str(arguments.folder / f"{arguments.target}-{arguments.preset}")
    nsys = [
        "nsys",
        "profile",
        "--trace=cuda,nvtx,osrt",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--cuda-graph-trace=node",
        "--force-overwrite=true",
        f"--output={report}",
    ]
    ncu = [
        "ncu",
        "--set=full",
        "--profile-from-start=off",
        "--nvtx",
        f"--nvtx-include={measured}",
        f"--kernel-name=regex:^({'|'.join(kernel_names())})",
        "--force-overwrite",
        f"--export={report}",
    ]
    return {"nsys": [*nsys, *profiled], "ncu": [*ncu, *profiled]}


def on_gpu(run: Callable[[], Any], repeats: int) -> None:
    """Runs the target between cudaProfilerStart and cudaProfilerStop, with NVTX ranges."""
    runtime = torch.cuda.cudart()
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    with profiling.enabled(), profiling.annotate("profiled"):
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def on_cpu(run: Callable[[], Any], repeats: int, trace: Path) -> list[tuple[str, int, float, float]]:
    """Runs the target under `torch.profiler`, writes `trace`, and returns what `by_range` makes of it."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        profiling.enabled(profiling.TorchProfiler()),
        profiling.annotate("profiled"),
    ):
        for _ in range(repeats):
            run()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(trace))
    return by_range(profile.events())


def by_range(events: Any) -> list[tuple[str, int, float, float]]:
    """(name, calls, seconds, seconds outside inner ranges) of each of titok's ranges, by the last of them."""
    prefix = f"{profiling.DOMAIN}: "
    spans = [(e.time_range.start, -e.time_range.end, e.name) for e in events if e.name.startswith(prefix)]
    totals: dict[str, list[float]] = {}
    stack: list[tuple[float, str]] = []  # (end, name) of the ranges that are open
    for start, minus_end, name in sorted(spans):
        end, length = -minus_end, -minus_end - start
        name = re.sub(r" \d+$", "", name.removeprefix(prefix))  # "step 0", "step 1" ... become one row
        while stack and stack[-1][0] <= start:
            stack.pop()
        row = totals.setdefault(name, [0, 0.0, 0.0])
        row[0] += 1
        row[2] += length
        if stack:
            totals[stack[-1][1]][2] -= length
        if all(outer != name for _, outer in stack):
            row[1] += length
        stack.append((end, name))
    found = [(name, int(calls), within / 1e6, own / 1e6) for name, (calls, within, own) in totals.items()]
    return sorted(found, key=lambda row: -row[3])


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    torch.manual_seed(0)
    models = Models(arguments.preset, DTYPES[arguments.dtype], arguments.device)
    run = target(arguments.target, models, arguments.batch)
    for _ in range(2):
        run()
    if arguments.device == "cuda":
        on_gpu(run, arguments.repeats)
    else:
        trace = arguments.folder / f"{arguments.target}-{arguments.preset}.json"
        ranges = on_cpu(run, arguments.repeats, trace)
        total = sum(own for *_, own in ranges)
        lines = [
            [name, str(calls), f"{1e3 * within:.2f}", f"{1e3 * own:.2f}", f"{own / total:.1%}"]
            for name, calls, within, own in ranges
        ]
        tables.show(["range", "calls", "ms in all", "ms of its own", "share"], lines)
        print(f"trace: {trace} (open it in https://ui.perfetto.dev or chrome://tracing)")
    print("to record this region with Nsight on a machine with a GPU:")
    for line in command_lines(arguments).values():
        print(f"  {shlex.join(line)}")


if __name__ == "__main__":
    main()
