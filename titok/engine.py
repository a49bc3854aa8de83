"""How inference computes: what is prepared from the weights once, memory that stays, and the switch to do without.

Where nothing wants a gradient, the layers of `titok.layers` compute from what was made of their weights beforehand:
oneDNN's blocked layout on a CPU, sums of taps and of linear pieces anywhere. That is kept beside the weights, costs as
much memory again, and is made anew when they change. `with plain():` goes without it, and without every kernel of
`titok.ops`: the path to check the other against.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from titok.ops import only_plain

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_plain = False


@contextlib.contextmanager
def plain(on: bool = True) -> Iterator[None]:
    """Within, models compute as they do in training, and every op of `titok.ops` runs its plain PyTorch path."""
    global _plain
    before, _plain = _plain, on
    try:
        with only_plain(on):
            yield
    finally:
        _plain = before


def select(engine: str) -> contextlib.AbstractContextManager[None]:
    """The context that `engine` names: "fast" or "plain"; `ValueError` for any other."""
    if engine not in ("fast", "plain"):
        raise ValueError(f"engine: expected 'fast' or 'plain', got {engine!r}")
    return plain() if engine == "plain" else contextlib.nullcontext()


def prepares() -> bool:
    """Whether prepared weights may be used now: nothing wants a gradient, is compiled or cast on the way."""
    casts = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not (_plain or casts or torch.is_grad_enabled() or torch.compiler.is_compiling())


# ---------------------------------------------------------------------------------------------------------------
# What is made of weights

_PROBES = 16


class Derived(Generic[T]):
    """Something made of parameters, kept until they change.

    A change is seen by address, version, or the values at a few places: loops that average weights through `.data`
    leave no other trace. A copied or unpickled module starts without it.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._probes: list[tuple[Any, bytes]] = []
        self._made: Any = None

    def get(self, make: Callable[[], T], *weights: Tensor | None, key: object = None) -> T:
        """What `make()` gives for these weights as they are now, and for this `key`."""
        given = [w for w in weights if w is not None]
        state = [key, *map(stamp, given)]
        if state != self._state or any(view.tobytes() != seen for view, seen in self._probes):
            self._made = make()
            self._state = state
            self._probes = [(view, view.tobytes()) for view in map(_probe, given) if view is not None]
        made: T = self._made
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> Any:
        return Derived, ()


def stamp(weight: Tensor) -> tuple[int, torch.dtype, int | None]:
    """What changes when a weight is replaced, moved, recast or written to (inference tensors count no versions)."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version


def _probe(weight: Tensor) -> Any:
    """A strided numpy view of some values; None where looking would cost more (another device, another layout)."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return None
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().view(-1).view(bits).numpy()[:: max(1, weight.numel() // _PROBES)]


# ---------------------------------------------------------------------------------------------------------------
# bfloat16 on a CPU without instructions for it


_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@functools.cache
def bfloat16_is_native() -> bool:
    """Whether this CPU multiplies bfloat16 itself, and `ONEDNN_MAX_CPU_ISA` lets it."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BFLOAT16:
        return False
    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")
    if (capabilities := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return any(capabilities().get(name, False) for name in names)
    with contextlib.suppress(OSError):  # a release before that function
        return not set(names).isdisjoint(Path("/proc/cpuinfo").read_text().split())
    return False


_twins: weakref.WeakKeyDictionary[nn.Module, Derived[Any]] = weakref.WeakKeyDictionary()


def stand_in(model: M) -> M:
    """`model`, or where its bfloat16 would be emulated a float32 copy of it, which is faster and no less exact."""
    weight = next(model.parameters())
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not prepares() or bfloat16_is_native():
        return model
    twin: Derived[M] = _twins.setdefault(model, Derived())
    return twin.get(lambda: copy.deepcopy(model).float(), *model.parameters())


# ---------------------------------------------------------------------------------------------------------------
# Memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_NEVER, _USUAL_MMAPS = (1 << 31) - 1, 65536
_LARGEST_HEAP_BLOCK = 32 << 20
_holders, _lock = 0, threading.Lock()


@functools.cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux") or os.environ.get("TITOK_KEEP_HEAP", "1") == "0":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  # musl has none, and another allocator behind the name
        libc.mallopt.argtypes, libc.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
        libc.malloc_trim.argtypes, libc.malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    except (OSError, AttributeError):
        return None
    return libc


@contextlib.contextmanager
def memory_that_stays() -> Iterator[None]:
    """Large tensors made within come from the heap and go back to it, not to the system.

    glibc maps blocks of 32 MB and more anew each time, and the kernel zeroes every page of them, which the
    pixel decoder notices. Only Linux with glibc; `TITOK_KEEP_HEAP=0` turns it off.
    """
    global _holders
    libc = _glibc()
    if libc is None or _plain or torch.is_grad_enabled():
        yield
        return
    with _lock:
        _holders += 1
        # The first call ends glibc's own adaptation of this threshold, so it is put where that ends up.
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders:
                libc.mallopt(_M_MMAP_MAX, _USUAL_MMAPS)


def release_memory() -> None:
    """Gives the system back what `memory_that_stays` holds free."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


# ---------------------------------------------------------------------------------------------------------------
# Times


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
