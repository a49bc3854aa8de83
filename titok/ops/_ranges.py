"""The ranges of `titok.profiling`, which says what they are for."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

DOMAIN = "titok"  # of the NVTX ranges: `ncu --nvtx-include "titok@generate/"`


class Sink(Protocol):
    """Where ranges go. Calls nest, and every `push` meets its `pop`, errors included."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


class NVTX:
    """Nsight Systems and Nsight Compute. `RuntimeError` where the package `nvtx` is missing."""

    def __init__(self) -> None:
        try:
            import nvtx
        except ImportError:
            raise RuntimeError("NVTX ranges need the package nvtx: pip install 'titok[profile]'") from None
        self._nvtx = nvtx

    def push(self, name: str) -> None:
        self._nvtx.push_range(name, domain=DOMAIN)

    def pop(self) -> None:
        self._nvtx.pop_range(domain=DOMAIN)


class TorchProfiler:
    """`torch.profiler`: ranges become "user annotations" of the trace."""

    def __init__(self) -> None:
        self._open: list[torch.profiler.record_function] = []

    def push(self, name: str) -> None:
        self._open.append(torch.profiler.record_function(f"{DOMAIN}: {name}"))
        self._open[-1].__enter__()

    def pop(self) -> None:
        self._open.pop().__exit__(None, None, None)


_sink: Sink | None = None
_OFF = nullcontext()


@contextmanager
def enabled(sink: Sink | None = None) -> Iterator[None]:
    """Ranges go to `sink` (None: NVTX) within. Not while `torch.compile` traces: compiled code has none."""
    global _sink
    before, _sink = _sink, sink or NVTX()
    try:
        yield
    finally:
        _sink = before


@contextmanager
def _open(sink: Sink, name: str) -> Iterator[None]:
    sink.push(name)
    try:
        yield
    finally:
        sink.pop()


def annotate(name: str, index: int | None = None) -> AbstractContextManager[Any]:
    """A range for a `with`; `index` is appended to its name."""
    if _sink is None or torch.compiler.is_compiling():
        return _OFF
    return _open(_sink, name if index is None else f"{name} {index}")


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """`items`, each with a range around what a `for` does with it: "name 0", "name 1" and so on."""
    for index, item in enumerate(items):
        with annotate(name, index):
            yield item


def ranged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every call is a range."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if _sink is None or torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with _open(_sink, name):
                return function(*args, **kwargs)

        return wrapper

    return decorate


if os.environ.get("TITOK_NVTX", "0") == "1":
    try:
        _sink = NVTX()
    except RuntimeError as error:
        warnings.warn(f"TITOK_NVTX=1: {error}", stacklevel=2)
