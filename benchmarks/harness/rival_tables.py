"""The tables of models of a few steps, and whether their picture can be drawn, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import measures, tables
from benchmarks.harness.results import Row
from benchmarks.harness.tables import number

# The rows in the order of the table; the first part of a name is enough.
NAMES = (
    "DiT-XL/2 as published",
    "DiT-XL/2 bf16",
    "DiT-XL/2, 20 DPM-Solver steps",
    "DiT-XL/2, 10 DPM-Solver steps",
    "one pass of DiT-XL/2",
    "one pass of DiT-XL/1, deep",
    "one pass over pixels",
    "aMUSEd",
    "MaskGIT + MaskGIT-VQGAN, unguided",
)
TITOK = {512: "titok-l-64-512", 256: "titok-l-32"}
NOTHING = "No result has been recorded. `make bench-tables` measures it."
PICTURE = "![Published FID against measured seconds and against FLOP an image](quality.png)"


def today(rows: Sequence[Row]) -> dict[str, str]:
    """The figures "rivals_512_fp32" and so on for both resolutions and dtypes, and "quality_picture"."""
    found = {
        f"rivals_{resolution}_{dtype}": rivals(measures.of_dtype(rows, dtype), resolution)
        for resolution in TITOK
        for dtype in ("fp32", "bf16")
    }
    drawn = any(row["case"].get("fid") for row in measures.select(rows, "speedup"))
    return found | {"quality_picture": PICTURE if drawn else NOTHING}


def rivals(rows: Sequence[Row], resolution: int) -> str:
    """A table of the newest measurement of each rival, and of titok's model in the same run."""
    lines: list[list[str]] = []
    runs = []
    for name in NAMES:
        case = {"resolution": resolution, "name": TITOK[resolution]}
        measured = [
            row
            for row in measures.select(rows, "speedup", resolution=resolution)
            if row["case"]["name"].startswith(name) and "fid" in row["case"]
        ]
        measured = [row for row in measured if row["case"]["steps"] != 50]  # a scaled row of the 250 steps
        if not measured:
            continue
        row = max(measured, key=lambda row: str(row["environment"]["time"]))
        run = [other for other in rows if other["environment"] is row["environment"]]
        ours = measures.select(run, "speedup", **case)
        if not ours:
            continue
        if not lines:
            lines.append(_line(ours[-1], None))
        lines.append(_line(row, ours[-1]))
        runs += [row, ours[-1]]
    if not lines:
        return NOTHING
    header = ["model", "published FID", "steps", "dtype", "TFLOP", "seconds an image", "calls", "checked", "TiTok"]
    notes = tables.disturbance_notes(runs)
    return "\n\n".join([tables.source(runs).replace("\n", "\n\n"), tables.markdown(header, lines), *notes])


def _line(row: Row, ours: Row | None) -> list[str]:
    case = row["case"]
    fid = "none found" if case["fid"] is None else number(case["fid"])
    if case["fid_of"]:
        fid += f" ({case['fid_of']})"
    seconds = 1 / measures.rate(row)[0]
    return [
        case["name"] + tables.mark(row),
        fid,
        str(case["steps"]),
        case["dtype"],
        number(row["flops"] / 1e12),
        tables.with_error(seconds, row),
        tables.rounds_cell(row),
        tables.checked_cell(row),
        "" if ours is None else verdict(measures.rate(ours)[0] * seconds),
    ]


def verdict(ratio: float) -> str:
    """How many times as fast titok is, or by how much it loses."""
    return f"{number(ratio)} times as fast" if ratio >= 1 else f"loses: {number(1 / ratio)} times as slow"
