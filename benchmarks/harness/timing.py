"""One timer for all benchmarks: the candidates take turns in one process, and every sample is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.checks import Checked, NotTensors, keeps_result, problem, snapshot
from benchmarks.harness.conditions import Watch, nvml
from benchmarks.harness.results import TARGET_ERROR, median_error

FLUSH_BYTES = 256 << 20  # written before each timed call on a GPU; larger than the L2 cache of any current GPU
LAUNCH_CYCLES = 2_000_000  # of the GPU's clock: about a millisecond, in which the host launches tens of kernels
ROUNDS_BEFORE_TARGET = 10  # fewer samples say too little about their own spread
# A call's work counts as hidden if the GPU goes on for longer than this after the clock has stopped.
HIDDEN_SHARE, HIDDEN_SECONDS = 0.1, 1e-3

Candidate = Callable[[], Any] | Checked


@dataclass
class Measured:
    """What `measure` found.

    Attributes:
        samples: candidate -> seconds of each call. A candidate whose check failed has none and is left out.
        problems: candidate -> what is wrong with its results.
        rejected: the samples of the candidates with problems, which no table may show.
        checked: the candidates whose results were compared with the plain path and are right.
        conditions: what the machine was doing: `benchmarks.harness.conditions.Watch.result`.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, list[float]] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)


class CpuTimer:
    """Times calls by the host's clock."""

    def time(self, run: Callable[..., Any], arguments: Sequence[Any]) -> tuple[float, Any]:
        """Seconds of one call, and what it returned."""
        start = time.perf_counter()
        result = run(*arguments)
        return time.perf_counter() - start, result

    def hidden(self) -> float:
        """Seconds of work after the clock has stopped: none, because a call on a CPU has ended then."""
        return 0.0


class GpuTimer:
    """Times calls by CUDA events on the current stream, each with a cold L2 cache.

    Args:
        hide_launches: let the GPU wait before each call for as long as the host needs to launch the call's kernels.
        cuda: `torch.cuda`, or what stands in for it in a test.
        flush: overwrites the L2 cache; None makes a function that does.
    """

    def __init__(
        self, hide_launches: bool, cuda: Any = torch.cuda, flush: Callable[[], Any] | None = None
    ) -> None:
        self.hide_launches, self.cuda = hide_launches, cuda
        self.flush = flush or torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_

    def time(self, run: Callable[..., Any], arguments: Sequence[Any]) -> tuple[float, Any]:
        """Seconds of one call, and what it returned."""
        start, stop = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        if self.hide_launches:
            self.cuda._sleep(LAUNCH_CYCLES)
        start.record()
        result = run(*arguments)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3, result

    def hidden(self) -> float:
        """Seconds for which the GPU goes on working on any stream after the clock has stopped."""
        start = time.perf_counter()
        self.cuda.synchronize()
        return time.perf_counter() - start


def measure(
    candidates: Mapping[str, Candidate],
    seconds: float = 5.0,
    *,
    warm: bool = False,
    hide_launches: bool = False,
    rounds: int = 3,
    after_call: Callable[[], Any] = lambda: None,
    timer: CpuTimer | GpuTimer | None = None,
) -> Measured:
    """Times the candidates in turns, so that a change in the machine's speed affects all of them alike.

    Rounds go on until the standard error of every candidate's median is below 1%, or the time is up. On a GPU each
    call starts with a cold L2 cache and is timed by CUDA events. Every call of a `Checked` candidate has inputs of its
    own; after the last round some of the results are compared with the plain path.

    Args:
        candidates: name -> a `Checked`, or a function without arguments, whose results are not looked at.
        seconds: how long to continue at most.
        warm: skip the one call of every candidate that otherwise precedes the first round.
        hide_launches: on a GPU, let the GPU wait before each call for as long as the host needs to launch the call's
            kernels, so that the time is that of the kernels. For single ops.
        rounds: how many are made at least, also where they take longer than `seconds`.
        after_call: is called after each timed call, outside its time.
        timer: None takes a `GpuTimer` where there is a GPU, and else a `CpuTimer`.
    """
    gpu = torch.cuda.is_available()
    timer = timer or (GpuTimer(hide_launches) if gpu else CpuTimer())
    measured = Measured(samples={name: [] for name in candidates})
    kept: dict[str, dict[int, list[Tensor]]] = {name: {} for name in candidates}
    if not warm:
        for run in candidates.values():
            run()
    watch = Watch(nvml() if gpu else None)
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or (time.perf_counter() < end and not _precise(measured, done)):
        for name, candidate in candidates.items():
            if name in measured.problems:
                continue
            seed = done + 1
            run, arguments = (
                (candidate.run, candidate.inputs(seed)) if isinstance(candidate, Checked) else (candidate, ())
            )
            spent, result = timer.time(run, arguments)
            measured.samples[name].append(spent)
            if isinstance(candidate, Checked) and keeps_result(done):
                try:
                    kept[name][seed] = snapshot(result)
                except NotTensors as error:
                    measured.problems[name] = str(error)
                hidden = timer.hidden()
                if hidden > HIDDEN_SECONDS + HIDDEN_SHARE * spent:
                    measured.problems[name] = (
                        f"the GPU works for {1e3 * hidden:.1f} ms after the clock has stopped, on another stream"
                    )
            del result
            after_call()
        watch.sample()
        done += 1
    measured.conditions = watch.result()
    for name, candidate in candidates.items():
        if not isinstance(candidate, Checked):
            continue
        checked = len(kept[name]) > 1
        try:
            found = measured.problems.get(name) or problem(candidate, kept[name])
        except (torch.OutOfMemoryError, MemoryError):  # the plain path needs more memory than the fast one
            found, checked = None, False
        if found is not None:
            measured.problems[name] = found
            measured.rejected[name] = measured.samples.pop(name)
        elif checked:
            measured.checked.append(name)
    return measured


def _precise(measured: Measured, done: int) -> bool:
    samples = [times for name, times in measured.samples.items() if name not in measured.problems]
    return done >= ROUNDS_BEFORE_TARGET and all(median_error(times) < TARGET_ERROR for times in samples)


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    seconds: float = 5.0,
    *,
    warm: bool = False,
    hide_launches: bool = False,
) -> dict[str, list[float]]:
    """The samples of `measure` alone.

    Raises:
        RuntimeError: the result of a `Checked` candidate is wrong.
    """
    measured = measure(candidates, seconds, warm=warm, hide_launches=hide_launches)
    for name, what in measured.problems.items():
        raise RuntimeError(f"{name}: {what}")
    return measured.samples


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
