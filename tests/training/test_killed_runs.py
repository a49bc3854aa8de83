"""Runs with a discriminator that are killed at random moments, in one process and in two, end as one that was not.

`TITOK_TRAINING_KILLS` sets the number of kills (4).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from recipes import train
from test_distributed import start_processes
from test_training import content

from titok.training.checkpoint import read_run_info
from titok.training.folder import CHECKPOINT

KILLS = int(os.environ.get("TITOK_TRAINING_KILLS", "4"))
CHANGES: dict[str, Any] = {
    "steps": 40 * KILLS, "micro_batch_size": 2, "checkpoint_every": 3, "keep_last": 2, "keep_every": 50,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_runs_end_as_one_that_was_not(tmp_path: Path) -> None:
    train("decoder", tmp_path / "whole", CHANGES)
    out, draw = tmp_path / "killed", random.Random(0)
    code = f"train('decoder', Path({str(out)!r}), {CHANGES!r}, resume=True)"
    killed = 0
    for attempt in range(10 * KILLS):
        processes = start_processes(1 + attempt % 2, code)
        try:
            wait_for_progress(out, processes)
            if killed < KILLS:
                time.sleep(draw.uniform(0, 1.0))
                victims = [p for p in processes if p.poll() is None]
                killed += bool(victims)
                for process in victims:
                    process.send_signal(signal.SIGKILL)
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if all(process.returncode == 0 for process in processes):
            break
        assert all(process.returncode == -signal.SIGKILL for process in processes), "\n".join(errors)
    assert killed == KILLS
    assert content(tmp_path / "whole") == content(out)


def wait_for_progress(out: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Waits until a run has written another checkpoint than the one that it found, or has ended."""
    before = step_of(out)
    deadline = time.monotonic() + 200
    while step_of(out) == before and any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def step_of(out: Path) -> int:
    """The step of the checkpoint of a run; 0 where there is none."""
    try:
        step: int = read_run_info(out / CHECKPOINT)["step"]
    except ValueError:
        return 0
    return step
