"""A few kills at random moments. `TITOK_KILLS` sets how many; `python tests/kills.py --help` has more options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = os.environ.get("TITOK_KILLS", "8")


@pytest.mark.slow
def test_killed_commands_resume_to_equal_files() -> None:
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, str(script), "--kills", KILLS, "--without-torchrun"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"{KILLS} kills in all" in run.stdout
