"""The timer catches sides that cheat: each test builds one, and an honest side beside it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import checks, measures, results, timing
from benchmarks.harness.checks import Checked

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def inputs(seed: int) -> tuple[Tensor]:
    return (torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)),)


def honest(x: Tensor) -> Tensor:
    return torch.tanh(x @ WEIGHT)


def side(run: Callable[..., Any], **options: Any) -> Checked:
    return Checked(run, inputs, honest, **options)


def problem_of(run: Callable[..., Any], **options: Any) -> str:
    """What `measure` says of a side that runs beside an honest one, which stays in the measurement."""
    found = timing.measure({"cheat": side(run, **options), "honest": side(honest)}, 0.0, timer=timing.CpuTimer())
    assert list(found.samples) == ["honest"]
    assert found.checked == ["honest"]
    assert len(found.samples["honest"]) == 3
    return found.problems["cheat"]


def test_honest_sides_pass_also_with_rounding() -> None:
    def rounded(x: Tensor) -> Tensor:
        return honest(x.bfloat16().float()).bfloat16()

    found = timing.measure({"exact": side(honest), "rounded": side(rounded)}, 0.0, timer=timing.CpuTimer())
    assert found.problems == {}
    assert found.checked == ["exact", "rounded"]


def test_a_cached_result_is_caught() -> None:
    cache: list[Tensor] = []

    def cheat(x: Tensor) -> Tensor:
        if not cache:
            cache.append(honest(x))
        return cache[0]

    assert problem_of(cheat) == "it returns the same result for different inputs"


def test_a_cache_by_inputs_never_hits() -> None:
    """Every timed call has inputs of its own, so that even a correct cache computes each time."""
    computed, cache = [], {}

    def memoised(x: Tensor) -> Tensor:
        key = tuple(x.flatten().tolist())
        if key not in cache:
            computed.append(1)
            cache[key] = honest(x)
        return cache[key]

    found = timing.measure({"m": side(memoised)}, 0.0, rounds=7, warm=True, timer=timing.CpuTimer())
    assert len(found.samples["m"]) == 7
    assert len(computed) == 7


def test_skipped_work_is_caught() -> None:
    assert "as far from that of the plain path" in problem_of(lambda x: x @ WEIGHT)  # without its tanh
    assert "as far from that of the plain path" in problem_of(lambda x: torch.empty(4, 8).fill_(float("nan")))
    assert "as far from that of the plain path" in problem_of(lambda x: honest(x)[:2])


def test_work_that_is_put_off_is_caught() -> None:
    assert (
        problem_of(lambda x: lambda: honest(x)) == "it returns function in place of tensors that hold the result"
    )
    assert "in place of tensors" in problem_of(lambda x: torch.empty(4, 8, device="meta"))

    class Lazy(Tensor):
        pass

    assert "returns Lazy" in problem_of(lambda x: honest(x).as_subclass(Lazy))


def test_a_thread_that_fills_the_result_later_is_caught() -> None:
    threads = []

    def cheat(x: Tensor) -> Tensor:
        out = torch.zeros(4, 8)

        def later() -> None:
            time.sleep(0.05)
            out.copy_(honest(x))

        threads.append(threading.Thread(target=later))
        threads[-1].start()
        return out

    assert "result" in problem_of(cheat)
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_an_uncompiled_compiled_side_is_caught() -> None:
    assert problem_of(honest, must_be_compiled=True) == "it does not run what torch.compile made"


def test_inputs_whose_results_are_equal_leave_the_check_its_scale() -> None:
    """The right results of seeds 1 and 2 are equal, as those of small models may be; that of seed 3 differs."""

    def late(seed: int) -> tuple[Tensor]:
        return (torch.full((4,), float(seed > 2)),)

    candidate = Checked(torch.clone, late, torch.clone)
    assert checks.problem(candidate, {1: [torch.zeros(4)], 2: [torch.zeros(4)]}) is None
    found = checks.problem(candidate, {1: [torch.zeros(4)], 2: [torch.ones(4)]})
    assert found == "its result is 100% as far from that of the plain path as results of two inputs are"


def test_a_check_that_would_see_nothing_is_reported() -> None:
    blind = Checked(lambda x: x * 0, inputs, lambda x: x * 0)
    found = timing.measure({"blind": blind}, 0.0, timer=timing.CpuTimer())
    assert "would see no difference" in found.problems["blind"]


class FakeCuda:
    """Two streams of a GPU: work is (seconds, function), and runs when somebody waits for its stream."""

    def __init__(self) -> None:
        self.now = 0.0
        self.streams: dict[str, list[tuple[float, Callable[[], Any]]]] = {"current": [], "other": []}
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                fake.streams["current"].append((0.0, lambda: setattr(self, "at", fake.now)))

            def synchronize(self) -> None:
                fake.wait("current")

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        self.Event = Event

    def launch(self, stream: str, seconds: float, work: Callable[[], Any]) -> None:
        self.streams[stream].append((seconds, work))

    def wait(self, stream: str) -> None:
        for seconds, work in self.streams[stream]:
            time.sleep(seconds)
            self.now += seconds
            work()
        self.streams[stream].clear()

    def synchronize(self) -> None:
        self.wait("current")
        self.wait("other")


def test_work_on_another_stream_is_caught() -> None:
    cuda = FakeCuda()

    def on(stream: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            out = torch.zeros(4, 8)
            cuda.launch(stream, 0.01, lambda: out.copy_(honest(x)))
            return out

        return run

    timer = timing.GpuTimer(False, cuda, flush=lambda: None)
    candidates = {"same": side(on("current")), "wrong": side(on("other"))}
    found = timing.measure(candidates, 0.0, warm=True, timer=timer)
    assert "after the clock has stopped, on another stream" in found.problems["wrong"]
    assert found.checked == ["same"]
    assert min(found.samples["same"]) >= 0.01 - 1e-9


def test_results_may_be_nested_and_hold_indices() -> None:
    result = {"a": torch.ones(2), "b": (torch.tensor([1, 2]), torch.zeros(1))}
    kept = checks.snapshot(result)
    assert len(kept) == 3
    result["a"].zero_()
    assert kept[0].tolist() == [1, 1]
    assert checks.distance([torch.tensor([1, 2, 3, 4])], [torch.tensor([1, 2, 3, 900])]) == 0.25
    assert checks.distance([torch.zeros(4)], [torch.full((4,), 2.0)]) == 2.0
    assert checks.distance([torch.zeros(4)], [torch.zeros(5)]) == float("inf")


class Scripted(timing.CpuTimer):
    """A timer whose calls take the seconds that a test names, over and over."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def time(self, run: Callable[..., Any], arguments: Any) -> tuple[float, Any]:
        self.calls += 1
        return self.seconds[self.calls % len(self.seconds)], run(*arguments)


