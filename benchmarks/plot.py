"""Plots and tables from results files alone: `python -m benchmarks.plot`.

By default it reads benchmarks/results/*.jsonl and writes the plots that the documents show: docs/speed.png (images
per second against FLOP an image), docs/ladder.png (from eager PyTorch to titok), docs/stages.png (time of each stage
and its floor) and docs/quality.png (published FID against measured time and FLOP). Two more can be asked for: batch.png
and tokens.png (seconds an image against batch size and against tokens). A plot whose measurements no file holds is not
written. Where several runs measured the same thing, the newest is drawn.

This file is longer than 400 lines because it holds every plot.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import measures, tables
from benchmarks.harness.results import FOLDER, Row, read

DOCUMENTS = Path(__file__).parents[1] / "docs"
FAMILY_COLOURS = {"dit": "#b45f3c", "maskgit": "#8a7a2e", "one step": "#7a3b8f", "amused": "#3c8a5a"}
LETTER_WIDTH, LINE_HEIGHT = 3.6, 9  # points of 1/72 inch that a letter and a line of the font of 6 points take
TITOK, EAGER, FAINT = "#2c6e9b", "#9dbdd4", "0.4"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("files", nargs="*", type=Path, help="results files (default: benchmarks/results/*.jsonl)")
    p.add_argument("--out", type=Path, default=DOCUMENTS, help="folder for the plots (default: docs)")
    p.add_argument(
        "--plots",
        nargs="+",
        default=["speed", "ladder", "stages", "quality"],
        choices=list(PLOTS),
        help="which plots to draw (default: speed ladder stages quality)",
    )
    p.add_argument("--markdown", action="store_true", help="print tables of everything in the files, draw nothing")
    return p


def newest(rows: Sequence[Row], *keys: str) -> list[Row]:
    """Of rows that agree in the benchmark and in these keys of their case, the one measured last; in order."""
    kept: dict[tuple[str, tuple[Any, ...]], Row] = {}
    for row in sorted(rows, key=lambda row: str(row["environment"]["time"])):
        key = tuple(row["case"][name] for name in keys)
        kept[row["bench"], key] = row
    return [row for row in rows if any(row is other for other in kept.values())]


def newest_sides(rows: Sequence[Row]) -> list[Row]:
    return newest(measures.select(rows, "speedup"), "name", "resolution", "dtype", "device", "steps")


def speed(rows: Sequence[Row], figure: Figure) -> bool:
    """Images per second of every side over its FLOP an image, a panel for each resolution and dtype.

    The dashed line is the speed at which a large matrix product alone would do the FLOP.
    """
    sides = newest_sides(rows)
    if not sides:
        return False
    panels = _panels(figure, sides, "resolution", "dtype")
    low, high = (choose(row["flops"] / 1e9 for row in sides) for choose in (min, max))
    for axes, shown in panels:
        for row in shown:
            median, slow, fast = measures.rate(row)
            bars = [[median - slow], [fast - median]]
            axes.errorbar(row["flops"] / 1e9, median, yerr=bars, fmt="o", color=_colour(row), markersize=5)
        axes.set(xscale="log", yscale="log", xlim=(low / 3, high * 3), xlabel="GFLOP an image", ylabel="images/s")
        _draw_ceiling(axes, rows, shown, low, high)
        _tidy(axes, f"{shown[0]['case']['resolution']} pixels, {shown[0]['case']['dtype']}")
    _credit(figure, sides)
    for axes, shown in panels:  # after all panels have their points, because they share the axes' limits
        named = [row for row in shown if not row["case"]["name"].endswith("eager")]  # the colour names the others
        _label(axes, [(row["flops"] / 1e9, measures.rate(row)[0], _side_name(row)) for row in named])
    return True


def ladder(rows: Sequence[Row], figure: Figure) -> bool:
    """Images per second of each rung, with its share of the rate of the matrix product in its dtype."""
    if not measures.select(rows, "ladder"):
        return False
    run = measures.latest_run(measures.of_dtype(rows, "fp32") or rows, "ladder")
    rungs, ceilings = measures.select(run, "ladder"), measures.ceilings(run)
    rates = [measures.rate(row) for row in rungs]
    errors = [[m - low for m, low, _ in rates], [high - m for m, _, high in rates]]
    colours = [EAGER] * (len(rungs) - 1) + [TITOK]
    axes = figure.subplots()
    names = [row["case"]["name"] for row in rungs]
    bars = axes.barh(names, [m for m, *_ in rates], xerr=errors, color=colours, height=0.6)
    for bar, row, (median, _, high) in zip(bars, rungs, rates, strict=True):
        share = measures.share_of_mm(row, ceilings)
        of_mm = "" if share is None else f", {share:.0%} of mm"
        axes.annotate(
            f"  {tables.number(median)}/s{of_mm}",
            (high, bar.get_y() + bar.get_height() / 2),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.set_xlabel("images/s")
    lines = _credit(figure, rungs)
    if notes := rungs[-1]["environment"]["notes"]:
        text = "\n".join(textwrap.wrap("Note on this run: " + " ".join(notes), 125))
        figure.supxlabel(text + lines * "\n", x=0.01, ha="left", fontsize=7)  # above the lines of the credit
    case = rungs[-1]["case"]
    _tidy(axes, f"{case['family']}, batch {case['batch']}, {case['dtype']}")
    return True


def stages(rows: Sequence[Row], figure: Figure) -> bool:
    """Time of each stage of each preset, with its floor drawn over it."""
    records = newest(measures.select(rows, "roofline"), "preset", "dtype", "device", "batch")
    if not records:
        return False
    labels, times, floors = [], [], []
    for record in records:
        for stage in measures.stages(record):
            labels.append(f"{record['case']['preset']} {record['case']['dtype']}: {stage['stage']}")
            times.append(1e3 * stage["s"])
            floors.append(1e3 * stage["floor_s"])
    axes = figure.subplots()
    axes.barh(labels, times, color=EAGER, height=0.6, label="measured")
    axes.barh(labels, floors, color=TITOK, height=0.3, label="floor")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="ms for one batch")
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes, "Time of each stage, and its floor")
    _credit(figure, records)
    return True


def batch(rows: Sequence[Row], figure: Figure) -> bool:
    """Seconds an image over batch size, a line for each side that was measured at several batch sizes."""
    keys = ("name", "resolution", "dtype", "device", "steps", "batch")
    best = measures.select(rows, "speedup")
    measured = {tuple(row["case"][key] for key in keys) for row in best}
    sweep = [row for row in measures.select(rows, "sweep") if tuple(row["case"][k] for k in keys) not in measured]
    sides = newest(best + sweep, *keys)
    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in sides:
        curves.setdefault(tuple(row["case"][key] for key in keys[:-1]), []).append(row)
    curves = {key: points for key, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    axes = figure.subplots()
    for points in curves.values():
        points.sort(key=lambda row: row["case"]["batch"])
        sizes = [row["case"]["batch"] for row in points]
        costs = [1 / measures.rate(row)[0] for row in points]
        label = f"{_side_name(points[0])}, {points[0]['case']['dtype']}"
        axes.plot(sizes, costs, "o-", label=label, markersize=3, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="seconds an image")
    _ticks(axes, {row["case"]["batch"] for points in curves.values() for row in points})
    axes.legend(fontsize=6, frameon=False)
    _tidy(axes, "Cost against batch size")
    _credit(figure, sides)
    return True


def tokens(rows: Sequence[Row], figure: Figure) -> bool:
    """Seconds an image over its number of tokens, without eager sides, a panel for each dtype.

    Circles are 256 pixels, squares 512 pixels.
    """
    sides = [row for row in newest_sides(rows) if not row["case"]["name"].endswith("eager")]
    if len({row["case"]["tokens"] for row in sides}) < 2:
        return False
    panels = _panels(figure, sides, "dtype")
    for axes, shown in panels:
        for row in shown:
            marker = "s" if row["case"]["resolution"] == 512 else "o"
            axes.plot(row["case"]["tokens"], 1 / measures.rate(row)[0], marker, color=_colour(row), markersize=5)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds an image")
        axes.margins(0.3)
        _ticks(axes, {row["case"]["tokens"] for row in sides})
        _tidy(axes, shown[0]["case"]["dtype"])
    _credit(figure, sides)
    for axes, shown in panels:
        _label(axes, [(row["case"]["tokens"], 1 / measures.rate(row)[0], _side_name(row)) for row in shown])
    return True


def quality(rows: Sequence[Row], figure: Figure) -> bool:
    """Published FID over measured seconds an image and over TFLOP an image, a line of panels for each resolution.

    Of runs in bfloat16 where there are any, so that all points are of one kind. Lower is better on both axes. A model
    that no FID was published for is in the table and not here.
    """
    of_one_dtype = measures.of_dtype(rows, "bf16") or rows
    sides = [
        row
        for row in newest_sides(of_one_dtype)
        if row["case"].get("fid") and not row["case"]["name"].endswith("eager")
    ]
    if not sides:
        return False
    resolutions = sorted({row["case"]["resolution"] for row in sides})
    figure.set_size_inches(10, 3.6 * len(resolutions))
    grid = figure.subplots(len(resolutions), 2, squeeze=False)
    costs: list[tuple[str, Callable[[Row], float]]] = [
        ("seconds an image, measured", lambda row: 1 / measures.rate(row)[0]),
        ("TFLOP an image", lambda row: row["flops"] / 1e12),
    ]
    for line, resolution in zip(grid, resolutions, strict=True):
        shown = [row for row in sides if row["case"]["resolution"] == resolution]
        for axes, (label, cost) in zip(line, costs, strict=True):
            for row in shown:
                axes.plot(cost(row), row["case"]["fid"], "o", color=_colour(row), markersize=5)
            axes.set(xscale="log", xlabel=label, ylabel="FID, published")
            axes.margins(0.3)
            _tidy(axes, f"{resolution} pixels")
    _credit(figure, sides)
    for line, resolution in zip(grid, resolutions, strict=True):
        shown = [row for row in sides if row["case"]["resolution"] == resolution]
        for axes, (_, cost) in zip(line, costs, strict=True):
            _label(axes, [(cost(row), row["case"]["fid"], _quality_name(row)) for row in shown])
    return True


def _quality_name(row: Row) -> str:
    case = row["case"]
    return f"work of {case['fid_of']}" if case["fid_of"] else _side_name(row)


PLOTS: dict[str, Callable[[Sequence[Row], Figure], bool]] = {
    "speed": speed,
    "ladder": ladder,
    "stages": stages,
    "batch": batch,
    "tokens": tokens,
    "quality": quality,
}


def _side_name(row: Row) -> str:
    case = row["case"]
    name = case["name"].removesuffix(f" {case['dtype']}, SDPA").removesuffix(f" as published, {case['dtype']}")
    if "step" in name or name.startswith("one pass"):
        return name
    return f"{name}, {case['steps']} steps"


def _colour(row: Row) -> str:
    titok = EAGER if row["case"]["name"].endswith("eager") else TITOK
    return FAMILY_COLOURS.get(row["case"]["family"], titok)


def _panels(figure: Figure, rows: Sequence[Row], *keys: str) -> list[tuple[Axes, list[Row]]]:
    """Axes that share their limits, one for each combination of these keys in the rows' cases, and its rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: [str(row["case"][key]) for key in keys]):
        groups.setdefault(tuple(row["case"][key] for key in keys), []).append(row)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure.set_size_inches(5 * columns, 3.4 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[len(groups) :]:
        axes.remove()
    return list(zip(grid[: len(groups)], groups.values(), strict=True))


def _draw_ceiling(axes: Axes, rows: Sequence[Row], shown: Sequence[Row], low: float, high: float) -> None:
    """Images per second over GFLOP at the median rate that the matrix product reached in the runs of `shown`."""
    dtype, runs = shown[0]["case"]["dtype"], [row["environment"] for row in shown]
    found = [row for row in measures.select(rows, "ceiling", dtype=dtype) if row["environment"] in runs]
    if not found:
        return
    rate = statistics.median(measures.own_ceiling(row, "mm") for row in found) / 1e9
    axes.plot([low / 2, high * 2], [rate / (low / 2), rate / (high * 2)], "--", color="0.6", linewidth=0.8)
    axes.annotate(
        "matrix product",
        (low / 2, rate / (low / 2)),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=6,
        color=FAINT,
    )


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes the text of each point (x, y, text) beside it, within the axes and clear of other texts and points.

    A label goes to the nearest free place: beside its point, or higher or lower with a thin line to its point.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # only now do the points have a place on the page
    scale = 72 / figure.dpi  # from pixels to points of 1/72 inch
    frame = axes.get_window_extent()
    left, right, low, high = (scale * side for side in (frame.x0, frame.x1, frame.y0, frame.y1))
    places = [scale * axes.transData.transform((x, y)) for x, y, _ in points]
    # Left end, right end and y of what is drawn already: first the points and other texts, then each label.
    taken = [(at_x - 4, at_x + 4, at_y) for at_x, at_y in places]
    boxes = [text.get_window_extent() for text in axes.texts]
    taken += [(scale * box.x0, scale * box.x1, scale * (box.y0 + box.y1) / 2) for box in boxes]
    for (x, y, text), (at_x, at_y) in sorted(zip(points, places, strict=True), key=lambda item: -item[1][1]):
        width = LETTER_WIDTH * len(text)
        first = 1 if at_x < (left + right) / 2 else -1
        best = (at_y, first)
        for step in range(2 * int((high - low) / LINE_HEIGHT)):
            label_y = at_y + LINE_HEIGHT * ((step + 1) // 2) * (-1 if step % 2 else 1)
            free = [side for side in (first, -first) if _is_free(at_x, label_y, width, side, taken, (left, right))]
            if free and low + 4 < label_y < high - 4:
                best = (label_y, free[0])
                break
        label_y, side = best
        ends = sorted((at_x + 8 * side, at_x + (8 + width) * side))
        taken.append((ends[0], ends[1], label_y))
        axes.annotate(
            text,
            (x, y),
            xytext=(8 * side, label_y - at_y),
            textcoords="offset points",
            fontsize=6,
            va="center",
            ha="left" if side > 0 else "right",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 3},
        )


def _is_free(
    x: float,
    y: float,
    width: float,
    side: int,
    taken: Sequence[tuple[float, float, float]],
    frame: tuple[float, float],
) -> bool:
    """Whether a label of this width beside x covers nothing and stays within the frame (left, right)."""
    start, end = sorted((x + 8 * side, x + (8 + width) * side))
    inside = frame[0] <= start and end <= frame[1]
    return inside and not any(
        start < right and end > left and abs(y - at) < LINE_HEIGHT for left, right, at in taken
    )


def _ticks(axes: Axes, values: set[int]) -> None:
    axes.set_xticks(sorted(values), labels=[str(value) for value in sorted(values)])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _credit(figure: Figure, rows: Sequence[Row]) -> int:
    """Each machine, its PyTorch and its commits at the foot of a plot; returns in how many lines."""
    runs = [row["environment"] for row in rows]
    commits: dict[str, dict[str, None]] = {}
    for run in runs:
        cpu = f"{run.get('cpu')}, {run.get('cpu_capability')}"
        machine = f"{run.get('gpu') or cpu}, torch {run.get('torch')}"
        commits.setdefault(machine, {})[tables.commit(run)] = None
    text = "; ".join(f"{machine}: {', '.join(found)}" for machine, found in commits.items())
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(text, int(72 * width / LETTER_WIDTH))
    figure.text(0.005, 0.005, "\n".join(lines), fontsize=6, color=FAINT, va="bottom")
    bottom = (LINE_HEIGHT * len(lines) + 4) / (72 * height)
    figure.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))  # type: ignore[union-attr, call-arg]
    return len(lines)


def draw(rows: Sequence[Row], folder: Path, plots: Sequence[str]) -> list[Path]:
    """Draws those plots that `rows` hold measurements for, as PNG files in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in plots:
        figure = plt.figure(figsize=(7, 4), layout="constrained")
        if PLOTS[name](rows, figure):
            figure.savefig(folder / f"{name}.png", dpi=140)
            written.append(folder / f"{name}.png")
        plt.close(figure)
    return written


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    rows = read(arguments.files or sorted(FOLDER.glob("*.jsonl")))
    if not arguments.files:  # those of the documents are of CPUs
        rows = [row for row in rows if measures.ran_on_cpu(row)]
    if arguments.markdown:
        print(tables.all_tables(rows))
        return
    for path in draw(rows, arguments.out, arguments.plots):
        print(path)


if __name__ == "__main__":
    main()
