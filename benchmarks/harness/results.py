"""Results files: JSON lines, every raw sample, each run under a line that describes its environment.

A file holds records of three kinds. "environment" opens a run; "row" is one measured case with its samples in
seconds; "note" says what a reader of the run should know, such as what was left out and why.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.conditions import Watch, nvml
from benchmarks.harness.environment import environment

Row = dict[str, Any]
TARGET_ERROR = 0.01  # relative standard error of the median at which a measurement ends before its time is up
FOLDER = Path(__file__).parents[1] / "results"


class Results:
    """Writes one run to a results file, or nowhere when no file is named."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(path) if path else None
        self._watch = _watch()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write(environment())

    def row(
        self, bench: str, case: Mapping[str, Any], samples: Mapping[str, Sequence[float]], **numbers: Any
    ) -> Row:
        """Writes one measured case and returns it.

        Args:
            bench: which benchmark; rows of one benchmark have the same keys.
            case: what was measured: sizes, dtype, preset.
            samples: candidate -> seconds of each call.
            numbers: what else belongs to the case, such as bytes and FLOP of one call. "conditions" says what the
                machine was doing (`benchmarks.harness.conditions`); without it, those since the last row are written.
        """
        medians = {name: statistics.median(values) for name, values in samples.items()}
        conditions = numbers.pop("conditions", None) or self._watch.result()
        self._watch = _watch()
        row = {"kind": "row", "bench": bench, "case": dict(case), "median_s": medians, **numbers}
        row["conditions"] = conditions
        return self.write({**row, "samples_s": {name: list(values) for name, values in samples.items()}})

    def note(self, text: str) -> None:
        """Writes what a reader of this run should know."""
        self.write({"kind": "note", "text": text})

    def write(self, record: Row) -> Row:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


def read(paths: Iterable[str | os.PathLike[str]]) -> list[Row]:
    """The rows of results files. Rows of one run share one environment, under "environment".

    An environment gets two more keys: "file", the name of its file, and "notes", the texts of the run's notes.
    """
    rows: list[Row] = []
    for record, run in _with_environments(paths):
        if record["kind"] == "note":
            run["notes"].append(record["text"])
        elif record["kind"] == "row":
            rows.append({**record, "environment": run})
    return rows


def read_others(paths: Iterable[str | os.PathLike[str]], kind: str) -> list[Row]:
    """The records of another kind, such as "test" and "command", which `benchmarks.gpu` writes."""
    return [record for record, _ in _with_environments(paths) if record["kind"] == kind]


def _with_environments(paths: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every record but environments, each with the environment of its run. Lines that were cut off are left out."""
    for path in paths:
        run: dict[str, Any] = {"notes": []}
        for line in Path(path).read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the process was killed while it wrote
                continue
            if record["kind"] == "environment":
                run = {**record, "file": Path(path).name, "notes": []}
            else:
                yield record, run


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile)."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = (ordered[min(int(share * len(ordered)), last)] for share in (0.2, 0.8))
    return statistics.median(ordered), low, high


def _watch() -> Watch:
    return Watch(nvml() if torch.cuda.is_available() else None)


def median_error(samples: Sequence[float]) -> float:
    """Standard error of the median as a share of the median, without an assumption on the distribution.

    The ranks n/2 - sqrt(n)/2 and n/2 + sqrt(n)/2 enclose the median with the probability of one standard error to each
    side (binomial distribution of the number of samples below it). Infinite for fewer than three samples.
    """
    count = len(samples)
    if count < 3:
        return math.inf
    ordered = sorted(samples)
    low, high = (count - math.sqrt(count)) / 2, (count + math.sqrt(count)) / 2
    first, last = ordered[max(0, math.floor(low))], ordered[min(count - 1, math.ceil(high) - 1)]
    return (last - first) / 2 / statistics.median(ordered)


def default_file(device: str) -> Path:
    """`<machine>-<device>-<date>.jsonl` in `benchmarks/results`."""
    about = environment()
    name = str(about["gpu" if device == "cuda" else "cpu"]).lower()
    machine = re.sub("[^a-z0-9]+", "-", re.sub(r"\(.*?\)|processor", "", name)).strip("-")
    return FOLDER / f"{machine}-{device}-{about['time'][:10]}.jsonl"
