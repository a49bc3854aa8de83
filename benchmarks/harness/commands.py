"""Commands with time limits: each runs in a process group of its own, and its output is kept line by line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

GRACE = 3.0  # seconds between the request to end and the kill


class Outcome(NamedTuple):
    """How a command ended.

    Attributes:
        seconds: that it ran.
        status: its exit status; None if it was stopped at its limit, or could not be started.
        reason: why it has no exit status; empty if it has one.
    """

    seconds: float
    status: int | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """ "ok", or in a few words what went wrong."""
        if self.status is None:
            return self.reason
        return "ok" if self.status == 0 else f"exit status {self.status}"


def run_limited(
    command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str], folder: Path
) -> Outcome:
    """Runs a command for at most `limit` seconds. Nothing that it started outlives this call.

    Every line of its output, of both streams, goes to the screen and to `log` as soon as it is written. At the limit,
    the process group of the command is asked to end, and killed `GRACE` seconds later.

    Args:
        log: is appended to.
        environment: of the command, all of it.
        folder: in which the command runs.
    """
    started = time.monotonic()
    with log.open("a") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=dict(environment),
                cwd=folder,
                preexec_fn=os.setpgrp,  # not a new session, which could outlive a kill of this process
            )
        except OSError as error:
            return Outcome(time.monotonic() - started, None, f"not started: {error}")
        reader = threading.Thread(target=_copy_lines, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            process.wait(limit)
            outcome = Outcome(time.monotonic() - started, process.returncode)
        except subprocess.TimeoutExpired:
            outcome = Outcome(time.monotonic() - started, None, f"stopped after {limit:.0f} s")
        finally:
            _end_group(process)
            reader.join(GRACE)
    return outcome


def _copy_lines(stream: IO[str] | None, file: IO[str]) -> None:
    for line in stream or ():
        file.write(line)
        file.flush()
        sys.stdout.write(line)
        sys.stdout.flush()


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends what is left of the process group of a command: also processes that the command itself left behind."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if not _signal_group(process.pid, number):
            break
        end = time.monotonic() + seconds
        while time.monotonic() < end and _signal_group(process.pid, 0):
            process.poll()  # a command that has ended stays in its group until it is waited for
            time.sleep(0.05)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Sends a signal to a process group. False where no process of the group is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
