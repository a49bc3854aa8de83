"""Runs that are killed at random moments, in one process and in two in turns, end as one that was not.

`TITOK_TRAINING_KILLS=20 python -m pytest tests/training/test_killed_runs.py` kills a run of every recipe 20 times. By
default, runs of two recipes are killed twice.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Started, start_processes, wait_for
from recipes import KINDS, train
from test_training import content

from titok.training.checkpoint import read_run_info
from titok.training.folder import CHECKPOINT

ASKED = os.environ.get("TITOK_TRAINING_KILLS")
KILLS = int(ASKED or "2")
CHANGES: dict[str, Any] = {
    "steps": 15 * KILLS, "micro_batch_size": 2, "checkpoint_every": 3, "keep_last": 2, "keep_every": 50,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS if ASKED else ("decoder", "vit"))
def test_killed_runs_end_as_one_that_was_not(kind: str, tmp_path: Path) -> None:
    train(kind, tmp_path / "whole", CHANGES)
    out, draw = tmp_path / "killed", random.Random(kind)
    code = f"train({kind!r}, Path({str(out)!r}), {CHANGES!r}, resume=True)"
    killed = 0
    for attempt in range(10 * KILLS):
        started = start_processes(1 + attempt % 2, code)
        wait_for_progress(out, started)
        if killed < KILLS:
            time.sleep(draw.uniform(0, 0.15))  # a few steps and checkpoints
            killed += kill(started)
        errors = wait_for(started)
        if all(process.exitcode == 0 for process, _ in started):
            break
        # One of two processes may end by itself in the moment in which the other is killed.
        assert all(process.exitcode in (0, -signal.SIGKILL) for process, _ in started), errors
    assert killed == KILLS
    assert content(tmp_path / "whole") == content(out)


def kill(started: list[Started]) -> bool:
    """Kills processes. False where one of them has ended already; then none is killed."""
    if not all(process.is_alive() for process, _ in started):
        return False
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none reacts to the end of another
        for process, _ in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
    return True


def wait_for_progress(out: Path, started: list[Started]) -> None:
    """Waits until a run has written another checkpoint than the one that it found, or has ended."""
    before = step_of(out)
    deadline = time.monotonic() + 200
    while step_of(out) == before and any(process.is_alive() for process, _ in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def step_of(out: Path) -> int:
    """The step of the checkpoint of a run; 0 where there is none."""
    try:
        step: int = read_run_info(out / CHECKPOINT)["step"]
    except ValueError:
        return 0
    return step
