"""Processes that form a group, for code that trains. See `forked`."""

from __future__ import annotations

import textwrap
from pathlib import Path

import forked
from forked import Started, wait_for

__all__ = ["Started", "in_processes", "start_processes", "wait_for"]

_NAMES = "from recipes import KINDS, train\n"


def start_processes(count: int, code: str) -> list[Started]:
    """Starts code in `count` processes; it may use `train`, `KINDS`, and what `forked.start_processes` gives."""
    return forked.start_processes(count, _NAMES + textwrap.dedent(code), Path(__file__).parent)


def in_processes(count: int, code: str) -> None:
    """Runs code in `count` processes, as `start_processes` takes it, to its end."""
    forked.in_processes(count, _NAMES + textwrap.dedent(code), Path(__file__).parent)
