"""Measures every table of the documents, one row after another: `python -m benchmarks.session`.

Each step is one command with a limit of its own, in a process of its own. Its results are appended to one file in
benchmarks/results, line by line, so that nothing is lost if the session ends early. A step that this commit has already
measured in that file is left out: calling the command again goes on where it stopped. `python -m benchmarks.report` and
`python -m benchmarks.plot` then write the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.commands import run_limited
from benchmarks.harness.environment import environment
from benchmarks.harness.options import matching
from benchmarks.harness.results import default_file, read_others

ROOT = Path(__file__).parents[1]
RESERVE = 2.0  # a step may take so many times as long as it is expected to


class Step(NamedTuple):
    """One command of the session.

    Attributes:
        name: chosen by `--only`.
        minutes: that it is expected to take in float32 on two cores that multiply at 140 GFLOP/s.
        module: of `benchmarks`.
        arguments: of the command, without the results file.
        out: the option that names the results file.
    """

    name: str
    minutes: float
    module: str
    arguments: tuple[str, ...]
    out: str = "--out"


def steps(dtype: str, quickstart: Path | None = None) -> list[Step]:
    """All steps, in the order of measuring.

    Args:
        dtype: "fp32" or "bf16".
        quickstart: a folder of `titok quickstart`, whose models `benchmarks.precision` measures in each precision.
    """
    found = [_rival(resolution, dtype, *row) for resolution in (512, 256) for row in _RIVALS]
    preset = ("--preset", "titok-l-32", "--dtype", dtype)
    large = ("--preset", "titok-l-64-512", "--dtype", dtype)
    trained = () if quickstart is None else ("--quickstart", _from_root(quickstart))
    of_op = ("--dtype", "float32" if dtype == "fp32" else "bfloat16")
    found += [
        Step("B-64", 1.5, "speedup", _ours(256, dtype, "=titok-b-64 eager,=titok-b-64", "--seconds", "30")),
        Step("engine 1", 1.5, "engine", (*preset, "--batch", "1", "--seconds", "40")),
        Step("engine 4", 3, "engine", (*preset, "--batch", "4", "--seconds", "60")),
        Step("ladder", 5, "speedup", ("--ladder", "titok-l-32", "--dtype", dtype, "--seconds", "1")),
        Step("roofline l-64", 4, "roofline", (*large, "--seconds", "25")),
        Step("roofline l-32", 1.5, "roofline", (*preset, "--seconds", "15")),
        Step("memory l-32", 1, "memory", preset),
        Step("memory l-64", 1.5, "memory", large),
        Step("waiting", 3, "waiting", (*preset, "--rounds", "1", "--seconds", "6")),
        Step("dispatch", 0.5, "bench_dispatch", ("--seconds", "1.2"), "--json"),
        Step("nearest codebook", 1, "bench_nearest_codebook", ("--seconds", "3"), "--json"),
        Step("code mixture", 1, "bench_code_mixture", (*of_op, "--batch", "1", "8", "--seconds", "1"), "--json"),
        Step("attention", 2, "bench_masked_attention", (*of_op, "--batch", "1", "--seconds", "0.4"), "--json"),
        Step("group norm", 5, "bench_group_norm_silu", (*of_op, "--few", "--batch", "1", "--compile"), "--json"),
        Step("layer norm", 1, "bench_add_layer_norm", (*of_op, "--batch", "1", "8", "--seconds", "1"), "--json"),
        Step("decode step", 1, "bench_maskgit_decode_step", ("--seconds", "3"), "--json"),
    ]
    # What is measured in one dtype alone.
    if dtype == "bf16":
        rows = ("--rows", "native,=titok,int8")
        whole = ("--whole", "--seconds", "1", "--min-rounds", "2")
        found += [
            # Whole images: a single step of these models takes the most likely codes, which random weights give to all
            # labels alike, so that the check of results could not tell two calls apart.
            Step("S-128", 6, "speedup", _ours(256, dtype, "=titok-s-128", *whole)),
            Step("B-128", 6, "speedup", _ours(512, dtype, "=titok-b-128-512", *whole)),
            Step("engine 16", 8, "engine", (*preset, "--batch", "16", "--seconds", "90", *rows)),
            Step("precision", 2, "precision", ("--preset", "titok-l-32", *trained)),
        ]
    else:
        found += [
            Step("masked decode step", 6, "bench_masked_decode_step", (), "--json"),
            Step("training", 11, "training", ("--limit", "600")),
        ]
    return found


# Name, minutes at 512 pixels, parts of row names, seconds of taking turns, least number of rounds.
_RIVALS = (
    ("DiT, 250 steps", 8.0, "as published,sdpa,={} eager,={}", "60", "3"),
    ("DiT, 20 steps", 11.0, "20 dpm,={}", "1", "1"),
    ("DiT, 10 steps", 6.5, "10 dpm,={}", "1", "1"),
    ("one pass", 8.0, "one pass,={}", "1", "2"),
    ("aMUSEd", 4.0, "amused,={}", "1", "1"),
    ("MaskGIT", 9.0, "unguided,={}", "1", "2"),
)


def _rival(resolution: int, dtype: str, name: str, minutes: float, rows: str, seconds: str, rounds: str) -> Step:
    """One rival beside titok's model of the same resolution; at 256 pixels each has a quarter of the work or less."""
    ours = {512: "titok-l-64-512", 256: "titok-l-32"}[resolution]
    arguments = ("--resolution", str(resolution), "--dtype", dtype, "--rows", rows.replace("{}", ours))
    turns = ("--batches", "1", "--seconds", seconds, "--min-rounds", rounds)
    return Step(
        f"{name}, {resolution} px", minutes * (1 if resolution == 512 else 0.3), "speedup", (*arguments, *turns)
    )


