"""Where the benchmarks' numbers go: JSON lines with every raw sample, under a first line that names the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import titok
from titok.ops import backends

DEFAULT_FOLDER = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What a figure depends on: hardware, versions, commit, command."""
    cuda = torch.cuda.is_available()
    return {
        "kind": "environment",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)*results/*")
        ),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "titok": titok.__version__,
        "backends": backends(),
    }


def results_folder() -> Path:
    """`$OUT` where it is set, else benchmarks/results."""
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else DEFAULT_FOLDER


class Results:
    """Collects rows, and appends them as JSON lines to a file where one is named."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(path) if path else None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write(environment())

    def row(
        self, bench: str, case: Mapping[str, Any], samples: Mapping[str, Sequence[float]], **numbers: Any
    ) -> dict[str, Any]:
        """One measured case: `samples` in seconds by candidate; `numbers` such as bytes and FLOP of one call."""
        medians = {name: statistics.median(values) for name, values in samples.items()}
        row = {"kind": "row", "bench": bench, "case": dict(case), "median_s": medians, **numbers}
        return self.write({**row, "samples_s": {name: list(values) for name, values in samples.items()}})

    def note(self, text: str) -> None:
        """What a reader of the rows should know, such as what was left out and why."""
        self.write({"kind": "note", "text": text})

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile)."""
    ordered = sorted(samples)
    return (
        statistics.median(ordered),
        ordered[int(0.2 * len(ordered))],
        ordered[min(int(0.8 * len(ordered)), len(ordered) - 1)],
    )


def _git(*arguments: str) -> str | None:
    run = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return run.stdout.strip() if run.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} visible)" if names else platform.processor()


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
