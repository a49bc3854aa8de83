"""The tests where Triton is not installed, as beside a PyTorch for CPUs alone: what needs it is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# `None` in sys.modules makes an import raise ModuleNotFoundError.
RUN = "import sys; sys.modules['triton'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.slow
def test_no_test_fails_for_want_of_triton() -> None:
    """Every file is collected, and the tests run that are most likely to need Triton; all would take minutes."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu", f"--ignore={__file__}"]
    options += ["-k", "triton or small_cases or gpu_results", str(TESTS)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *options],
        cwd=TESTS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " skipped" in done.stdout
