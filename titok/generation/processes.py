"""The group of processes that a launcher such as torchrun has started, for commands that share their work."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator

import torch.distributed as dist

MEETING_SECONDS = 300.0  # in which all processes must have started
# Later, one process may wait for another for hours. It does not wait forever: the launcher ends all processes when
# one fails, and a connection that breaks raises.
WORK = datetime.timedelta(days=30)


@contextlib.contextmanager
def process_group(meeting_seconds: float = MEETING_SECONDS) -> Iterator[tuple[int, int]]:
    """Within, the processes that a launcher has started form a group of `torch.distributed`.

    The launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Where it sets none, or a WORLD_SIZE of 1, there is
    no group.

    Args:
        meeting_seconds: how long to wait for all processes to start.

    Yields:
        the rank of this process and the number of processes.

    Raises:
        ValueError: variables are missing or no numbers, as in a job that sets RANK and WORLD_SIZE without a launcher.
        TimeoutError: the other processes did not start in time.
    """
    rank = _as_number("RANK", os.environ.get("RANK", "0"))
    world_size = _as_number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1
        return
    needed = {
        "RANK": os.environ.get("RANK"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR"),
        "MASTER_PORT": os.environ.get("MASTER_PORT"),
    }
    if missing := [name for name, value in needed.items() if not value]:
        raise ValueError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start the command through torchrun, or "
            "unset WORLD_SIZE and RANK for one process"
        )
    store = _meet(rank, world_size, meeting_seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=WORK)
    try:
        yield rank, world_size
    finally:
        dist.destroy_process_group()


def _as_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}: expected an integer, as a launcher sets it, got {text!r}")
    return int(text)


def _meet(rank: int, world_size: int, seconds: float) -> dist.Store:
    """The store of the group, once all processes have connected to it."""
    deadline = time.monotonic() + seconds
    late = f"the {world_size} processes that WORLD_SIZE announces did not all start within {seconds:g} s"
    advice = "start the command through torchrun, or unset WORLD_SIZE and RANK for one process"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
        store.set(f"titok/{rank}", "here")
        names = [f"titok/{other}" for other in range(world_size)]
        # In short waits, because Ctrl-C has no effect within one.
        while not store.check(names):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{late}: {advice}")
            time.sleep(0.1)
    except RuntimeError as error:  # of the store: no connection, or its first process has ended
        raise TimeoutError(f"{late}: {advice}") from error
    return store
