"""Processes that a launcher has, or has not, started."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from titok.processes import process_group

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_no_group() -> None:
    with process_group() as group:
        assert group == (0, 1)
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "4"},
            "WORLD_SIZE is 4, but MASTER_ADDR, MASTER_PORT is not set: start",
        ),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected an integer, as a launcher sets it, got 'two'"),
    ],
)
def test_a_job_without_a_launcher_is_told(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), process_group():
        pass


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_never_meet_end(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with (
        pytest.raises(
            TimeoutError, match="the 2 processes that WORLD_SIZE announces did not all start within 1 s"
        ),
        process_group(meeting_seconds=1),
    ):
        pass
    assert time.monotonic() - began < 30
    assert not dist.is_initialized()


@pytest.mark.slow
def test_processes_that_meet_form_a_group() -> None:
    code = """
from titok.processes import process_group
import torch, torch.distributed as dist
with process_group() as (rank, world_size):
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    print(f"group {world_size} {int(total)}\\n", end="", flush=True)  # in one piece
"""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    run = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert run.stdout.count("group 2 3") == 2, run.stderr
