"""Writes docs/performance.md from the results files: `python -m benchmarks.report`.

The prose is in benchmarks/performance.template.md. Each `{{name}}` in it stands for a number or a table, which is
computed from benchmarks/results/*.jsonl (FLOP: from the formulas of benchmarks/harness/flops.py). To change a
figure, measure again into a results file and run this command. `python -m benchmarks.plot` draws the plots.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.figures import figures
from benchmarks.harness.results import FOLDER, read

TEMPLATE = Path(__file__).parent / "performance.template.md"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with status 1 if the document is not what would be written",
    )
    return p


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with every placeholder replaced.

    Raises:
        ValueError: a placeholder has no value, or a value no placeholder.
    """
    names = set(PLACEHOLDER.findall(template))
    if unknown := sorted(names - set(values)):
        raise ValueError(f"template: no figure is named {', '.join(unknown)}")
    if unused := sorted(set(values) - names):
        raise ValueError(f"template: it does not use the figures {', '.join(unused)}")
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def document() -> str:
    """The text of docs/performance.md."""
    return fill(TEMPLATE.read_text(), figures(read(sorted(FOLDER.glob("*.jsonl")))))


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    text = document()
    if not arguments.check:
        DOCUMENT.write_text(text)
        print(DOCUMENT)
        return 0
    if DOCUMENT.read_text() == text:
        return 0
    print(f"{DOCUMENT} is not what `python -m benchmarks.report` writes", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
