"""TiTok against DiT-XL/2, models of a few steps, and MaskGIT: `python -m benchmarks.speedup --resolution 512`.

All weights are random, because they do not affect speed. The sides take turns, so that a change in the machine's
speed affects all of them alike, until the standard error of every median is below 1% or `--seconds` are over. Results
of timed calls are compared with the plain path; a side whose results are wrong is named, and not timed. Each side is
quoted at the best of the batch sizes tried. Where a side repeats a step without change, one step is timed and
multiplied; the column "timed" says so. Every sample goes to a results file of JSON lines, from which
`benchmarks.plot` draws and `benchmarks.report` writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console

from benchmarks.baselines import dit
from benchmarks.harness import ladder, rivals, sides, tables
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, command_parser, matching, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import Side

MASKGIT = "MaskGIT + MaskGIT-VQGAN"


def parser() -> argparse.ArgumentParser:
    p = command_parser("speedup", __doc__)
    p.add_argument("--resolution", type=int, default=512, choices=[256, 512], help="pixels (default: %(default)s)")
    p.add_argument(
        "--rows",
        default="",
        help="parts of row names, comma-separated, in the order of measuring; =NAME for a whole name (default: all)",
    )
    p.add_argument(
        "--ladder",
        metavar="PRESET",
        help="instead of the rows, measure one preset from eager PyTorch to titok, one change a rung",
    )
    p.add_argument(
        "--batches",
        default="",
        help="to try, comma-separated (default: 1,2,4,8 on a CPU, 1 for a ladder there, 1,8,32,128 on a GPU)",
    )
    p.add_argument("--steps", type=int, default=250, help="steps of DiT's sampler (default: %(default)s)")
    p.add_argument(
        "--whole",
        dest="all_steps",
        action="store_true",
        help="run every sampling step, also where one step would be timed and multiplied",
    )
    p.add_argument(
        "--compiled-batches",
        default="32",
        help="to try with DiT under torch.compile, on a GPU; each is compiled anew (default: %(default)s)",
    )
    p.add_argument("--compile-mode", default="default", help="mode of torch.compile for DiT, on a GPU")
    p.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="how long the sides take turns, for --min-rounds at least (default: %(default)s)",
    )
    p.add_argument(
        "--min-rounds",
        type=int,
        default=3,
        help="rounds that are made even if they take longer (default: %(default)s)",
    )
    p.add_argument(
        "--sustain",
        type=float,
        default=0,
        metavar="SECONDS",
        help="instead of taking turns, run each side alone for so long: percentiles, and images per joule",
    )
    p.add_argument("--limit", type=float, help="seconds for everything; sides without time are left out by name")
    add_out(p)
    return p


def rows(arguments: argparse.Namespace) -> dict[str, Callable[[], Side]]:
    """Name -> a function that makes that side, for the sides that the arguments ask for."""
    device, resolution, dtype = arguments.device, arguments.resolution, DTYPES[arguments.dtype]
    common = (resolution, dtype, device)
    built: dict[tuple[str, torch.dtype], Models] = {}

    def models(preset: str, dtype: torch.dtype = dtype) -> Models:
        if (preset, dtype) not in built:
            built[preset, dtype] = Models(preset, dtype, device, all_steps=arguments.all_steps)
        return built[preset, dtype]

    if arguments.ladder:
        return ladder.rungs(arguments.ladder, dtype, models)
    table: dict[str, Callable[[], Side]] = {}

    def add_dit(name: str, dtype: torch.dtype, compile_mode: str | None = None) -> None:
        options: dict[str, Any] = {  # of `dit_side`
            "steps": arguments.steps,
            "compile_mode": compile_mode,
            "all_steps": arguments.all_steps,
            "compiled_batches": tuple(map(int, arguments.compiled_batches.split(","))),
        }
        table[name] = lambda: rivals.dit_side(name, resolution, dtype, device, **options)

    def add_titok(preset: str) -> None:
        table[f"{preset} eager"] = lambda: models(preset).published(f"{preset} eager")
        table[preset] = lambda: models(preset).ours(preset)

    if arguments.dtype != "bf16" or device == "cuda":
        add_dit(f"DiT-XL/2 as published, {'tf32' if arguments.dtype == 'tf32' else 'fp32'}", torch.float32)
    if arguments.dtype == "bf16":
        add_dit("DiT-XL/2 bf16, SDPA", torch.bfloat16)
        if device == "cuda":
            add_dit("DiT-XL/2 bf16, compiled", torch.bfloat16, arguments.compile_mode)
    table[MASKGIT] = partial(rivals.maskgit_side, MASKGIT, *common)
    for preset in sides.PRESETS[resolution]:
        add_titok(preset)
    for steps in (20, 10):
        name = f"DiT-XL/2, {steps} DPM-Solver steps"
        options: dict[str, Any] = {"steps": steps, "solver": "dpm", "all_steps": True, "compile_mode": None}
        table[name] = partial(rivals.dit_side, name, *common, **options)
    for name, deep in (("one pass of DiT-XL/2", False), ("one pass of DiT-XL/1, deep", True)):
        table[name] = partial(rivals.latent_step_side, name, *common, deep=deep)
    for name, make in (("one pass over pixels", rivals.pixel_step_side), ("aMUSEd", rivals.amused_side)):
        table[name] = partial(make, name, *common)
    name = f"{MASKGIT}, unguided"
    table[name] = partial(rivals.maskgit_side, name, *common, published=True)
    return {name: table[name] for name in matching(table, arguments.rows)}


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = start(arguments)
    results, table, left_out, console = Results(path), rows(arguments), {}, Console()
    if (reason := dit.why_not()) is not None:
        left_out = {name: reason for name in table if name.startswith(("DiT", "one pass", "aMUSEd"))}
        table = {name: make for name, make in table.items() if name not in left_out}
    comparison = Comparison(arguments, results, console)
    comparison.run(table, left_out)
    if not comparison.rows:
        pass  # every side has failed
    elif arguments.sustain:
        tables.show(*tables.sustain_table(comparison.rows), title=f"{arguments.sustain:.0f} s without a pause")
    elif arguments.ladder:
        tables.show(*tables.ladder_table(comparison.rows), title=arguments.ladder)
    else:
        shown = tables.speedup_table(comparison.rows)
        tables.show(*(shown if console.width >= 250 else tables.transposed(*shown)))
    for name, reason in left_out.items():
        console.print(f"left out: {name} ({reason})")
    for note in tables.disturbance_notes(comparison.rows):
        console.print(note)
    console.print(f"medians of interleaved calls, random weights; samples in {path}")
    if comparison.failed:
        sys.exit(f"benchmarks.speedup: failed: {', '.join(comparison.failed)}")


if __name__ == "__main__":
    main()
