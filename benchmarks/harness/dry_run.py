"""Checks the arguments of a benchmark and runs nothing: `python -m benchmarks.harness.dry_run MODULE ARGUMENTS`."""

from __future__ import annotations

import importlib
import sys


def main(argv: list[str]) -> None:
    name, *arguments = argv
    importlib.import_module(name).parser().parse_args(arguments)
    print(f"would run: python -m {name} {' '.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
