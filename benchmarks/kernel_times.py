"""The time of every GPU kernel in one call of the pipeline: `python -m benchmarks.kernel_times --preset titok-l-32`.

The profiler of PyTorch records the kernels of some calls that replay a captured graph. The table shows those that take
longest; the results file has all of them, and under "ours" those of this repository.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch

from benchmarks.harness import tables
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, add_preset, command_parser, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import class_labels
from benchmarks.profile import kernel_names
from titok import Pipeline

SHOWN = 25
Times = dict[str, dict[str, float]]  # name -> "calls" and "seconds", of one call of the pipeline


def parser() -> argparse.ArgumentParser:
    p = command_parser("kernel_times", __doc__)
    add_preset(p)
    p.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    p.add_argument("--calls", type=int, default=3, help="calls that are profiled (default: %(default)s)")
    add_out(p)
    return p


def kernel_times(events: Any, calls: int) -> Times:
    """Kernel -> its calls and seconds in one of `calls` calls, from the events of a profile."""
    found: Times = defaultdict(lambda: {"calls": 0.0, "seconds": 0.0})
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[event.name]["calls"] += 1 / calls
            found[event.name]["seconds"] += event.time_range.elapsed_us() / 1e6 / calls
    return dict(found)


def ours(times: Times) -> Times:
    """The kernels of this repository, by their name in the sources."""
    found: Times = {}
    for name in kernel_names():
        same = [value for shown, value in times.items() if name in shown]
        if same:
            found[name] = {key: sum(value[key] for value in same) for key in ("calls", "seconds")}
    return found


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = start(arguments)
    models = Models(arguments.preset, DTYPES[arguments.dtype], arguments.device)
    pipe, labels = Pipeline(models.tokenizer, models.generator), class_labels(arguments.batch)
    for _ in range(2):
        pipe(labels)
    with torch.profiler.profile() as profile:
        for _ in range(arguments.calls):
            pipe(labels)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
    times = kernel_times(profile.events(), arguments.calls)
    case = {name: getattr(arguments, name) for name in ("preset", "dtype", "device", "batch")}
    row = Results(path).row("kernel_times", case, {}, kernels=times, ours=ours(times))
    tables.show(*tables.kernel_table(row, SHOWN), tables.describe(row))
    print(f"all kernels of one call: {path}")


if __name__ == "__main__":
    main()
