"""Memory that generation has used stays with the process for the next call."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from titok.ops import is_plain

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
    if libc is None or is_plain() or torch.is_grad_enabled():
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
