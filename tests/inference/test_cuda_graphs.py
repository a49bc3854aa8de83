"""`GraphCache` on a recorded `torch.cuda`: the order of what it asks of CUDA, and what it keeps. Replays need a GPU."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from titok.inference.cuda_graphs import GraphCache

GPU = torch.device("cuda", 1)


class RecordedStream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: RecordedStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.calls.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.calls.append(f"{self.name} records an event")
        return f"event {len(self.calls)}"


class RecordedPool:
    """A memory pool that checks, as CUDA's does, that it outlives the graphs which were captured into it."""

    made = 0

    def __init__(self) -> None:
        RecordedPool.made += 1
        self.id, self.graphs = (0, RecordedPool.made), weakref.WeakSet()

    def __del__(self) -> None:
        assert not self.graphs


class RecordedGraph:
    def replay(self) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of `torch.cuda`, in order."""
    recorded: list[str] = []
    current = [RecordedStream("current", recorded)]

    @contextlib.contextmanager
    def stream(given: RecordedStream) -> Iterator[None]:
        before = current[0]
        current[0] = given
        recorded.append(f"on {given.name}")
        try:
            yield
        finally:
            current[0] = before
            recorded.append(f"back on {before.name}")

    @contextlib.contextmanager
    def device(given: torch.device) -> Iterator[None]:
        recorded.append(f"on {given}")
        yield
        recorded.append(f"off {given}")

    @contextlib.contextmanager
    def graph(graph: RecordedGraph, pool: Any, stream: RecordedStream, capture_error_mode: str) -> Iterator[None]:
        current[0] = stream  # stays the current stream where the capture fails, as with torch.cuda.graph
        recorded.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
        yield
        recorded.append("end of capture")

    monkeypatch.setattr(RecordedPool, "made", 0)
    monkeypatch.setattr(torch.cuda, "MemPool", RecordedPool)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: RecordedStream("side", recorded))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    return recorded


CAPTURE = [
    "side waits for current",
    "on side",
    "compute",
    "capture on side into (0, 1), thread_local",
    "compute",
    "end of capture",
    "back on current",
    "current waits for side",
]


def test_a_capture_warms_up_on_a_stream_of_its_own(calls: list[str]) -> None:
    """All graphs of a cache are captured on one stream into one pool: only then do they share memory."""
    graphs, results = GraphCache(), iter([torch.zeros(1), torch.ones(1)] * 2)

    def compute() -> torch.Tensor:
        calls.append("compute")
        return next(results)

    for _ in range(2):
        captured = graphs.capture(compute, GPU)
        assert captured.result.item() == 1.0, "the result is that of the captured computation"
        assert calls == CAPTURE
        calls.clear()


def test_each_gpu_has_its_own_pool_and_stream(calls: list[str]) -> None:
    graphs = GraphCache()
    for device in (GPU, torch.device("cuda", 0), GPU):
        graphs.capture(lambda: torch.zeros(1), device)
    assert [call for call in calls if call.startswith("capture")] == [
        f"capture on side into (0, {pool}), thread_local" for pool in (1, 2, 1)
    ]


@pytest.mark.parametrize("failing", [0, 1], ids=["warm-up", "capture"])
def test_a_failed_capture_leaves_the_current_stream(calls: list[str], failing: int) -> None:
    graphs, number = GraphCache(), iter(range(2))

    def compute() -> torch.Tensor:
        if next(number) == failing:
            raise RuntimeError("cannot be captured")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="cannot be captured"):
        graphs.capture(compute, GPU)
    assert calls[-2:] == ["back on current", "current waits for side"]
    assert torch.cuda.current_stream().name == "current"
    assert graphs.capture(lambda: torch.ones(1), GPU).result.item() == 1.0, "another thread could not capture"


@pytest.mark.parametrize("end", ["clear", "del", "weights"])
def test_a_pool_outlives_its_graphs(calls: list[str], end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives as long as the last of them, and no longer."""
    failures: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    graphs, weight = GraphCache(), torch.zeros(3)
    captured = graphs.get("key", lambda: graphs.capture(lambda: torch.zeros(1), GPU), [weight])
    captured._memory.pool.graphs.add(captured._graph)
    pool = weakref.ref(captured._memory.pool)
    held = captured if end == "del" else None
    del captured
    if end == "clear":
        graphs.clear()
    elif end == "del":
        del graphs
        assert pool() is not None
        del held
    else:
        graphs.get("key", lambda: None, [torch.zeros(3)])
    assert pool() is None
    assert failures == []


def test_graphs_hold_the_weights_that_they_read() -> None:
    """A weight that a graph reads stays in memory, so that none of another model can take its address."""
    graphs, weight, made = GraphCache(), torch.nn.Parameter(torch.ones(3)), []

    def get() -> int:
        return graphs.get("key", lambda: made.append(1) or len(made), [weight])  # type: ignore[func-returns-value]

    storage = StorageWeakRef(weight.untyped_storage())
    assert (get(), get()) == (1, 1)
    with torch.no_grad():
        weight.fill_(2)  # the graph reads the new values
    assert get() == 1
    weight.data = torch.ones(3)  # as `Module.to` sets it
    assert not storage.expired(), "the kept graph reads this memory"
    assert get() == 2
    assert storage.expired(), "no graph reads it any more"
    weight.data = weight.data.to(torch.float64)
    assert get() == 3
    latest = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.ones(3)
    graphs.clear()
    assert latest.expired()


def test_runs_wait_for_the_run_before_them(calls: list[str]) -> None:
    graphs = GraphCache()
    for name in ("first", "second"):
        with graphs.exclusive(GPU):
            calls.append(name)
    with pytest.raises(RuntimeError), graphs.exclusive(GPU):
        raise RuntimeError
    assert calls == [
        *("on cuda:1", "first", "current records an event", "off cuda:1"),
        *("on cuda:1", "current waits for event 3", "second", "current records an event", "off cuda:1"),
        *("on cuda:1", "current waits for event 8", "current records an event"),
    ]


def test_the_graph_that_was_not_used_for_longest_is_dropped() -> None:
    graphs, made = GraphCache(), []

    def get(key: int) -> int:
        return graphs.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    for key in range(GraphCache.LIMIT):
        get(key)
    get(0)
    get(100)
    assert len(graphs) == GraphCache.LIMIT
    made.clear()
    assert [get(key) for key in (0, 100, 2)] == [0, 100, 2]
    assert made == []
    get(1)
    assert made == [1]