def _ours(resolution: int, dtype: str, rows: str, *turns: str) -> tuple[str, ...]:
    """The arguments for rows of titok's other models, which stand in the plots."""
    return ("--resolution", str(resolution), "--dtype", dtype, "--rows", rows, "--batches", "1", *turns)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "bf16" if multiplies_bfloat16() else "fp32"
    p.add_argument("--dtype", default=default, choices=["bf16", "fp32"], help="(default here: %(default)s)")
    p.add_argument("--only", default="", help="parts of step names, comma-separated; =NAME for a whole name")
    p.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds; steps that would not fit are left out"
    )
    p.add_argument("--list", action="store_true", help="print the steps with their commands, and run nothing")
    p.add_argument(
        "--quickstart",
        type=Path,
        help="a folder of `titok quickstart`, whose models are measured in each precision",
    )
    p.add_argument(
        "--out", type=Path, help="results file (default: benchmarks/results/<machine>-cpu-<date>.jsonl)"
    )
    return p


def command(step: Step, out: Path) -> list[str]:
    """The command of a step, which runs in the root of the repository."""
    return [sys.executable, "-m", f"benchmarks.{step.module}", *step.arguments, step.out, _from_root(out)]


def _from_root(path: Path) -> str:
    """A path relative to the repository, so that results name no folder outside it where they need not."""
    return os.path.relpath(path.resolve(), ROOT)


def done(out: Path, commit: str | None, dtype: str) -> set[str]:
    """The names of the steps that this commit has measured in a file in this dtype."""
    records = read_others([out], "step") if out.exists() else []
    wanted = {"commit": commit, "dtype": dtype, "status": 0}
    return {record["name"] for record in records if wanted.items() <= record.items()}


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    out = arguments.out or default_file("cpu")
    table = {step.name: step for step in steps(arguments.dtype, arguments.quickstart)}
    chosen = [table[name] for name in matching(table, arguments.only)]
    if arguments.list:
        for step in chosen:
            print(f"{step.name}, {step.minutes:.1f} min: {' '.join(['python', *command(step, out)[1:]])}")
        print(f"{sum(step.minutes for step in chosen):.0f} min expected")
        return 0
    about = environment()
    if about["changed"]:
        print("files differ from the commit: the documents will say so of every figure")
    finished, failed, started = done(out, about["commit"], arguments.dtype), [], time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    log = ROOT / "runs" / "session.log"
    log.parent.mkdir(exist_ok=True)
    for number, step in enumerate(chosen, 1):
        title = f"[{number}/{len(chosen)}] {step.name}"
        if step.name in finished:
            print(f"{title}: measured before")
            continue
        left = arguments.limit - (time.monotonic() - started)
        if 60 * step.minutes > left:
            print(f"{title}: left out, {left:.0f} s are left and it takes about {60 * step.minutes:.0f} s")
            failed.append(step.name)
            continue
        print(title, flush=True)
        limit = min(left, RESERVE * 60 * step.minutes + 60)
        outcome = run_limited(command(step, out), limit, log, os.environ, ROOT)
        record = {
            "kind": "step",
            "name": step.name,
            "dtype": arguments.dtype,
            "commit": about["commit"],
            "status": outcome.status,
            "seconds": round(outcome.seconds, 1),
        }
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if outcome.status != 0:
            print(f"{title}: {outcome.verdict}")
            failed.append(step.name)
    print(f"results in {out}; python -m benchmarks.report and python -m benchmarks.plot write the documents")
    if failed:
        print(f"not measured: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
