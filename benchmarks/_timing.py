"""One timer for the benchmarks: candidates take turns in one process, and every sample is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleave(candidates: Mapping[str, Callable[[], Any]], seconds: float = 5.0) -> dict[str, list[float]]:
    """Seconds of each call. Candidates run in turn, so that whatever else the machine does hits all alike.

    Args:
        candidates: name -> function without arguments; each is called once before the clock starts.
        seconds: how long to go on taking turns; at least three rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[next(iter(samples))]) < 3:
        for name, run in candidates.items():
            start = _now()
            run()
            samples[name].append(_now() - start)
    return samples


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
