"""Pictures and tables from result files alone: `python -m benchmarks.plot benchmarks/results/*.jsonl`.

Draws what the files hold: speed against FLOP, the ladder from eager to our engine, cost against batch, tokens and
resolution, and the time of each stage. `--markdown` prints the tables for the documentation instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import _tables, engine, roofline

COLOURS = {"dit": "#b45f3c", "maskgit": "#8a7a2e"}
OURS, EAGER = "#2c6e9b", "#9dbdd4"
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--out", type=Path, default=Path("docs/figures"))
    p.add_argument("--markdown", action="store_true", help="print tables, draw nothing")
    return p


def _colour(row: Row) -> str:
    family = row["case"]["family"]
    return COLOURS.get(family, EAGER if row["case"]["name"].endswith("eager") else OURS)


def _titled(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    seen: dict[str, None] = {}
    for e in (row["environment"] for row in rows):
        machine = e.get("gpu") or e.get("cpu")
        date, commit = str(e.get("time"))[:10], str(e.get("commit"))[:10]
        seen[f"{machine}, torch {e.get('torch')}, {date}, commit {commit}"] = None
    axes.figure.text(0.005, 0.005, "; ".join(seen), fontsize=6, color="0.4")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names points (x, y, text) beside them, on the side with more room, and one below the other where they crowd."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # settles where the points are
    scale = 72 / figure.dpi
    left, right = (scale * axes.get_window_extent().x0, scale * axes.get_window_extent().x1)
    taken: list[tuple[float, float, float]] = []  # of each label left, right, y, in points of 1/72 inch
    for x, y, text in sorted(points, key=lambda point: -point[1]):
        at_x, at_y = (scale * value for value in axes.transData.transform((x, y)))
        beside = 6 if at_x < (left + right) / 2 else -6
        ends = sorted((at_x + beside, at_x + beside + 3.3 * len(text) * (1 if beside > 0 else -1)))
        label_y = at_y
        while any(ends[0] < r and ends[1] > lo and abs(label_y - other) < 8 for lo, r, other in taken):
            label_y -= 1
        taken.append((ends[0], ends[1], label_y))
        axes.annotate(
            text, (x, y), xytext=(beside, label_y - at_y), textcoords="offset points", fontsize=6, va="center",
            ha="left" if beside > 0 else "right",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def speed_against_flops(rows: Sequence[Row], axes: Axes) -> bool:
    """Images per second of every side over its FLOP per image; a line of constant FLOP/s is the ceiling."""
    sides = _tables.of(rows, "speedup")
    if not sides:
        return False
    points = []
    for row in sides:
        median, low, high = _tables.rate(row)
        case, x = row["case"], row["flops"] / 1e9
        bars = [[median - low], [high - median]]
        axes.errorbar(x, median, yerr=bars, fmt="o", color=_colour(row), markersize=5)
        points.append(
            (x, median, f"{case['name']} ({case['resolution']} px, {case['dtype']}, {case['steps']} steps)")
        )
    low, high = min(r["flops"] for r in sides), max(r["flops"] for r in sides)
    for name, ceiling in _tables.ceilings(rows).items():
        if name.startswith("mm "):
            ends, middle = [low / 2, high * 2], (low * high) ** 0.5
            axes.plot([f / 1e9 for f in ends], [ceiling / f for f in ends], "--", color="0.6", linewidth=0.8)
            axes.annotate(
                f"torch.{name}", (middle / 1e9, ceiling / middle), xytext=(3, 3), textcoords="offset points",
                fontsize=6, color="0.4",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="GFLOP an image", ylabel="images/s")
    axes.set_xlim(low / 3e9, high * 3 / 1e9)
    _titled(axes, "Speed against work", sides)
    _label(axes, points)
    return True


def ladder(rows: Sequence[Row], axes: Axes) -> bool:
    """Images per second of each rung, with the share of the matmul ceiling of its dtype where that was measured."""
    rungs = _tables.of(rows, "ladder")
    if not rungs:
        return False
    ceilings = _tables.ceilings(rows)
    names = [f"{row['case']['name']}" for row in rungs]
    rates = [_tables.rate(row) for row in rungs]
    errors = [[m - low for m, low, _ in rates], [high - m for m, _, high in rates]]
    bars = axes.barh(
        names, [m for m, *_ in rates], xerr=errors, color=[EAGER] * (len(rungs) - 1) + [OURS], height=0.6
    )
    for bar, row, (median, _, high) in zip(bars, rungs, rates, strict=True):
        mm = ceilings.get(f"mm {row['case']['dtype']}")
        share = f", {_tables.achieved(row) / mm:.0%} of torch.mm" if mm else ""
        axes.annotate(
            f"  {_tables.number(median)}/s{share}", (high, bar.get_y() + bar.get_height() / 2),
            xytext=(0, 0), textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.set_xlabel("images/s")
    case = rungs[-1]["case"]
    _titled(axes, f"From eager to titok: {case['family']}, batch {case['batch']}, {case['dtype']}", rungs)
    return True


def growth(rows: Sequence[Row], axes: Axes) -> bool:
    """Seconds an image over batch size, log-log, one line for each side."""
    sides = _tables.of(rows, "speedup") + _tables.of(rows, "sweep")
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in sides:
        key = (row["case"]["name"], row["case"]["note"])
        lines.setdefault(key, {})[row["case"]["batch"]] = 1 / _tables.rate(row)[0]
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    for (name, _), points in lines.items():
        batches = sorted(points)
        axes.plot(batches, [points[b] for b in batches], "o-", label=name, markersize=3, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="seconds an image")
    batches = sorted({batch for points in lines.values() for batch in points})
    axes.set_xticks(batches, labels=[str(batch) for batch in batches])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.legend(fontsize=6, frameon=False)
    _titled(axes, "Cost against batch", sides)
    return True


def tokens(rows: Sequence[Row], axes: Axes) -> bool:
    """Seconds an image over its number of tokens, log-log, by resolution."""
    sides = _tables.of(rows, "speedup")
    if len({row["case"]["tokens"] for row in sides}) < 2:
        return False
    points = []
    for row in sides:
        case, cost = row["case"], 1 / _tables.rate(row)[0]
        marker = "s" if case["resolution"] == 512 else "o"
        axes.plot(case["tokens"], cost, marker, color=_colour(row), markersize=5)
        points.append((case["tokens"], cost, f"{case['name']} ({case['steps']})"))
    axes.set(
        xscale="log", yscale="log", xlabel="tokens (steps in brackets; squares: 512 px)", ylabel="seconds an image"
    )
    axes.margins(x=0.2)
    counts = sorted({row["case"]["tokens"] for row in sides})
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    _titled(axes, "Cost against tokens", sides)
    _label(axes, points)
    return True


def stages(rows: Sequence[Row], axes: Axes) -> bool:
    """Time of each stage beside its floor."""
    records = _tables.of(rows, "roofline")
    if not records:
        return False
    labels, times, floors = [], [], []
    for record in records:
        case = record["case"]
        for row in roofline.rows(record):
            labels.append(f"{case['preset']} {case['dtype']}: {row['stage']}")
            times.append(1e3 * row["s"])
            floors.append(1e3 * row["floor_s"])
    axes.barh(labels, times, color=EAGER, height=0.6, label="measured")
    axes.barh(labels, floors, color=OURS, height=0.6, label="floor")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="ms for a batch")
    axes.legend(fontsize=7, frameon=False)
    _titled(axes, "Time of each stage, and its floor", records)
    return True


PICTURES: dict[str, Callable[[Sequence[Row], Axes], bool]] = {
    "speed_against_flops": speed_against_flops,
    "ladder": ladder,
    "cost_against_batch": growth,
    "cost_against_tokens": tokens,
    "stages": stages,
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Pictures of what the rows hold, as PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in PICTURES.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        if picture(rows, axes):
            figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # type: ignore[union-attr, call-arg]
            figure.savefig(folder / f"{name}.png", dpi=140)
            written.append(folder / f"{name}.png")
        plt.close(figure)
    return written


def tables(rows: Sequence[Row]) -> str:
    """Markdown tables, each under the commands that measured it."""
    blocks = []
    for file in dict.fromkeys(row["environment"]["time"] for row in rows):
        run = [row for row in rows if row["environment"]["time"] == file]
        if _tables.of(run, "speedup"):
            blocks.append(
                _tables.source(run) + "\n\n" + _tables.markdown(*_tables.turned(*_tables.speedup_table(run)))
            )
        for record in _tables.of(run, "roofline"):
            blocks.append(_tables.source([record]) + "\n\n" + _tables.markdown(*roofline.table(record)))
        for record in _tables.of(run, "engine"):
            case = record["case"]
            title = f"{case['preset']}, {case['dtype']}, batch {case['batch']}"
            blocks.append(f"{_tables.source([record])}; {title}\n\n" + _tables.markdown(*engine.table(record)))
        if rungs := _tables.of(run, "ladder"):
            blocks.append(_tables.source(rungs) + "\n\n" + _tables.markdown(*_tables.ladder_table(run)))
    return "\n\n".join(blocks)


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    rows = list(_tables.read(arguments.files))
    if arguments.markdown:
        print(tables(rows))
        return
    for path in draw(rows, arguments.out):
        print(path)


if __name__ == "__main__":
    main()
