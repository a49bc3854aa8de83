"""CUDA graphs: captured once, replayed often, and kept by the object that they compute for."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from titok.inference import cudnn

T = TypeVar("T")

# PyTorch allows one capture at a time in a process. cuDNN's tuning in the warm-up gives memory back to the driver,
# which must not happen during a capture either.
_CAPTURING = threading.Lock()


class _CaptureMemory(NamedTuple):
    """Where the graphs of one cache on one GPU are captured.

    PyTorch shares memory between graphs that were captured into the same pool on the same stream. The pool object
    stays alive while there are graphs: if the last graph freed its pool, the next capture could not use it again.
    """

    pool: torch.cuda.MemPool
    stream: torch.cuda.Stream


class CapturedGraph:
    """A graph, its result and the memory pool that they live in.

    Attributes:
        result: the tensor that holds the result after each replay.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor, memory: _CaptureMemory) -> None:
        # Python frees attributes in the order in which they were set, and a pool must outlive its graphs.
        self._graph = graph
        self.result = result
        self._memory = memory

    def replay(self) -> None:
        """Computes the result again, on the current stream."""
        self._graph.replay()


class GraphCache:
    """The graphs of one owner. Of more than `LIMIT`, the one that was not used for longest is dropped.

    All graphs of a cache on one GPU share one memory pool, and every run of a graph overwrites its inputs and its
    result. So the caller must be within `exclusive` from writing the inputs to copying the result.

    A graph reads the weights of its owner at their addresses. The cache holds the memory of these weights, so that
    no other tensor can take their addresses, and drops its graphs when the weights lie elsewhere.

    The owner keeps it as a plain attribute: it is in no state dict, and a copied or unpickled owner starts with an
    empty one.
    """

    LIMIT = 8  # each graph holds the activations of its shape

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._capture_memory: dict[torch.device, _CaptureMemory] = {}
        self._addresses: list[object] = []
        self._weights: list[Tensor] = []  # views that hold the memory at these addresses
        self._lock = threading.RLock()
        self._last_run: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drops all graphs and lets go of the weights, after the run that uses one of them."""
        with self._lock:
            self._kept.clear()
            self._capture_memory.clear()
            self._addresses, self._weights = [], []

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

    def get(self, key: Hashable, make: Callable[[], T], weights: Sequence[Tensor] = ()) -> T:
        """What is kept under `key`, which is `make()` on first use. To be called within `exclusive`.

        Args:
            weights: all weights that the graphs of this cache read, in the same order in every call. Where one of
                them lies elsewhere than in the last call, all graphs are dropped first.
        """
        addresses: list[object] = [(t.data_ptr(), t.dtype) for t in weights]
        if addresses != self._addresses:
            self.clear()
            self._addresses, self._weights = addresses, [t.detach() for t in weights]
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > self.LIMIT:
            self._kept.popitem(last=False)
        value: T = self._kept[key]
        return value

    def capture(self, compute: Callable[[], Tensor], device: torch.device) -> CapturedGraph:
        """Captures `compute()`. To be called within `exclusive`, with the same device.

        Work that other threads give to the GPU meanwhile is not captured and does not disturb the capture.

        Raises:
            RuntimeError: `compute` does something that cannot be captured, or there is no CUDA device.
        """
        if device not in self._capture_memory:
            self._capture_memory[device] = _CaptureMemory(torch.cuda.MemPool(), torch.cuda.Stream())
        memory, current = self._capture_memory[device], torch.cuda.current_stream()
        memory.stream.wait_stream(current)
        try:
            # `torch.cuda.graph` leaves its stream the current one where a capture fails; this context does not.
            with torch.cuda.stream(memory.stream), _CAPTURING:
                with cudnn.tuning():
                    compute()  # kernels may be compiled and tuned on first use, which cannot be captured
                graph = torch.cuda.CUDAGraph()
                options: Any = {"pool": memory.pool.id, "stream": memory.stream}
                with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
                    result = compute()
        finally:
            current.wait_stream(memory.stream)
        return CapturedGraph(graph, result, memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()
