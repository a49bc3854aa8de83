"""What a measurement depends on: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import titok
from titok.ops import backends

# Environment variables that change what is computed or how fast.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TITOK_BENCH",
    "TITOK_CPU_ISA",
    "TITOK_NVTX",
)
# A change of these files is no change of what is measured.
NOT_MEASURED = ("benchmarks/results", "docs", "*.md")


def environment() -> dict[str, Any]:
    """The first line of a run in a results file.

    `changed` is True when files under version control differ from the commit, results and documents aside.
    """
    cuda = torch.cuda.is_available()
    return {
        "kind": "environment",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("TITOK_COMMIT"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", *_excluded())),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "titok": titok.__version__,
        "backends": backends(),
    }


def _excluded() -> list[str]:
    return [f":(top,exclude){path}" for path in NOT_MEASURED]


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=folder)
    except OSError:  # no git on this machine
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} visible)" if names else platform.processor()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
