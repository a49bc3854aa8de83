"""CUDA graphs: captured once, replayed often, and kept by the object that they compute for."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class GraphCache:
    """The graphs of one owner. Of more than `LIMIT`, the one that was not used for longest is dropped.

    All graphs of a cache share one memory pool, and every run of a graph overwrites its inputs and its result. So
    the caller must be within `exclusive` from writing the inputs to copying the result.

    The owner keeps it as a plain attribute: it is in no state dict, and a copied or unpickled owner starts with an
    empty one.
    """

    LIMIT = 8  # each graph holds the activations of its shape

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._pool: Any = None
        self._lock = threading.RLock()
        self._last_run: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drops all graphs, after the run that uses one of them."""
        with self._lock:
            self._kept.clear()
            self._pool = None

    @contextlib.contextmanager
    def exclusive(self, device: torch.device) -> Iterator[None]:
        """A context for one run at a time, of all threads and GPU streams. `device` is the current one within."""
        with self._lock:
            if device.type != "cuda":
                yield
                return
            with torch.cuda.device(device):
                if self._last_run is not None:
                    torch.cuda.current_stream().wait_event(self._last_run)
                try:
                    yield
                finally:
                    self._last_run = torch.cuda.current_stream().record_event()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under `key`, which is `make()` on first use. To be called within `exclusive`."""
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > self.LIMIT:
            self._kept.popitem(last=False)
        value: T = self._kept[key]
        return value

    def capture(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Captures `compute()`. To be called within `exclusive`.

        Returns:
            the graph, and the tensor that holds the result after each `graph.replay()`.

        Raises:
            RuntimeError: `compute` does something that cannot be captured, or there is no CUDA device.
        """
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            warm_up
        ):  # kernels may be compiled and tuned on first use, which cannot be captured
            compute()
        torch.cuda.current_stream().wait_stream(warm_up)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = compute()
        return graph, result

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()
