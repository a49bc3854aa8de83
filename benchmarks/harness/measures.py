"""What tables, plots and documents show, computed from the rows of results files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness.results import Row, median_error, quantiles

OURS = "titok"  # the name of titok's side in the rows of `benchmarks.engine`
INT8 = "titok, int8"  # the same with 8-bit layers
CEILING_NAMES = ("mm", "copy")
GAP_ERROR = 0.2  # largest standard error of the medians from which a ratio of measured time and floor is computed


def select(rows: Iterable[Row], bench: str, **case: Any) -> list[Row]:
    """Rows of one benchmark whose case has these values."""
    return [r for r in rows if r["bench"] == bench and all(r["case"].get(k) == v for k, v in case.items())]


def latest_run(rows: Sequence[Row], bench: str, **case: Any) -> list[Row]:
    """All rows of the newest run that has a row of `bench` with these values.

    Raises:
        LookupError: no run has such a row.
    """
    found = select(rows, bench, **case)
    if not found:
        raise LookupError(f"no result of {bench!r} with {case}")
    run = max((row["environment"] for row in found), key=lambda about: str(about["time"]))
    return [row for row in rows if row["environment"] is run]


def latest_run_with(rows: Sequence[Row], bench: str, *cases: dict[str, Any]) -> list[Row]:
    """All rows of the newest run that has a row of `bench` for each of these cases.

    Raises:
        LookupError: no run has all of them.
    """
    runs = [[row["environment"] for row in select(rows, bench, **case)] for case in cases]
    common = [run for run in runs[0] if all(any(run is other for other in others) for others in runs[1:])]
    if not common:
        raise LookupError(f"no run of {bench!r} with all of {list(cases)}")
    newest = max(common, key=lambda about: str(about["time"]))
    return [row for row in rows if row["environment"] is newest]


def latest(rows: Sequence[Row], bench: str, **case: Any) -> Row:
    """The row of `bench` with these values from the newest run that has one; `LookupError` if there is none."""
    return select(latest_run(rows, bench, **case), bench, **case)[-1]


def ran_on_cpu(row: Row) -> bool:
    """Whether the row was measured on a CPU; rows that name no device ran on the GPU if there was one."""
    return bool(row["case"].get("device", "cuda" if row["environment"].get("gpu") else "cpu") == "cpu")


def of_dtype(rows: Iterable[Row], dtype: str) -> list[Row]:
    """The rows of the runs whose command asked for a dtype ("fp32" or "bf16"), or that have it where none did.

    A run in bfloat16 may have sides in float32, such as the first rung of a ladder.
    """
    asked = {"float32": "fp32", "bfloat16": "bf16"}

    def is_of(row: Row) -> bool:
        words = str(row["environment"].get("command", "")).split()
        named = words[words.index("--dtype") + 1] if "--dtype" in words[:-1] else str(row["case"].get("dtype"))
        return asked.get(named, named) == dtype

    return [row for row in rows if is_of(row)]


def seconds(row: Row, calls: str = "calls") -> tuple[float, float, float]:
    """Seconds of one batch: (median, 20th percentile, 80th percentile).

    Args:
        row: a row of "speedup", "sweep" or "ladder".
        calls: which numbers of calls to multiply each part's samples by: "calls" or "calls_without_pixels".
    """
    parts = [(times, quantiles(row["samples_s"][part])) for part, times in row[calls].items() if times]
    median, low, high = (sum(times * figures[i] for times, figures in parts) for i in range(3))
    return median, low, high


def rate(row: Row, calls: str = "calls") -> tuple[float, float, float]:
    """Images per second: (median, low, high); arguments as for `seconds`."""
    median, low, high = seconds(row, calls)
    batch = row["case"]["batch"]
    return batch / median, batch / high, batch / low


def error(row: Row) -> float:
    """Standard error of the median time as a share of it; of several parts, as if their errors all added up."""
    errors = [
        (times * statistics.median(row["samples_s"][part]), median_error(row["samples_s"][part]))
        for part, times in row["calls"].items()
        if times
    ]
    return sum(spent * share for spent, share in errors) / sum(spent for spent, _ in errors)


def fastest(row: Row) -> float:
    """Images per second by the fastest call of each part, which other programs on the machine disturb least."""
    spent = sum(times * min(row["samples_s"][part]) for part, times in row["calls"].items())
    return float(row["case"]["batch"] / spent)


def achieved_flops(row: Row) -> float:
    """FLOP/s of whole images: FLOP by formula over the median time."""
    return float(row["flops"] * rate(row)[0])


def ceilings(rows: Iterable[Row]) -> dict[str, float]:
    """ "mm <dtype>" -> FLOP/s, "copy <dtype>" -> bytes/s, of the fastest call, from rows of "ceiling"."""
    found: dict[str, float] = {}
    for row in rows:
        if row["bench"] == "ceiling":
            for name, work in row["work"].items():
                found[f"{name} {row['case']['dtype']}"] = work / min(row["samples_s"][name])
    return found


def own_ceiling(row: Row, name: str) -> float:
    """FLOP/s of "mm" or bytes/s of "copy", of the fastest call, from a row that has them ("engine", "roofline")."""
    return float(row["work"][name] / min(row["samples_s"][name]))


def share_of_mm(row: Row, ceiling: dict[str, float]) -> float | None:
    """FLOP/s of whole images over that of the matrix product in the same dtype, or None where that was not measured."""
    mm = ceiling.get(f"mm {row['case']['dtype']}")
    return achieved_flops(row) / mm if mm else None


def engine_ratio(row: Row, name: str) -> tuple[float, float, float] | None:
    """How many times as long as titok a candidate of an "engine" row takes: (median, 20th, 80th percentile).

    Each round gives one ratio. A candidate "native: generator" is compared with "titok: generator". None for titok
    itself and where titok was not timed.
    """
    samples = row["samples_s"]
    ours = name.replace(name.split(":")[0], OURS)
    return None if ours == name or ours not in samples else ratio(row, name, ours)


def ratio(row: Row, name: str, reference: str) -> tuple[float, float, float]:
    """How many times as long as `reference` the candidate `name` takes: (median, 20th, 80th percentile) over rounds."""
    samples = row["samples_s"]
    return quantiles([theirs / own for theirs, own in zip(samples[name], samples[reference], strict=True)])


def stages(row: Row) -> list[dict[str, Any]]:
    """The stages of a "roofline" row, each with its name, time and floor in seconds, bound, and ratio "gap".

    The floor is the longer of FLOP at the rate of the matrix product and of least bytes at the rate of a copy, both at
    their fastest call. "known" says whether the time and both rates come from enough calls for a gap to mean something.
    """
    mm, copy = own_ceiling(row, "mm"), own_ceiling(row, "copy")
    known = {name: median_error(samples) < GAP_ERROR for name, samples in row["samples_s"].items()}
    rates_known = all(known.get(name, False) for name in CEILING_NAMES)
    found = []
    for name, cost in row["stages"].items():
        by_arithmetic, by_memory = cost["flops"] / mm, cost["bytes"] / copy
        floor, time = max(by_arithmetic, by_memory), row["median_s"][name]
        bound = "arithmetic" if by_arithmetic >= by_memory else "memory"
        found.append({"stage": name, **cost, "floor_s": floor, "bound": bound, "s": time, "gap": time / floor})
        found[-1]["known"] = rates_known and known[name]
    return found
