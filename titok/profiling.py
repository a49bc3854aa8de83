"""Named ranges around every stage, decoding step and op, for Nsight (NVTX) and for `torch.profiler`.

Ranges are off unless asked for: by `TITOK_NVTX=1` in the environment, or within `with profiling.enabled():`, for the
thread or task that entered it. While they are off, a range costs one look at a context variable.
`python -m benchmarks.profile` uses them.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

__all__ = ["DOMAIN", "NVTX", "Sink", "TorchProfiler", "annotate", "each", "enabled", "is_enabled", "ranged"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

DOMAIN = "titok"  # of the NVTX ranges: `ncu --nvtx-include "titok@generate/"`


class Sink(Protocol):
    """Where ranges go. Calls nest, and every `push` meets its `pop`, errors included."""

    def push(self, name: str) -> None:
        """Opens a range."""

    def pop(self) -> None:
        """Closes the range that was opened last."""


class NVTX:
    """Nsight Systems and Nsight Compute.

    By the package `nvtx`, whose ranges are in the domain "titok"; where it is not installed, by PyTorch's own
    functions, whose ranges have no domain but the prefix "titok: ". `RuntimeError` where PyTorch was built without
    CUDA, too.
    """

    def __init__(self) -> None:
        self._package: Any = None
        with suppress(ImportError):
            import nvtx

            self._package = nvtx
        if self._package is None and not hasattr(torch._C, "_nvtx"):
            raise RuntimeError(
                "NVTX ranges need the package nvtx (pip install 'titok-kernels[profile]') "
                "or a PyTorch that was built with CUDA"
            )

    def push(self, name: str) -> None:
        """Opens a range."""
        if self._package is None:
            torch.cuda.nvtx.range_push(f"{DOMAIN}: {name}")
        else:
            self._package.push_range(name, domain=DOMAIN)

    def pop(self) -> None:
        """Closes the range that was opened last."""
        if self._package is None:
            torch.cuda.nvtx.range_pop()
        else:
            self._package.pop_range(domain=DOMAIN)


class TorchProfiler:
    """`torch.profiler`: ranges become "user annotations" of the trace."""

    def __init__(self) -> None:
        self._open: list[torch.profiler.record_function] = []

    def push(self, name: str) -> None:
        """Opens a range."""
        self._open.append(torch.profiler.record_function(f"{DOMAIN}: {name}"))
        self._open[-1].__enter__()

    def pop(self) -> None:
        """Closes the range that was opened last."""
        self._open.pop().__exit__(None, None, None)


def _sink_of_environment() -> Sink | None:
    if os.environ.get("TITOK_NVTX", "0") != "1":
        return None
    try:
        return NVTX()
    except RuntimeError as error:
        warnings.warn(f"TITOK_NVTX=1: {error}", stacklevel=2)
        return None


# Where this context's ranges go; None while they are off.
_SINK: ContextVar[Sink | None] = ContextVar("titok_profiling_sink", default=_sink_of_environment())  # noqa: B039
_OFF = nullcontext()


def is_enabled() -> bool:
    """Whether ranges of this thread or task go anywhere. Not to be called while `torch.compile` traces."""
    return _SINK.get() is not None


@contextmanager
def enabled(sink: Sink | None = None) -> Iterator[None]:
    """Within, ranges of this thread or task go to `sink`; None stands for NVTX. Compiled code has no ranges."""
    token = _SINK.set(sink or NVTX())
    try:
        yield
    finally:
        _SINK.reset(token)


@contextmanager
def _open(sink: Sink, name: str) -> Iterator[None]:
    sink.push(name)
    try:
        yield
    finally:
        sink.pop()


def annotate(name: str, index: int | None = None) -> AbstractContextManager[Any]:
    """A range for a `with`; `index` is appended to its name."""
    if torch.compiler.is_compiling() or (sink := _SINK.get()) is None:
        return _OFF
    return _open(sink, name if index is None else f"{name} {index}")


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
            if torch.compiler.is_compiling() or (sink := _SINK.get()) is None:
                return function(*args, **kwargs)
            with _open(sink, name):
                return function(*args, **kwargs)

        return wrapper

    return decorate