def test_rounds_end_when_the_median_is_known_well_enough_or_the_time_is_up() -> None:
    steady = timing.measure({"a": lambda: None}, 60.0, timer=Scripted(1.0, 1.001))
    assert len(steady.samples["a"]) == timing.ROUNDS_BEFORE_TARGET
    restless = timing.measure({"a": lambda: time.sleep(1e-3)}, 0.1, timer=Scripted(*range(1, 1000)))
    assert len(restless.samples["a"]) > timing.ROUNDS_BEFORE_TARGET
    assert results.median_error(restless.samples["a"]) > results.TARGET_ERROR


def test_standard_error_of_the_median() -> None:
    """Against the spread of medians of many samples of the same size."""
    draws = torch.randn(400, 101, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 10
    spread = float(draws.median(dim=1).values.std()) / 10
    errors = [results.median_error(row.tolist()) for row in draws[:100]]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.25)
    assert results.median_error([1.0, 2.0]) == float("inf")
    assert results.median_error([2.0] * 5) == 0


def test_a_candidate_can_be_called_without_arguments() -> None:
    assert torch.equal(side(honest)(), honest(*inputs(0)))
    assert dataclasses.replace(side(honest), tolerance=0.5).tolerance == 0.5


def test_samples_of_a_wrong_side_are_not_handed_out() -> None:
    with pytest.raises(RuntimeError, match="wrong: its result is"):
        timing.interleave({"wrong": side(lambda x: -honest(x))}, 0.0)


def test_rows_of_a_dtype_are_those_of_its_runs() -> None:
    def row(command: str, dtype: str) -> dict[str, Any]:
        return {"environment": {"command": command}, "case": {"dtype": dtype}}

    rung = row("python -m benchmarks.speedup --ladder titok-l-32 --dtype bf16", "fp32")
    op, plain = (
        row("python -m benchmarks.bench_x --dtype float32", "float32"),
        row("python -m benchmarks.x", "bf16"),
    )
    assert measures.of_dtype([rung, op, plain], "bf16") == [rung, plain]
    assert measures.of_dtype([rung, op, plain], "fp32") == [op]
