"""Generates any number of pictures, a batch at a time, while the caller uses the pictures that are finished.

On a GPU two batches are in flight: the next one is launched before anything waits for the last one, whose copy to
the host runs on a stream of its own beside the kernels. On a CPU a batch is returned as soon as it is computed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from titok.config import as_integer
from titok.generation.request import GenerationRequest

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
# Turns a request into its pictures, (B, H, W, channels) uint8 on any device.
Generate = Callable[[GenerationRequest], Tensor]


def check_batch_size(batch_size: object) -> BatchSize:
    """`batch_size` as "auto" or an int >= 1. Raises `ValueError` where it is anything else."""
    if isinstance(batch_size, str) and batch_size == "auto":
        return "auto"
    return check_count("batch_size", batch_size, "'auto' or an int >= 1")


def check_count(name: str, value: object, expected: str = "an int >= 1") -> int:
    """`value` as an int >= 1. Raises `ValueError`, which names it and what was expected, where it is anything else."""
    count = as_integer(value)
    if count is None or count < 1:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return count


def generate_batches(
    generate: Generate,
    request: GenerationRequest,
    *,
    device: torch.device,
    batch_size: BatchSize,
    progress: bool | None,
    stream: torch.cuda.Stream | None = None,
) -> Iterator[Tensor]:
    """The pictures of a request in batches, (B, H, W, channels) uint8 on the CPU, in order.

    Args:
        device: on which `generate` computes.
        batch_size: pictures of a batch, or "auto" for a `BatchSizeSearch`.
        progress: show a progress bar on stderr; None shows it where that is a terminal.
        stream: of a GPU, on which `generate` computes; None: the current one.

    Raises:
        torch.OutOfMemoryError: a batch of the given size, or of one picture, does not fit.
    """
    search = BatchSizeSearch(batch_size, device)
    copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    in_flight: deque[_HostCopy] = deque()
    start, total = 0, len(request)
    hide_bar = None if progress is None else not progress
    with tqdm(total=total, desc="pictures", unit="img", disable=hide_bar, file=sys.stderr, leave=False) as bar:
        while start < total or in_flight:
            if start < total:
                part = request.part(start, start + search.size)
                batch = _try_batch(generate, part, search, copy_stream, stream)
                if batch is None:
                    continue  # it did not fit, and `search.size` is smaller now
                in_flight.append(batch)
                start += len(part)
            # While sizes are tried out, each batch is waited for, because its time is measured.
            keep_one = copy_stream is not None and not search.searching and start < total
            while len(in_flight) > int(keep_one):
                pictures = in_flight.popleft().wait()
                bar.update(len(pictures))
                yield pictures


def one_by_one(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The pictures (H, W, channels) of all batches. Each owns its memory: keeping one keeps no batch."""
    for batch in batches:
        for picture in batch:
            yield picture.clone()


def _try_batch(
    generate: Generate,
    part: GenerationRequest,
    search: BatchSizeSearch,
    copy_stream: torch.cuda.Stream | None,
    stream: torch.cuda.Stream | None,
) -> _HostCopy | None:
    """Generates a batch and tells `search` how long it took. None: it did not fit, `search.size` is smaller."""
    began = time.perf_counter()
    try:
        batch = _copy_to_host(generate(part), copy_stream, stream)
        if search.searching:
            batch.wait()
    except torch.OutOfMemoryError:
        if not search.halve():
            raise
        batch = None
    if batch is None:  # out of the `except` block, where the exception kept the tensors of the failed batch alive
        torch.cuda.empty_cache()
        return None
    search.record(len(part), time.perf_counter() - began)
    return batch


class _HostCopy(NamedTuple):
    """Pictures that are on the host, once `done` has happened."""

    pictures: Tensor
    done: torch.cuda.Event | None  # None: they are there already

    def wait(self) -> Tensor:
        """The pictures, when they have arrived."""
        if self.done is not None:
            self.done.synchronize()
        return self.pictures


def _copy_to_host(
    pictures: Tensor, copy_stream: torch.cuda.Stream | None, stream: torch.cuda.Stream | None
) -> _HostCopy:
    """Starts the copy of pictures from a GPU to pinned memory, on `copy_stream`; pictures on the CPU need none.

    `stream` is the one on which the pictures are computed; None: the current one.
    """
    if copy_stream is None:
        return _HostCopy(pictures, None)
    host = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)  # PyTorch reuses pinned memory
    copy_stream.wait_stream(stream or torch.cuda.current_stream(pictures.device))
    with torch.cuda.stream(copy_stream):
        host.copy_(pictures, non_blocking=True)
    pictures.record_stream(copy_stream)
    return _HostCopy(host, copy_stream.record_event())


class BatchSizeSearch:
    """Finds the batch size that generates most pictures a second.

    It doubles the size for as long as that raises the rate by a tenth, twice the batch fits into memory, and the
    size stays within `LARGEST`. Every size runs twice, and only the second time counts: the first also pays for
    captures, tuning and new memory. All pictures generated meanwhile are used.

    Attributes:
        size: pictures of the next batch.
        searching: whether the size may still change.
    """

    LARGEST = 512
    size: int
    searching: bool

    def __init__(self, batch_size: BatchSize, device: torch.device) -> None:
        self.searching = batch_size == "auto"
        if isinstance(batch_size, int):
            self.size = batch_size
        else:
            self.size = 16 if device.type == "cuda" else 1
        self._on_cpu = device.type == "cpu"
        self._best_size, self._best_rate = self.size, 0.0
        self._ran_before = False
        self._resident_at_start = _memory_figure("self/status", "VmRSS")

    def record(self, count: int, seconds: float) -> None:
        """Takes note of a finished batch: its pictures and how long it took."""
        if not self.searching or count < self.size:
            return
        if not self._ran_before:
            self._ran_before = True
            return
        rate = count / seconds
        if rate < 1.1 * self._best_rate:
            self.size, self.searching = self._best_size, False
            return
        self._best_size, self._best_rate, self._ran_before = self.size, rate, False
        logger.debug("batch size %d: %.3g pictures a second", self.size, rate)
        if 2 * self.size > self.LARGEST or (self._on_cpu and not self._twice_fits()):
            self.searching = False
        else:
            self.size *= 2

    def halve(self) -> bool:
        """Takes note of a batch that did not fit into memory. False where there is no smaller size to try."""
        if not self.searching or self.size == 1:
            return False
        self.size, self.searching = self.size // 2, False
        return True

    def _twice_fits(self) -> bool:
        """Whether the memory that is left holds twice what was taken so far, as if none of that had been freed."""
        taken = _memory_figure("self/status", "VmHWM") - self._resident_at_start
        left = _memory_figure("meminfo", "MemAvailable")
        with suppress(OSError, ValueError):  # the container's limit; no file or the word "max" without one
            limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
            left = min(left, limit - _memory_figure("self/status", "VmRSS"))
        return 2 * taken <= left


def _memory_figure(file: str, field: str) -> int:
    """A figure of a file in /proc in bytes; 0 on systems without it, where only the rate decides."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
