"""The tables that commands print and documents show.

This file is longer than 400 lines because it holds every table of results on a CPU.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import measures
from benchmarks.harness.conditions import disturbances
from benchmarks.harness.results import TARGET_ERROR, Row, quantiles

Table = tuple[list[str], list[list[str]]]  # header, lines


def number(value: float | None, digits: int = 3) -> str:
    """A short number without exponent: 410, 4.1, 0.041; "-" for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    if abs(value) >= 10 ** (digits - 1):
        return f"{rounded:,.0f}"
    return f"{rounded:f}".rstrip("0").rstrip(".")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def with_error(value: float, row: Row) -> str:
    """A figure from the median time of a row, with the standard error of the median where that is not below 1%."""
    error = measures.error(row)
    if error < TARGET_ERROR:
        return number(value)
    return f"{number(value)} ± {'unknown' if math.isinf(error) else f'{error:.1%}'}"


def rounds_cell(row: Row) -> str:
    """How many calls were timed, and why no more: the error was below 1%, or the time was up."""
    count = min(len(row["samples_s"][part]) for part, times in row["calls"].items() if times)
    return f"{count}, {'error below 1%' if measures.error(row) < TARGET_ERROR else 'time up'}"


def checked_cell(row: Row) -> str:
    """Whether results of timed calls were compared with the plain path; "-" in results that do not say it."""
    if "checked" not in row:
        return "-"
    parts = [part for part, times in row["calls"].items() if times]
    done = [part for part in parts if part in row["checked"]]
    return "yes" if done == parts else ", ".join(done) or "no"


def mark(row: Row) -> str:
    """An asterisk for a row whose measurement was disturbed."""
    return "*" if disturbances(row.get("conditions")) else ""


def disturbance_notes(rows: Sequence[Row]) -> list[str]:
    """A line for each kind of disturbance that the asterisks in a table stand for."""
    found = dict.fromkeys("; ".join(disturbances(row.get("conditions"))) for row in rows)
    return [f"* disturbed: {text}" for text in found if text]


def sustain_table(rows: Sequence[Row]) -> Table:
    """The rows of "sustain": percentiles of the time of a batch, drift, and images per joule."""
    lines = []
    for row in measures.select(rows, "sustain"):
        case, joules, count = row["case"], row["joules"], len(row["samples_s"]["image"])
        lines.append(
            [
                case["name"] + mark(row),
                str(case["batch"]),
                str(count),
                *(number(1e3 * row[name]) for name in ("p50", "p90", "p99")),
                number(row["drift"]),
                number(count * case["batch"] / joules) if joules else "power cannot be read",
            ]
        )
    return ["", "batch", "calls", "p50, ms", "p90, ms", "p99, ms", "drift", "images per joule"], lines


def speedup_table(rows: Sequence[Row]) -> Table:
    """The rows of "speedup" in one run, with the ratio of each to every DiT row of its resolution."""
    ceiling = measures.ceilings(rows)
    sides = measures.select(rows, "speedup")
    rivals = [row for row in sides if row["case"]["family"] == "dit"]
    lines = []
    for row in sides:
        case = row["case"]
        median, low, high = measures.rate(row)
        peak = row.get("peak_bytes")
        line = {
            "": case["name"] + mark(row),
            "px": str(case["resolution"]),
            "dtype": case["dtype"],
            "batch": str(case["batch"]),
            "tokens": str(case["tokens"]),
            "steps": str(case["steps"]),
            "M params": number(case["parameters"] / 1e6),
            "GFLOP/img": number(row["flops"] / 1e9, 4),
            "counted": number(row["flops_counted"] / 1e9, 4),
            "img/s": with_error(median, row),
            "20-80%": f"{number(low)}-{number(high)}",
            "calls": rounds_cell(row),
            "checked": checked_cell(row),
            "fastest": number(measures.fastest(row)),
            "img/s, no pixels": number(_rate_without_pixels(row)),
            "TFLOP/s": number(measures.achieved_flops(row) / 1e12),
            "of mm": percent(measures.share_of_mm(row, ceiling)),
            "peak GB": number(peak / 1e9 if peak else None),
        }
        for rival in rivals:
            name = rival["case"]["name"].removeprefix("DiT-XL/2 ")
            same_resolution = rival["case"]["resolution"] == case["resolution"]
            ratio = median / measures.rate(rival)[0] if same_resolution else None
            line[f"x {name} ({rival['case']['steps']})"] = number(ratio)
        line["paper, A100"] = number(case["paper"])
        line["published FID"] = number(case.get("fid"))
        line["timed"] = case["note"] or "whole images"
        lines.append(line)
    return list(lines[0]) if lines else [], [list(line.values()) for line in lines]


