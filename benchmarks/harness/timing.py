"""One timer for all benchmarks: the candidates take turns in one process, and every sample is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # written before each timed call on a GPU; larger than the L2 cache of any current GPU
LAUNCH_CYCLES = 2_000_000  # of the GPU's clock: about a millisecond, in which the host launches tens of kernels


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    seconds: float = 5.0,
    *,
    warm: bool = False,
    hide_launches: bool = False,
) -> dict[str, list[float]]:
    """Times the candidates in turns, so that a change in the machine's speed affects all of them alike.

    On a GPU each call starts with a cold L2 cache and is timed by CUDA events.

    Args:
        candidates: name -> function without arguments.
        seconds: how long to continue; at least three rounds are made.
        warm: skip the one call of every candidate that otherwise precedes the first round.
        hide_launches: on a GPU, let the GPU wait before each call for as long as the host needs to launch the call's
            kernels, so that the time is that of the kernels. For single ops.

    Returns:
        name -> seconds of each call.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    timed = _gpu_timer(hide_launches) if torch.cuda.is_available() else time_on_cpu
    if not warm:
        for run in candidates.values():
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[next(iter(samples))]) < 3:
        for name, run in candidates.items():
            samples[name].append(timed(run))
    return samples


def time_on_cpu(run: Callable[[], Any]) -> float:
    """Seconds of one call by the host's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_once(run: Callable[[], Any]) -> float:
    """Seconds of one call by the host's clock, until the GPU (if there is one) has finished."""
    if not torch.cuda.is_available():
        return time_on_cpu(run)

    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return time_on_cpu(synchronised)


def _gpu_timer(hide_launches: bool) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def timed(run: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        if hide_launches:
            torch.cuda._sleep(LAUNCH_CYCLES)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return timed
