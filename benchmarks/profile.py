"""One region under the profiler: `python -m benchmarks.profile --target generate --preset titok-l-32`.

Warms up, then runs the target between cudaProfilerStart and cudaProfilerStop with our NVTX ranges on, and prints the
`nsys` and `ncu` command lines that record exactly that. Without a GPU it writes a Chrome trace of `torch.profiler` and
prints where the time went, by our ranges.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _tables
from benchmarks._sides import Models, _labels
from benchmarks.bench_models import train_step
from benchmarks.speedup import DTYPES
from titok import Pipeline, profiling, sample_tokens
from titok.config import GENERATOR_PRESETS

TARGETS = ("decode_step", "generate", "tokenize", "train_step")
_ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    p.add_argument("--target", required=True, choices=TARGETS)
    p.add_argument("--preset", default="titok-l-32", choices=list(GENERATOR_PRESETS))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--repeats", type=int, default=3, help="of the target in the profiled region")
    p.add_argument("--folder", type=Path, default=Path("runs/profile"), help="for traces and reports")
    return p


def target(name: str, models: Models, batch: int) -> Callable[[], Any]:
    """What is profiled, without arguments."""
    labels = _labels(batch)
    if name == "train_step":
        return train_step(models.tokenizer.config, batch, models.dtype, models.tokenizer.device.type)
    pipe = Pipeline(models.tokenizer, models.generator)
    tokenizer, generator = pipe.tokenizer, pipe.generator
    if name == "generate":
        return lambda: pipe(labels)
    if name == "tokenize":
        config = tokenizer.config
        images = torch.rand(batch, config.channels, *config.image_size, device=tokenizer.device)
        return torch.no_grad()(lambda: tokenizer.encode(images))
    # One step in the middle: half of the tokens known, both guidance passes.
    config_of_step = dataclasses.replace(generator.config.sampling, steps=1, guidance_schedule="constant")
    known = torch.zeros(batch, generator.config.num_latent_tokens, dtype=torch.int64, device=generator.device)
    known[:, ::2] = generator.mask_token
    return lambda: sample_tokens(generator, labels, config_of_step, init_tokens=known)


def kernel_names() -> list[str]:
    """Every GPU kernel of this repository, as its sources name it: what profilers show."""
    names = []
    for path in sorted((_ROOT / "kernels").glob("*.py")):
        functions = re.findall(r"^@triton\.jit\b.*\ndef (\w+)\(", path.read_text(), re.MULTILINE)
        names += [name for name in functions if name.startswith(path.stem)]  # the others are inlined into them
    for path in sorted((_ROOT / "csrc").glob("*.cu*")):
        names += re.findall(r"__global__[^;{]*?(\w+)\s*\([^()]*\)\s*{", path.read_text())
    return sorted(set(names))


def command_lines(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Tool -> its command line for this target."""
    ours = ["python", "-m", "benchmarks.profile"]
    for name in ("target", "preset", "dtype", "batch", "repeats"):
        ours += [f"--{name}", str(getattr(arguments, name))]
    report = str(arguments.folder / f"{arguments.target}-{arguments.preset}")
    kernels = "regex:^(" + "|".join(kernel_names()) + ")"
    systems = [
        "nsys",
        "profile",
        "--trace=cuda,nvtx,osrt",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
    ]
    compute = [
        "ncu",
        "--set=full",
        "--profile-from-start=off",
        "--nvtx",
        f"--nvtx-include={profiling.DOMAIN}@profiled/",
    ]
    return {
        "nsys": [*systems, "--cuda-graph-trace=node", "--force-overwrite=true", f"--output={report}", *ours],
        "ncu": [*compute, f"--kernel-name={kernels}", "--force-overwrite", f"--export={report}", *ours],
    }


def on_gpu(run: Callable[[], Any], repeats: int) -> None:
    runtime = torch.cuda.cudart()
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    with profiling.enabled(), profiling.annotate("profiled"):
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def on_cpu(run: Callable[[], Any], repeats: int, trace: Path) -> list[tuple[str, int, float, float]]:
    """Writes `trace`; returns ranges by time spent: (name, calls, seconds within, seconds outside inner ranges)."""
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
    prefix = f"{profiling.DOMAIN}: "
    spans = [(e.time_range.start, -e.time_range.end, e.name) for e in events if e.name.startswith(prefix)]
    totals: dict[str, list[float]] = {}
    stack: list[tuple[float, str]] = []  # of the ranges that are open: end, name
    for start, minus_end, name in sorted(spans):
        end, length = -minus_end, -minus_end - start
        name = re.sub(r" \d+$", "", name.removeprefix(prefix))  # all steps in one row
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
        cells = []
        ranges = on_cpu(run, arguments.repeats, trace)
        whole = sum(own for *_, own in ranges)
        for name, calls, within, own in ranges:
            cells.append([name, str(calls), f"{1e3 * within:.2f}", f"{1e3 * own:.2f}", f"{own / whole:.1%}"])
        _tables.show(["range", "calls", "ms in all", "ms of its own", "share"], cells)
        print(f"trace: {trace} (open it in https://ui.perfetto.dev or chrome://tracing)")
    print("on a machine with a GPU, recorded by Nsight:")
    for line in command_lines(arguments).values():
        print(f"  {shlex.join(line)}")


if __name__ == "__main__":
    main()
