"""Tables of what `benchmarks.gpu` measured: `python -m benchmarks.gpu_report runs/gpu/gpu-20260101-120000.jsonl`.

It prints Markdown: the machine, how each command ended, the tests, and every measurement with its source. The file may
be that of a run that was cut off. Measurements of a file in benchmarks/results/ also stand in docs/performance.md,
which `python -m benchmarks.report` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import gpu_tables
from benchmarks.harness.results import read, read_others


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results files of benchmarks.gpu")
    return p


def report(files: Sequence[Path]) -> str:
    """Markdown of everything in these files."""
    blocks = []
    for machine in read_others(files, "machine"):
        facts = "\n".join(
            f"- {name}: {value}" for name, value in machine.items() if name not in ("kind", "reasons")
        )
        blocks.append(f"## Machine\n\n{facts}")
    if commands := read_others(files, "command"):
        blocks.append(f"## Commands\n\n{gpu_tables.commands(commands)}")
    if tests := read_others(files, "test"):
        blocks.append(f"## Tests\n\n{gpu_tables.tests(tests)}")
    blocks.append(f"## Measurements\n\n{gpu_tables.measured(read(files))}")
    return "\n\n".join(blocks)


def main(argv: list[str] | None = None) -> None:
    print(report(parser().parse_args(argv).files))


if __name__ == "__main__":
    main()
