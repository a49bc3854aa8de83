"""Keeps the memory that generation has freed within the process, so that the next large tensor need not ask for it
again.

glibc maps every block of 32 MiB or more anew, and the kernel then fills each of its pages with zeros. The feature
maps of the pixel decoder are such blocks, and that work is a noticeable part of its time.
"""

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

# Parameters of glibc's mallopt and the values that they are given.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER_TRIM = (1 << 31) - 1
_LARGEST_HEAP_BLOCK = 32 << 20
_DEFAULT_MMAP_MAX = 65536

# How many `memory_that_stays` contexts are open. malloc's settings belong to the process, so this count does too.
_open_contexts = 0
_lock = threading.Lock()


@functools.cache
def _glibc() -> Any:
    """The C library, or None where it is not glibc or `TITOK_KEEP_HEAP=0` turns this module off."""
    if not sys.platform.startswith("linux") or os.environ.get("TITOK_KEEP_HEAP", "1") == "0":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  # musl lacks it
        libc.mallopt.argtypes, libc.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
        libc.malloc_trim.argtypes, libc.malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    except (OSError, AttributeError):
        return None
    return libc


@contextlib.contextmanager
def memory_that_stays() -> Iterator[None]:
    """A context in which large tensors come from the heap and return to it, not to the operating system.

    Memory freed within stays with the process until `release_memory`. The context does nothing in plain mode, when
    gradients are on, without glibc on Linux, or with `TITOK_KEEP_HEAP=0` in the environment.
    """
    global _open_contexts
    libc = _glibc()
    if libc is None or is_plain() or torch.is_grad_enabled():
        yield
        return
    with _lock:
        _open_contexts += 1
        # Setting a threshold ends glibc's own adaptation of it, so it is set to where that adaptation would end.
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
        libc.mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        with _lock:
            _open_contexts -= 1
            if not _open_contexts:
                libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)


def release_memory() -> None:
    """Returns the heap's free memory to the operating system, which `memory_that_stays` had kept."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
