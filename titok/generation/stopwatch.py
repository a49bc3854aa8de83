"""How long each stage of a pipeline's call takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """How long the stages of a call took; on a GPU by events, so that nobody waits until somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, tuple[Any, Any]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = self._now()
        yield
        self._marks[name] = (before, self._now())

    def seconds(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {name: after - before for name, (before, after) in self._marks.items()}
        for _, after in self._marks.values():
            after.synchronize()
        return {name: before.elapsed_time(after) / 1e3 for name, (before, after) in self._marks.items()}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
