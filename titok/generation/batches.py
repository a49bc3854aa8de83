"""Pictures of any number of labels, a batch at a time, with the device at work while the host uses what is done.

On a GPU two batches are under way: the copy of one to the host runs on a stream of its own beside the kernels of the
next, which were launched before anybody waits for it. On a CPU a batch is handed over as soon as it is computed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from titok.checks import labels_on_host
from titok.config import SamplingConfig

if TYPE_CHECKING:
    from titok.generation.pipeline import Pipeline

BatchSize = int | Literal["auto"]


def generate_batches(
    pipe: Pipeline,
    labels: Tensor | Sequence[int],
    *,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    first_sample: int = 0,
    sampling: SamplingConfig | None = None,
    rounding: Literal["nearest", "truncate"] = "nearest",
    progress: bool | None = None,
) -> Iterator[Tensor]:
    """As `Pipeline.generate_many`, but whole batches, uint8 (B, H, W, channels) on the CPU."""
    everything = labels_on_host(labels, pipe.generator.config.num_classes)
    if batch_size != "auto" and (
        not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1
    ):
        raise ValueError(f"batch_size: expected 'auto' or an int >= 1, got {batch_size!r}")

    def run(start: int, stop: int) -> Tensor:
        part, number = everything[start:stop], first_sample + start
        return pipe(part, seed=seed, first_sample=number, sampling=sampling, rounding=rounding)

    run(0, 0)  # an empty batch has the other arguments checked: now, not when the first picture is asked for
    size = Size(batch_size, pipe.tokenizer.device)
    return _batches(run, len(everything), size, pipe.tokenizer.device, progress)


def one_by_one(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The pictures of all batches. Each owns its memory: to keep one is not to keep its batch."""
    for batch in batches:
        for picture in batch:
            yield picture.clone()


def _batches(
    run: Callable[[int, int], Tensor], total: int, size: Size, device: torch.device, progress: bool | None
) -> Iterator[Tensor]:
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    under_way: deque[_Sent] = deque()
    start = 0
    disable = None if progress is None else not progress  # None: a bar where stderr is a terminal
    with tqdm(total=total, desc="pictures", unit="img", disable=disable, file=sys.stderr, leave=False) as bar:
        while start < total or under_way:
            if start < total:
                stop, began = min(start + size.now, total), time.perf_counter()
                sent: _Sent | None
                try:
                    sent = _send(run(start, stop), side)
                    if size.growing:
                        sent.received()
                except torch.OutOfMemoryError:
                    if not size.shrink():
                        raise
                    sent = None
                if sent is None:  # here the exception no longer keeps the tensors of the batch that failed
                    torch.cuda.empty_cache()
                    continue
                size.ran(stop - start, time.perf_counter() - began)
                under_way.append(sent)
                start = stop
            ahead = 1 if side is not None and not size.growing and start < total else 0
            while len(under_way) > ahead:
                pictures = under_way.popleft().received()
                bar.update(len(pictures))
                yield pictures


class _Sent(NamedTuple):
    """Pictures that are on the host once the event has happened."""

    pictures: Tensor
    event: torch.cuda.Event | None

    def received(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.pictures


def _send(pictures: Tensor, side: torch.cuda.Stream | None) -> _Sent:
    if side is None:
        return _Sent(pictures, None)
    host = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)  # reused by PyTorch
    side.wait_stream(torch.cuda.current_stream(pictures.device))
    with torch.cuda.stream(side):
        host.copy_(pictures, non_blocking=True)
    pictures.record_stream(side)
    return _Sent(host, side.record_event())


# ---------------------------------------------------------------------------------------------------------------
# The size of a batch


class Size:
    """How many pictures the next batch should have: `now`.

    "auto" doubles it while that gives a tenth more pictures a second and the next size fits, up to `LARGEST`. All that
    is computed meanwhile is used. Each size runs twice and the second time counts, because the first also pays for
    captures, tuning and new memory.
    """

    LARGEST = 512

    def __init__(self, asked: BatchSize, device: torch.device) -> None:
        self.growing = asked == "auto"
        self.now = asked if isinstance(asked, int) else 16 if device.type == "cuda" else 1
        self._on_cpu = device.type == "cpu"
        self._best, self._rate, self._warm = self.now, 0.0, False
        self._before = _bytes("self/status", "VmRSS")

    def ran(self, count: int, seconds: float) -> None:
        """To be told after every batch."""
        if not self.growing or count < self.now:
            return
        if not self._warm:
            self._warm = True
            return
        rate = count / seconds
        if rate < 1.1 * self._rate:
            self.now, self.growing = self._best, False
            return
        self._best, self._rate, self._warm = self.now, rate, False
        if 2 * self.now > self.LARGEST or (self._on_cpu and not self._twice_fits()):
            self.growing = False
        else:
            self.now *= 2

    def shrink(self) -> bool:
        """To be told when a batch did not fit: whether there is a smaller size to try."""
        if not self.growing or self.now == 1:
            return False
        self.now, self.growing = self.now // 2, False
        return True

    def _twice_fits(self) -> bool:
        """Twice the batch takes at most twice the memory, be what this one took free again or not."""
        taken = _bytes("self/status", "VmHWM") - self._before
        left = _bytes("meminfo", "MemAvailable")
        with suppress(OSError, ValueError):  # the container's limit; "max" where it has none
            left = min(left, int(Path("/sys/fs/cgroup/memory.max").read_text()) - _bytes("self/status", "VmRSS"))
        return 2 * taken <= left


def _bytes(file: str, field: str) -> int:
    """A figure out of /proc; 0 where there is none, so that speed alone decides."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
