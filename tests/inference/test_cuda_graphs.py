"""`GraphCache` on a recorded `torch.cuda`: the order of what it asks of CUDA, and what it keeps. Replays need a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of `torch.cuda`, in order."""
    recorded: list[str] = []
    current = RecordedStream("current", recorded)

    def context(text: str) -> Any:
        @contextlib.contextmanager
        def entered(*arguments: Any, **options: Any) -> Iterator[None]:
            named = [a.name if isinstance(a, RecordedStream) else a for a in (*arguments, *options.values())]
            recorded.append(f"{text} {named}")
            yield
            recorded.append(f"end of {text}")

        return entered

    monkeypatch.setattr(torch.cuda, "Stream", lambda: RecordedStream("warm-up", recorded))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", context("stream"))
    monkeypatch.setattr(torch.cuda, "device", context("device"))
    monkeypatch.setattr(torch.cuda, "graph", context("graph"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "the graph")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    return recorded


def test_a_capture_warms_up_on_a_stream_of_its_own(calls: list[str]) -> None:
    graphs, results = GraphCache(), iter([torch.zeros(1), torch.ones(1)])

    def compute() -> torch.Tensor:
        calls.append("compute")
        return next(results)

    graph, result = graphs.capture(compute)
    assert (graph, result.item()) == ("the graph", 1.0), "the result is that of the captured computation"
    assert calls == [
        "warm-up waits for current",
        "stream ['warm-up']",
        "compute",
        "end of stream",
        "current waits for warm-up",
        "graph ['the graph', 'the pool']",
        "compute",
        "end of graph",
    ]


def test_runs_wait_for_the_run_before_them(calls: list[str]) -> None:
    graphs = GraphCache()
    for name in ("first", "second"):
        with graphs.exclusive(GPU):
            calls.append(name)
    with pytest.raises(RuntimeError), graphs.exclusive(GPU):
        raise RuntimeError
    device = "device [device(type='cuda', index=1)]"
    assert calls == [
        *(device, "first", "current records an event", "end of device"),
        *(device, "current waits for event 3", "second", "current records an event", "end of device"),
        *(device, "current waits for event 8", "current records an event"),
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
