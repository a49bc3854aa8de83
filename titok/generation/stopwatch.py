"""Measures how long each stage of a pipeline's call takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Times of the stages of one call. On a GPU they are CUDA events: nothing waits until the times are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, tuple[Any, Any]] = {}  # stage -> its beginning and its end

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context that is timed under `name`; compiled code is not timed."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._timed(name)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks[name] = (begin, self._mark())

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, by name. On a GPU this waits for the stages to end."""
        if self._device.type != "cuda":
            return {name: end - begin for name, (begin, end) in self._marks.items()}
        for _, end in self._marks.values():
            end.synchronize()
        return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in self._marks.items()}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
