"""Did anything get slower? `python -m benchmarks.regression before.json after.json`

Both files come from the same command, run at two commits: `--benchmark-json=before.json` at the first one, and
`--benchmark-json=after.json` at the second one:

    python -m pytest benchmarks/bench_models.py --benchmark-only --benchmark-json=before.json

More files with benchmarks of ops may be named after benchmarks/bench_models.py, which has to be among them. Each time
is divided by the time of the calibration product in the same run, so that runs on a busy or on another machine can be
compared. The exit status is 1 if the calibrated minimum of any benchmark grew by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

CALIBRATION = "calibration"  # the group of the benchmark that all others are divided by


class Change(NamedTuple):
    """One benchmark before and after, in multiples of the calibration's time."""

    name: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument(
        "--tolerance", type=float, default=0.15, help="growth that counts as noise (default: %(default)s)"
    )
    return p


def calibrated(path: Path) -> dict[str, float]:
    """Benchmark -> its fastest call, which noise disturbs least, in multiples of the calibration's fastest call.

    Raises:
        ValueError: the file cannot be read, or does not hold exactly one calibration.
    """
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
        found = {b["fullname"]: (b["group"], b["stats"]["min"]) for b in benchmarks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file of --benchmark-json, got {error!r:.200}") from error
    yardsticks = [seconds for group, seconds in found.values() if group == CALIBRATION]
    if len(yardsticks) != 1:
        raise ValueError(
            f"{path}: expected one benchmark of group {CALIBRATION!r}, got {len(yardsticks)}; name "
            "benchmarks/bench_models.py, which has it, in the command that writes the file"
        )
    return {name: seconds / yardsticks[0] for name, (group, seconds) in found.items() if group != CALIBRATION}


def compare(before: Path, after: Path) -> list[Change]:
    """The benchmarks that both files have, the one that slowed down most first."""
    first, second = calibrated(before), calibrated(after)
    changes = [Change(name, first[name], second[name]) for name in first if name in second]
    return sorted(changes, key=lambda change: -change.ratio)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        changes = compare(arguments.before, arguments.after)
    except ValueError as error:
        parser().error(str(error))
    if not changes:
        parser().error(f"{arguments.after}: expected a benchmark that {arguments.before} has too, got none")
    slower = [change for change in changes if change.ratio > 1 + arguments.tolerance]
    for change in changes:
        mark = "slower" if change in slower else ""
        print(
            f"{change.ratio:6.2f}x  {change.before:10.3f} -> {change.after:10.3f}  {change.name} {mark}".rstrip()
        )
    print(f"{len(slower)} of {len(changes)} slower by more than {arguments.tolerance:.0%}, calibrated")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
