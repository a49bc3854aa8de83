"""Tables of what was measured on GPUs, for docs/performance.md and for a run that may have been cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import measures, tables
from benchmarks.harness.gpu_parts import OPS
from benchmarks.harness.results import Row
from benchmarks.harness.tables import number

NOTHING = "No result of a GPU has been recorded."
SHOWN_KERNELS = 20


def measured(rows: Sequence[Row]) -> str:
    """Markdown of everything that rows from a GPU show; a sentence where there are none.

    Of a comparison that was cut off before its sides took turns, the table has the fastest batch size that was tried.
    """
    rows = [row for row in rows if not measures.ran_on_cpu(row)]
    blocks = [
        *_comparisons(rows),
        *_ops(rows),
        *_single(rows),
        *_ladders(rows),
        *_kernels(rows),
    ]
    return "\n\n".join(blocks) or NOTHING


def _runs(rows: Sequence[Row], *benches: str) -> list[list[Row]]:
    """The rows of each run that has a row of one of these benchmarks, in order of time."""
    times = sorted({str(row["environment"]["time"]) for row in rows if row["bench"] in benches})
    return [[row for row in rows if row["environment"]["time"] == time] for time in times]


def best_sides(run: Sequence[Row], final: str, tried: str) -> list[Row]:
    """The rows of the benchmark `final` of a run, and for sides that have none the fastest row of `tried`."""
    found = measures.select(run, final)
    names = {row["case"]["name"] for row in found}
    fastest: dict[tuple[str, int], Row] = {}
    for row in measures.select(run, tried):
        key = row["case"]["name"], row["case"]["steps"]
        if row["case"]["name"] not in names and (
            key not in fastest or measures.rate(row)[0] > measures.rate(fastest[key])[0]
        ):
            fastest[key] = row
    return [*found, *({**row, "bench": final} for row in fastest.values())]


def _comparisons(rows: Sequence[Row]) -> list[str]:
    blocks = []
    for run in _runs(rows, "speedup", "sweep"):
        sides = best_sides(run, "speedup", "sweep")
        pixels = ", ".join(sorted({str(row["case"]["resolution"]) for row in sides}))
        table = tables.transposed(*tables.speedup_table([*measures.select(run, "ceiling"), *sides]))
        blocks.append(f"### TiTok against DiT-XL/2, {pixels} pixels\n\n{tables.with_source(run, table)}")
        if sizes := measures.select(run, "sweep"):
            blocks.append(tables.markdown(*_batch_table(sizes)))
    return blocks


def _batch_table(rows: Sequence[Row]) -> tables.Table:
    lines = [
        [
            row["case"]["name"],
            str(row["case"]["batch"]),
            number(measures.rate(row)[0]),
            number(1e3 * measures.seconds(row)[0]),
            number(row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None),
        ]
        for row in rows
        if row["case"]["steps"] != 50 or row["case"]["family"] != "dit"
    ]
    return ["each batch size that was tried", "batch", "images/s", "ms a batch", "peak GB"], lines


def _ops(rows: Sequence[Row]) -> list[str]:
    blocks = []
    for op in OPS:
        for run in _runs(rows, op):
            ceilings = {
                row["case"]["dtype"]: {
                    name: work / min(row["samples_s"][name]) for name, work in row.get("work", {}).items()
                }
                for row in measures.select(run, "ceilings")
            }
            cases: list[dict[str, Any]] = [
                {**row, "ceilings": ceilings[row["case"]["dtype"]]}
                for row in measures.select(run, op)
                if ceilings.get(row["case"]["dtype"]) and "num_bytes" in row
            ]
            for direction in dict.fromkeys(row["case"].get("direction", "forward") for row in cases):
                same = [row for row in cases if row["case"].get("direction", "forward") == direction]
                heading = f"### `{op}`, {direction}: peers' time over titok's"
                blocks.append(f"{heading}\n\n{tables.with_source(same, tables.op_table(same))}")
    return blocks


def _single(rows: Sequence[Row]) -> list[str]:
    """Rows that are a table each: whole images at one batch size, and stages with their floors."""
    blocks = []
    for row in measures.select(rows, "engine"):
        blocks.append(f"### {tables.describe(row)}\n\n{tables.with_source([row], tables.engine_table(row))}")
    for row in measures.select(rows, "roofline"):
        heading = f"### Stages and their floors: {tables.describe(row)}"
        blocks.append(f"{heading}\n\n{tables.with_source([row], tables.stage_table(row))}")
    return blocks


def _ladders(rows: Sequence[Row]) -> list[str]:
    blocks = []
    for run in _runs(rows, "ladder", "rung"):
        rungs = best_sides(run, "ladder", "rung")
        table = tables.ladder_table([*measures.select(run, "ceiling"), *rungs])
        blocks.append(f"### Ladder of {rungs[0]['case']['family']}\n\n{tables.with_source(run, table)}")
    return blocks


def _kernels(rows: Sequence[Row]) -> list[str]:
    blocks = []
    newest = {
        (row["case"]["preset"], row["case"]["batch"]): row  # a later row replaces an earlier one
        for row in sorted(measures.select(rows, "kernel_times"), key=lambda row: str(row["environment"]["time"]))
    }
    for row in newest.values():
        heading = f"### The kernels that take longest: {tables.describe(row)}"
        blocks.append(f"{heading}\n\n{tables.with_source([row], tables.kernel_table(row, SHOWN_KERNELS))}")
    for run in _runs(rows, "tuning"):
        found = measures.select(run, "tuning")
        blocks.append(f"### Tile sizes\n\n{tables.with_source(found, tables.tuning_table(found))}")
    return blocks


def commands(records: Sequence[Row]) -> str:
    """Markdown of how the commands of `benchmarks.gpu` ended."""
    lines = [[str(r["part"]), r["name"], f"{r['seconds']:.0f}", r["verdict"]] for r in records]
    return tables.markdown(["part", "command", "seconds", "outcome"], lines)


def tests(records: Sequence[Row]) -> str:
    """Markdown of the tests: numbers of each run, also of one that was cut off, and what failed."""
    runs: dict[str, dict[str, int]] = {}
    for record in records:
        outcomes = runs.setdefault(record["part"], {"passed": 0, "failed": 0, "skipped": 0})
        outcomes[record["outcome"]] += 1
    table = tables.markdown(
        ["tests", "passed", "failed", "skipped"],
        [[name, *(str(count) for count in outcomes.values())] for name, outcomes in runs.items()],
    )
    failed = [record for record in records if record["outcome"] == "failed"]
    lines = [f"- `{record['test']}`: {record.get('message', '').partition(chr(10))[0]}" for record in failed]
    return "\n\n".join([table, "\n".join(lines)]) if lines else table
