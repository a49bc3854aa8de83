"""One timer for the benchmarks: candidates take turns in one process, and every sample is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # more than any L2 of today


def interleave(
    candidates: Mapping[str, Callable[[], Any]], seconds: float = 5.0, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call. Candidates run in turn, so that whatever else the machine does hits all alike.

    On a GPU each call starts with a cold L2 and is timed by events on the device: the write that empties the cache is
    still running while the call's kernels are being launched, so that launch latency does not count as kernel time.

    Args:
        candidates: name -> function without arguments; each is called once before the clock starts, unless `warm`.
        seconds: how long to go on taking turns; at least three rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    timed = _on_gpu() if torch.cuda.is_available() else _on_cpu
    for run in () if warm else candidates.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[next(iter(samples))]) < 3:
        for name, run in candidates.items():
            samples[name].append(timed(run))
    return samples


def _on_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def timed(run: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return timed
