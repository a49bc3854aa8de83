"""Peak memory of a piece of work: of the GPU, or of this process on Linux."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_growth(run: Callable[[], Any], device: str) -> int | None:
    """Calls `run` once and returns the bytes by which memory in use grew at most; None where that is not known.

    On a CPU memory in use is the resident set of this process, which only Linux reports.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set
        before = status_bytes("VmRSS")
    except (OSError, KeyError):
        run()
        return None
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status in bytes: "VmRSS" is the resident set of this process, "VmHWM" its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[name].split()[0]) * 1024
