"""A plugin of pytest that writes a line for each test as soon as it has ended.

    python -m pytest -p benchmarks.harness.pytest_lines --lines FILE --lines-of gpu-tests ...

It appends to the file a record of the kind "test" for each test, with its outcome and seconds. The last record, of the
kind "tests", has the numbers of those that passed, failed and were skipped. A run in which no test was executed is an
error (exit status 5), also where all tests that were selected have been skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lines")
    group.addoption("--lines", metavar="FILE", help="append a line of JSON for each test")
    group.addoption("--lines-of", metavar="NAME", default="", help="the name of this run in the lines")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("lines")
    if path and not hasattr(config, "workerinput"):  # of the processes of pytest-xdist only the first one writes
        config.pluginmanager.register(Lines(Path(path), config.getoption("lines_of")), "lines-writer")


class Lines:
    """Writes the lines of one run."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.outcomes: Counter[str] = Counter()
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
            if report.failed and report.nodeid in self._failed:
                return  # the end of a test that had failed before
            self._record(report.nodeid, report.outcome, report.duration, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._record(report.nodeid, "failed", 0.0, report)

    def _record(self, test: str, outcome: str, seconds: float, report: Any) -> None:
        if outcome == "failed":
            self._failed.add(test)
        self.outcomes[outcome] += 1
        record = {
            "kind": "test",
            "part": self.name,
            "test": test,
            "outcome": outcome,
            "seconds": round(seconds, 3),
        }
        if outcome != "passed":
            record["message"] = _message(report)
        self._write(record)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._write(
            {
                "kind": "tests",
                "part": self.name,
                **{name: self.outcomes[name] for name in ("passed", "failed", "skipped")},
            }
        )
        ran = self.outcomes["passed"] + self.outcomes["failed"]
        if not ran and not session.config.getoption("collectonly"):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _message(report: Any) -> str:
    """The last lines of what pytest says of a failure, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # (file, line, reason)
        return str(report.longrepr[2])
    lines = [line for line in str(report.longreprtext).splitlines() if line.startswith("E ")]
    return "\n".join(line[1:].strip() for line in lines[:8]) or str(report.longreprtext)[-400:]
