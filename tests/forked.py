"""Processes, alone or as a group of `torch.distributed`, started quickly.

They are forked from a server that has imported PyTorch and titok once, because importing takes longer than the tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import textwrap
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor", "titok.training", "titok.evaluation.reconstruction"]
)


class Started(NamedTuple):
    """A process, and the file that has what it wrote to stderr."""

    process: BaseProcess
    errors: Path


def _run(code: str, folders: list[str], environment: dict[str, str], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(environment)
    sys.path[:0] = folders
    import torch

    from titok.processes import own_part, process_group

    torch.set_num_threads(1)
    try:
        with process_group():
            exec(code, {"Path": Path, "own_part": own_part, "torch": torch})
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def start_processes(count: int, code: str, folder: Path, **environment: str) -> list[Started]:
    """Starts code in `count` processes that form a group.

    The code may use `torch`, `Path` and `own_part`, and may import the modules in `folder` and beside this file.
    `environment` holds variables that these processes get. titok's extension reads TITOK_CPU_ISA when it is first
    used, which is after the fork.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    folders = [str(folder), str(Path(__file__).parent)]
    started = []
    for rank in range(count):
        errors = Path(tempfile.mkstemp(suffix=".stderr")[1])
        arguments = (textwrap.dedent(code), folders, {**shared, "RANK": str(rank)}, errors)
        process = _SERVER.Process(target=_run, args=arguments, daemon=True)
        process.start()
        started.append(Started(process, errors))
    return started


def wait_for(started: list[Started], seconds: float = 900) -> str:
    """Waits until processes have ended, and ends them where that takes too long. Returns what they wrote to stderr."""
    deadline = time.monotonic() + seconds
    for process, _ in started:
        process.join(max(0.0, deadline - time.monotonic()))
    written = []
    for process, errors in started:
        process.kill()
        process.join()
        written.append(errors.read_text())
        with contextlib.suppress(FileNotFoundError):
            errors.unlink()
    return "\n".join(written)


def in_processes(count: int, code: str, folder: Path, **environment: str) -> None:
    """Runs code in `count` processes, as `start_processes` takes it, to its end."""
    started = start_processes(count, code, folder, **environment)
    errors = wait_for(started)
    assert not any(process.exitcode for process, _ in started), errors
