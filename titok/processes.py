"""The group of processes that a launcher such as torchrun has started, for commands that share their work."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

MEETING_SECONDS = 300.0  # in which all processes must have started
# Later, one process may wait for another for hours. It does not wait forever: the launcher ends all processes when
# one fails, and a connection that breaks raises.
WORK = datetime.timedelta(days=30)


@contextlib.contextmanager
def process_group(meeting_seconds: float = MEETING_SECONDS, *, gpu: bool = False) -> Iterator[tuple[int, int]]:
    """Within, the processes that a launcher has started form a group of `torch.distributed`.

    The launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Where it sets none, or a WORLD_SIZE of 1, there is
    no group.

    Args:
        meeting_seconds: how long to wait for all processes to start.
        gpu: whether they exchange tensors of GPUs, which the current device of each process holds.

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
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=WORK
    )
    try:
        yield rank, world_size
    finally:
        dist.destroy_process_group()


def _as_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}: expected an integer, as a launcher sets it, got {text!r}")
    return int(text)


def check_one_process() -> None:
    """Raises `ValueError` where a launcher has started several processes of a command that is made for one."""
    world_size = _as_number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size}, but this command runs in one process: start it without torchrun, or unset "
            "WORLD_SIZE and RANK"
        )


def is_distributed() -> bool:
    """Whether this process belongs to a group of `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()


def wait_for_all() -> None:
    """Returns when all processes of the group, if there is one, have called this. A signal is handled meanwhile.

    Raises:
        ConnectionError: another process has ended.
    """
    if not is_distributed():
        return
    with _clear_about_lost_processes():
        barrier = dist.barrier(async_op=True)
        # In short waits, because Python handles no signal within one.
        while not barrier.is_completed():
            time.sleep(0.02)
        barrier.wait()


def in_first_process(work: Callable[[], T]) -> T:
    """Calls `work` in the first process of the group; all processes return its result or raise its error.

    Raises:
        ConnectionError: another process has ended.
    """
    if not is_distributed():
        return work()
    outcome: list[Any] = [None, None]  # result and error
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    wait_for_all()  # `work` may take long, and `broadcast_object_list` handles no signal
    with _clear_about_lost_processes():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def _clear_about_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this run has ended before the work was done: give the same command again to go on"
        ) from error


def _meet(rank: int, world_size: int, seconds: float) -> dist.Store:
    """The store of the group, once all processes have connected to it."""
    deadline = time.monotonic() + seconds
    late = f"the {world_size} processes that WORLD_SIZE announces did not all start within {seconds:g} s"
    advice = "start the command through torchrun, or unset WORLD_SIZE and RANK for one process"
    try:
        store = _connected_store(seconds)
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


def _connected_store(seconds: float) -> dist.Store:
    """The store of the group. The connection is made by a thread, because a signal has no effect on it."""
    outcome: list[Any] = []

    def connect() -> None:
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
            outcome.append(store)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


# ---------------------------------------------------------------------------------------------------------------
# Tensors of all processes. Without a group, each function leaves its argument as it is.


def own_part() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def reduce_max(tensor: Tensor) -> None:
    """Replaces a bool tensor by its element-wise maximum over all processes."""
    if is_distributed():
        as_bytes = tensor.to(torch.uint8)
        with _clear_about_lost_processes():
            dist.all_reduce(as_bytes, dist.ReduceOp.MAX)
        tensor.copy_(as_bytes.bool())


def sum_of_all(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in the same order of summation in each."""
    if not is_distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with _clear_about_lost_processes():
        dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts).sum(dim=0)


def mean_of_all(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in the same order of summation in each."""
    return sum_of_all(tensor) / own_part()[1] if is_distributed() else tensor


def rows_in_first_process(rows: Tensor) -> Tensor | None:
    """The rows (n, ...) of all processes one after the other, by rank, in the first process; None in the others.

    The processes may have different numbers of rows.

    Args:
        rows: on the CPU, of the same dtype and the same further dimensions in all processes.
    """
    if not is_distributed():
        return rows
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with _clear_about_lost_processes():
        dist.all_gather(lengths, torch.tensor([len(rows)]))
        if dist.get_rank() > 0:
            if len(rows):
                dist.send(rows.contiguous(), dst=0)
            return None
        received = [rows]
        for rank, length in enumerate(lengths[1:], start=1):
            received.append(rows.new_empty(int(length), *rows.shape[1:]))
            if len(received[-1]):
                dist.recv(received[-1], src=rank)
    return torch.cat(received)


def broadcast(tensor: Tensor) -> Tensor:
    """The tensor that the first process has; it must have the same shape and dtype in all of them."""
    if not is_distributed():
        return tensor
    tensor = tensor.contiguous().clone()
    with _clear_about_lost_processes():
        dist.broadcast(tensor, src=0)
    return tensor