def _rate_without_pixels(row: Row) -> float | None:
    """None for a model that computes pixels in one pass."""
    return measures.rate(row, "calls_without_pixels")[0] if any(row["calls_without_pixels"].values()) else None


def ladder_table(rows: Sequence[Row]) -> Table:
    """Each rung's images per second, its ratio to the first rung, and its share of the matrix product in its dtype."""
    rungs, ceiling = measures.select(rows, "ladder"), measures.ceilings(rows)
    lines = []
    for row in rungs:
        case = row["case"]
        median, low, high = measures.rate(row)
        lines.append(
            [
                case["name"] + mark(row),
                case["dtype"],
                str(case["batch"]),
                with_error(median, row),
                f"{number(low)}-{number(high)}",
                number(median / measures.rate(rungs[0])[0]),
                percent(measures.share_of_mm(row, ceiling)),
            ]
        )
    return ["rung", "dtype", "batch", "img/s", "20-80%", "x", "of mm"], lines


def engine_table(row: Row) -> Table:
    """Every side of an "engine" row, with the median over the rounds of its time divided by titok's."""
    samples, batch = row["samples_s"], row["case"]["batch"]
    mm = measures.own_ceiling(row, "mm")
    lines = []
    for name in samples:
        if name in measures.CEILING_NAMES:
            continue
        median, low, high = quantiles(samples[name])
        achieved = row["work"][name] * batch / median
        ratio = measures.engine_ratio(row, name)
        lines.append(
            [
                name,
                number(batch / median),
                f"{number(batch / high)}-{number(batch / low)}",
                number(1e3 * median / batch),
                number(achieved / 1e9),
                percent(achieved / mm),
                "" if ratio is None else "{:.2f}x ({:.2f}-{:.2f})".format(*ratio),
            ]
        )
    return ["", "images/s", "20-80%", "ms an image", "GFLOP/s", "of mm", "titok is faster by"], lines


def stage_table(row: Row) -> Table:
    """Every stage of a "roofline" row: cost, floor, measured time, and what closing the gap would save."""
    lines = []
    for stage in measures.stages(row):
        saving = stage["s"] - stage["floor_s"]
        # Below the floor there is nothing to save: the stage is faster than the product that the floor is made of.
        save = "unknown" if not stage["known"] else number(1e3 * saving) if saving > 0 else "nothing"
        lines.append(
            [
                stage["stage"],
                number(stage["flops"] / 1e9),
                number(stage["bytes"] / 1e6),
                number(1e3 * stage["floor_s"]),
                stage["bound"],
                number(1e3 * stage["s"]),
                number(stage["gap"]) if stage["known"] else "too few calls",
                save,
            ]
        )
    return ["stage", "GFLOP", "least MB", "floor, ms", "bound by", "measured, ms", "gap", "could save, ms"], lines


def kernel_table(row: Row, count: int) -> Table:
    """The `count` kernels of a "kernel_times" row that take longest, with their share of all."""
    kernels = row["kernels"]
    total = sum(kernel["seconds"] for kernel in kernels.values())
    slowest = sorted(kernels, key=lambda name: -float(kernels[name]["seconds"]))[:count]
    lines = [
        [
            name if len(name) <= 80 else f"{name[:77]}...",
            number(kernels[name]["calls"]),
            number(1e3 * kernels[name]["seconds"]),
            percent(kernels[name]["seconds"] / total),
        ]
        for name in slowest
    ]
    return ["kernel", "calls", "ms", "share"], lines


