"""`benchmarks.gpu_counts`: docs/performance.md has its figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
from benchmarks import gpu_counts

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "performance.md").read_text()


def test_bytes_and_flop_of_the_pixel_decoder() -> None:
    for name, values in gpu_counts.pixel_decoder().items():
        assert f"| {name} | {' | '.join(gpu_counts.rounded(name, values))} |" in TEXT


def test_arithmetic() -> None:
    section = " ".join(TEXT.partition("## On a GPU: counted")[2].split())
    for name, value in gpu_counts.choices().items():
        shown = f"{100 * value:.1f}%" if name.startswith("multiprocessors") else gpu_counts.figure(value)
        if name.endswith(", MB"):
            shown = f"{value:.0f} MB"
        assert re.search(rf"(?<![\d.,]){re.escape(shown)}(?!\d)", section), (name, shown)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_launches(fused: bool) -> None:
    pytest.importorskip("triton")
    column = 3 if fused else 2
    for name, count in gpu_counts.launches(fused=fused).items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", TEXT, re.MULTILINE)
        assert row.split("|")[1 + column].strip() == gpu_counts.figure(round(count, 1))
