"""From JSON lines to figures: everything that tables and plots show is derived here from raw samples."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._results import quantiles


def read(paths: Iterable[str | os.PathLike[str]]) -> Iterator[dict[str, Any]]:
    """Rows of result files, each with the environment that it was measured in under "environment"."""
    for path in paths:
        environment: dict[str, Any] = {}
        for line in Path(path).read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "environment":
                environment = {**record, "file": Path(path).name}
            elif record["kind"] == "row":
                yield {**record, "environment": environment}


def seconds(row: dict[str, Any], which: str = "whole") -> tuple[float, float, float]:
    """Of one batch, (median, 20th, 80th percentile): each part's samples times how often an image needs the part."""
    parts = [(times, quantiles(row["samples_s"][part])) for part, times in row[which].items() if times]
    median, low, high = (sum(times * figures[i] for times, figures in parts) for i in range(3))
    return median, low, high


def rate(row: dict[str, Any], which: str = "whole") -> tuple[float, float, float]:
    """Images per second: (median, low, high)."""
    median, low, high = seconds(row, which)
    batch = row["case"]["batch"]
    return batch / median, batch / high, batch / low


def fastest(row: dict[str, Any]) -> float:
    """Images per second at the fastest call of each part: what a machine that others use disturbs least."""
    spent = sum(times * min(row["samples_s"][part]) for part, times in row["whole"].items())
    return float(row["case"]["batch"] / spent)


def achieved(row: dict[str, Any]) -> float:
    """FLOP/s of whole images, by formula."""
    return float(row["flops"] * rate(row)[0])


def ceilings(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """FLOP/s of torch.mm and bytes/s of a copy, by dtype, as measured in the same runs."""
    found: dict[str, float] = {}
    for row in rows:
        if row["bench"] == "ceiling":
            for name, work in row["work"].items():
                found[f"{name} {row['case']['dtype']}"] = work / statistics.median(row["samples_s"][name])
    return found


def of(rows: Sequence[dict[str, Any]], bench: str, **case: Any) -> list[dict[str, Any]]:
    return [r for r in rows if r["bench"] == bench and all(r["case"].get(k) == v for k, v in case.items())]


def number(value: float | None, digits: int = 3) -> str:
    """Short, in plain notation: 410, 4.1, 0.041."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return (
        f"{float(text):,.0f}" if abs(value) >= 10 ** (digits - 1) else (f"{float(text):f}".rstrip("0").rstrip("."))
    )


def speedup_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the headline table: rows of bench "speedup", in order, with ratios to each DiT row."""
    ceiling = ceilings(rows)
    sides = of(rows, "speedup")
    rivals = [r for r in sides if r["case"]["family"] == "dit"]
    header = [
        "",
        "px",
        "dtype",
        "batch",
        "tokens",
        "steps",
        "M params",
        "GFLOP/img",
        "counted",
        "img/s",
        "20-80%",
        "fastest",
    ]
    header += ["img/s, no pixels", "TFLOP/s", "of mm", "peak GB"]
    header += [f"x {r['case']['name'].removeprefix('DiT-XL/2 ')} ({r['case']['steps']})" for r in rivals]
    header += ["paper, A100", "timed"]
    cells = []
    for row in sides:
        case = row["case"]
        median, low, high = rate(row)
        mm = ceiling.get(f"mm {case['dtype']}")
        peak = row.get("peak_bytes")
        line = [
            case["name"], str(case["resolution"]), case["dtype"], str(case["batch"]), str(case["tokens"]),
            str(case["steps"]), number(case["parameters"] / 1e6), number(row["flops"] / 1e9, 4),
            number(row["flops_counted"] / 1e9, 4), number(median), f"{number(low)}-{number(high)}",
            number(fastest(row)), number(rate(row, "bare")[0]), number(achieved(row) / 1e12),
            f"{achieved(row) / mm:.0%}" if mm else "-", number(peak / 1e9) if peak else "-",
        ]  # fmt: skip
        same = (case["resolution"],)
        line += [number(median / rate(r)[0]) if same == (r["case"]["resolution"],) else "-" for r in rivals]
        line += [number(case["paper"]), case["note"] or "whole images"]
        cells.append(line)
    return header, cells


def turned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The same table with a column for each row: fits where many figures belong to few things."""
    columns = list(zip(header, *cells, strict=True))
    return list(columns[0]), [list(column) for column in columns[1:]]


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(header: Sequence[str], cells: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a table: whole where the output is a file or a pipe, folded to the width of a terminal."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def source(rows: Sequence[dict[str, Any]]) -> str:
    """Machine, date, commit and command behind some rows, a line for each run."""
    seen = {}
    for row in rows:
        e = row["environment"]
        machine = e.get("gpu") or f"{e.get('cpu')}, {e.get('threads')} threads"
        changed = " with changes" if e.get("changed") else ""
        seen[e.get("time")] = (
            f"{machine}; torch {e.get('torch')}; {str(e.get('time'))[:10]}; "
            f"commit {str(e.get('commit'))[:10]}{changed}; `{e.get('command')}`"
        )
    return "\n".join(seen.values())


def ladder_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Each rung's rate, its ratio to the first and its share of torch.mm in its dtype."""
    rungs, ceiling, cells = of(rows, "ladder"), ceilings(rows), []
    for row in rungs:
        median, low, high = rate(row)
        mm = ceiling.get(f"mm {row['case']['dtype']}")
        share = f"{achieved(row) / mm:.0%}" if mm else "-"
        speedup = median / rate(rungs[0])[0]
        case = row["case"]
        figures = [case["name"], case["dtype"], str(case["batch"]), number(median)]
        cells.append([*figures, f"{number(low)}-{number(high)}", number(speedup), share])
    return ["rung", "dtype", "batch", "img/s", "20-80%", "x", "of mm"], cells