def tuning_table(rows: Sequence[Row]) -> Table:
    """Every candidate of the rows of "tuning": median time, and the time of the table's own tile divided by it."""
    lines = []
    for row in rows:
        case, medians = row["case"], row["median_s"]
        first = next(iter(medians.values()))
        lines += [
            [case["kernel"], case["shape"], name, number(1e3 * median, 4), f"{first / median:.2f}x"]
            for name, median in medians.items()
        ]
    return ["kernel", "shape", "tile", "ms", "faster by"], lines


def op_table(rows: Sequence[Row]) -> Table:
    """Every case of an op: titok's time and rates, their share of the measured ceilings, and peer over titok.

    A row's environment is that of its run, whose row of "ceilings" has the rates of a copy and of a product.
    """
    peers = list(dict.fromkeys(name for row in rows for name in row["median_s"] if name != measures.OURS))
    lines = []
    for row in rows:
        ours = row["median_s"][measures.OURS]
        ceiling = row["ceilings"]
        speed = row["flops"] / ours
        lines.append(
            [
                " ".join(
                    f"{key}={value}" for key, value in row["case"].items() if key not in ("dtype", "direction")
                ),
                row["case"]["dtype"],
                number(1e3 * ours, 4),
                number(row["num_bytes"] / ours / 1e9),
                percent(row["num_bytes"] / ours / ceiling["copy"]),
                number(speed / 1e12),
                percent(speed / ceiling["product"]),
                *(f"{row['median_s'][name] / ours:.2f}x" if name in row["median_s"] else "-" for name in peers),
            ]
        )
    return ["case", "dtype", "ms", "GB/s", "of copy", "TFLOP/s", "of product", *peers], lines


def transposed(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """The same table with a column for each line, for a few lines of many values."""
    columns = list(zip(header, *lines, strict=True))
    return list(columns[0]), [list(column) for column in columns[1:]]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def show(header: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a table: folded to the width of a terminal, 160 columns wide in a file or pipe."""
    from rich.console import Console
    from rich.table import Table as Shown

    table = Shown(title=title, title_justify="left", header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def commit(environment: dict[str, Any]) -> str:
    """The commit of a run, marked if the files differed from it."""
    changed = " with uncommitted changes" if environment.get("changed") else ""
    return f"{str(environment.get('commit'))[:10]}{changed}"


def source(rows: Sequence[Row]) -> str:
    """Where rows come from, one line a run: machine, PyTorch, date, commit and command."""
    seen = {}
    for row in rows:
        about = row["environment"]
        cpu = f"{about.get('cpu')}, {about.get('threads')} threads, {about.get('cpu_capability')}"
        machine = about.get("gpu") or cpu
        seen[about.get("time")] = (
            f"{machine}; torch {about.get('torch')}; {str(about.get('time'))[:10]}; "
            f"commit {commit(about)}; `{command(about)}`"
        )
    return "\n".join(seen.values())


def command(about: Row) -> str:
    """The command of a run, without the results file that it wrote."""
    return re.sub(r" --(?:out|json) \S+", "", str(about.get("command")))


def memory_table(row: Row) -> Table:
    """Columns and lines: megabytes, and how often the weights fit into what PyTorch alone does not take."""
    sides, base, weights = row["sides"], row["sides"]["import torch"]["loaded"], row["weight_bytes"]
    header = ["process", "loaded, MB", "peak of loading, MB", "peak of generating, MB", "loaded / weights"]
    lines = []
    for name, found in sides.items():
        columns = [found.get(key) for key in ("loaded", "peak_loading", "peak_generating")]
        shown = [f"{value / 1e6:,.0f}" if value else "-" for value in columns]
        share = "-" if name == "import torch" else f"{(found['loaded'] - base) / weights:.2f}"
        lines.append([name, *shown, share])
    return header, lines


# Figures of "precision" rows, in the order of the columns: heading and format.
_PRECISION_FIGURES = {
    "logits": ("error of the logits", "{:.2%}"),
    "head": ("error of the ViT decoder", "{:.2%}"),
    "pictures": ("error of the pictures", "{:.2%}"),
    "heldout_psnr": ("held-out PSNR, dB", "{:.2f}"),
    "samples_right": ("labels right", "{:.1%}"),
    "diversity": ("diversity", "{:.1%}"),
    "golden_tokens": ("tokens of the official code", "{:.1%}"),
    "equal_tokens": ("tokens as in float32", "{:.1%}"),
}


def precision_table(row: Row) -> Table:
    """Figures of a "precision" row, a line for each precision."""
    shown = [name for name in _PRECISION_FIGURES if name in next(iter(row["figures"].values()))]
    lines = [
        [precision, *(_PRECISION_FIGURES[name][1].format(figures[name]) for name in shown)]
        for precision, figures in row["figures"].items()
    ]
    return ["precision", *(_PRECISION_FIGURES[name][0] for name in shown)], lines


def by_sides(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that compare the same sides, together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["samples_s"]), []).append(row)
    return list(groups.values())


def training_table(rows: Sequence[Row]) -> Table:
    """Columns and lines: samples per second of a training step of two sides, their ratio, and memory of a step."""
    sides = list(rows[0]["samples_s"])
    speed, memory_of = ([f"{side}, {unit}" for side in sides] for unit in ("samples/s", "MB"))
    header, lines = ["step", *speed, "times as fast", *memory_of], []
    for row in rows:
        ratios = sorted(p / o for p, o in zip(*(row["samples_s"][side] for side in reversed(sides)), strict=True))
        rates = [f"{row['count'] / row['median_s'][side]:.2f}" for side in sides]
        peaks = [row["peak_bytes"][side] for side in sides]
        memory = ["-" if peak is None else f"{peak / 1e6:,.0f}" for peak in peaks]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append([row["case"]["recipe"], *rates, spread, *memory])
    return header, lines


def waiting_table(rows: Sequence[Row]) -> Table:
    """Columns and lines: median seconds by policy, and how much longer the work takes beside busy processes."""
    policies = list(dict.fromkeys(row["case"]["policy"] for row in rows))
    header = [
        "policy",
        *(
            f"{work}: {where}"
            for work in ("training step", "generation")
            for where in ("alone, ms", "beside, ms", "x")
        ),
    ]
    lines = []
    for policy in policies:
        line = [policy]
        for work in ("training step", "generation"):
            found = {
                row["case"]["busy"]: quantiles(row["samples_s"][work])[0] * 1e3
                for row in rows
                if row["case"]["policy"] == policy and work in row["samples_s"]
            }
            alone, beside = (
                next((ms for busy, ms in found.items() if bool(busy) == loaded), None) for loaded in (False, True)
            )
            line += ["-" if ms is None else f"{ms:,.1f}" for ms in (alone, beside)]
            line.append(f"{beside / alone:.1f}" if alone and beside else "-")
        lines.append(line)
    return header, lines


def with_source(rows: Sequence[Row], table: Table, detail: str = "") -> str:
    """A Markdown table under its source, and the notes of its runs below it."""
    notes = dict.fromkeys(note for row in rows for note in row["environment"].get("notes", []))
    marks = disturbance_notes(rows)
    heading = f"{source(rows)}; {detail}" if detail else source(rows)
    return "\n\n".join([heading, markdown(*table), *(f"Note on this run: {note}" for note in notes), *marks])


def all_tables(rows: Sequence[Row]) -> str:
    """Markdown tables of everything in `rows`, run by run."""
    blocks = []
    for time in dict.fromkeys(row["environment"]["time"] for row in rows):
        run = [row for row in rows if row["environment"]["time"] == time]
        if measures.select(run, "speedup"):
            blocks.append(with_source(run, transposed(*speedup_table(run))))
        for row in measures.select(run, "roofline"):
            blocks.append(with_source([row], stage_table(row)))
        for row in measures.select(run, "engine"):
            blocks.append(with_source([row], engine_table(row), describe(row)))
        if rungs := measures.select(run, "ladder"):
            blocks.append(with_source(rungs, ladder_table(run)))
    return "\n\n".join(blocks)


def describe(row: Row) -> str:
    """Preset, dtype and batch of a row of "engine" or "roofline"."""
    case = row["case"]
    return f"{case['preset']}, {case['dtype']}, batch {case['batch']}"
