"""TiTok against DiT-XL/2 and MaskGIT, on this machine: `python -m benchmarks.speedup --resolution 512 --dtype bf16`.

All weights are random: speed does not depend on them. Sides take turns, so that drift hits all alike; each is quoted
at the best of the batch sizes tried. What a side repeats without change is timed as one step and multiplied, which the
table then says. Every sample goes to a file of JSON lines, from which `benchmarks.plot` makes the pictures.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _ladder, _sides, _tables, dit
from benchmarks._memory import peak_growth
from benchmarks._results import Results, environment, results_folder
from benchmarks._sides import Models, Side
from benchmarks._timing import interleave

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
CEILING_SIZES = {"cpu": (3072, 1 << 28), "cuda": (8192, 1 << 30)}  # side of the square matrices, bytes copied
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.speedup", description=__doc__)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--resolution", type=int, default=512, choices=[256, 512])
    p.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="of all sides")
    p.add_argument("--rows", default="", help="parts of row names, comma-separated; default all")
    p.add_argument("--ladder", metavar="PRESET", help="in place of the rows: one preset, from eager to our engine")
    p.add_argument(
        "--batches",
        default="",
        help="to sweep, comma-separated; default 1,2,4,8 on a CPU (a ladder: 1), 1,8,32,128 on a GPU",
    )
    p.add_argument("--steps", type=int, default=250, help="of DiT's sampler")
    p.add_argument("--whole", action="store_true", help="run all steps where else one is timed and multiplied")
    p.add_argument("--compile-mode", default="default", help="of torch.compile, on a GPU")
    p.add_argument("--seconds", type=float, default=60, help="of taking turns; three rounds at least")
    p.add_argument("--limit", type=float, help="seconds for everything; what does not fit is left out by name")
    p.add_argument("--out", help="results file; default results/<machine>-<device>-<date>.jsonl")
    return p


def rows(arguments: argparse.Namespace) -> dict[str, Callable[[], Side]]:
    """Name -> how to make that side."""
    device, resolution, dtype = arguments.device, arguments.resolution, DTYPES[arguments.dtype]
    models: dict[tuple[str, torch.dtype], Models] = {}

    def shared(preset: str, dtype: torch.dtype = dtype) -> Models:
        if (preset, dtype) not in models:
            models[preset, dtype] = Models(preset, dtype, device, whole=arguments.whole)
        return models[preset, dtype]

    if arguments.ladder:
        return _ladder.rungs(arguments.ladder, dtype, shared)
    table: dict[str, Callable[[], Side]] = {}

    def rival(name: str, dtype: torch.dtype, compile_mode: str | None = None) -> None:
        table[name] = lambda: _sides.dit_side(
            name, resolution, dtype, device,
            steps=arguments.steps, compile_mode=compile_mode, whole=arguments.whole,
        )  # fmt: skip

    if arguments.dtype != "bf16" or device == "cuda":
        rival(
            "DiT-XL/2 as published, tf32" if arguments.dtype == "tf32" else "DiT-XL/2 as published, fp32",
            torch.float32,
        )
    if arguments.dtype == "bf16":
        rival("DiT-XL/2 bf16, SDPA", torch.bfloat16)
        if device == "cuda":
            rival("DiT-XL/2 bf16, compiled", torch.bfloat16, arguments.compile_mode)
    table["MaskGIT + MaskGIT-VQGAN"] = lambda: _sides.maskgit(resolution, dtype, device)
    for preset in _sides.PRESETS[resolution]:
        table[f"{preset} eager"] = partial(_published, shared, preset)
        table[preset] = partial(_ours, shared, preset)
    wanted = _sides.chosen(table, arguments.rows)
    return {name: table[name] for name in wanted}


def _published(shared: Callable[[str], Models], preset: str) -> Side:
    return shared(preset).published(f"{preset} eager")


def _ours(shared: Callable[[str], Models], preset: str) -> Side:
    return shared(preset).ours(preset)


class Bench:
    """One run: builds the sides, counts, sweeps batches, takes turns, and writes what it saw."""

    def __init__(self, arguments: argparse.Namespace, results: Results, console: Console) -> None:
        self.arguments, self.results, self.console = arguments, results, console
        default = "1,8,32,128" if arguments.device == "cuda" else "1" if arguments.ladder else "1,2,4,8"
        self.batches = [int(b) for b in (arguments.batches or default).split(",")]
        self.samples: dict[tuple[str, str, int], list[float]] = {}
        self.rows: list[dict[str, Any]] = []
        self.counted: dict[str, float] = {}
        self.started, self.limit = time.monotonic(), arguments.limit or math.inf

    def run(self, table: dict[str, Callable[[], Side]], left_out: dict[str, str]) -> None:
        columns = (
            *Progress.get_default_columns()[:2],
            TextColumn("{task.completed:.0f} calls"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self.progress, self.task = progress, progress.add_task("building", total=None)
            sides: dict[str, Side] = {}
            best: dict[str, int] = {}
            peaks: dict[tuple[str, int], int | None] = {}
            for name, make in table.items():
                if sides and self._late():
                    left_out[name] = "no time left"
                    continue
                progress.update(self.task, description=f"building {name}")
                sides[name] = side = make()
                if self.arguments.ladder:  # which quotes whole pictures alone
                    side.parts = {part: p for part, p in side.parts.items() if p.whole}
                best[name] = self._sweep(side, peaks)
            progress.update(self.task, description="taking turns")
            samples = self._take_turns(sides, best)
        for name, reason in left_out.items():
            self.results.note(f"left out {name}: {reason}")
        for name, side in sides.items():
            for part in side.parts:
                self.samples[name, part, best[name]] = samples.pop(f"{name}: {part}")
            for batch in sorted({b for n, _, b in self.samples if n == name}):
                bench = "ladder" if self.arguments.ladder else "speedup" if batch == best[name] else "sweep"
                self._row(bench, side, batch, self.counted[name], peaks.get((name, batch)))

    def _sweep(self, side: Side, peaks: dict[tuple[str, int], int | None]) -> int:
        """The batch size with the most images a second. Ends with the first that brings nothing, does not fit in
        memory, or would take longer to try than half of the time for taking turns."""
        speeds: dict[int, float] = {}
        device, cost = self.arguments.device, 0.0  # seconds for one image, of calling every part
        # On a GPU a run may replay a graph, which no counter sees into; on a CPU the first run at batch 1 is counted.
        self.counted[side.name] = count(side) if device == "cuda" or 1 not in self.batches else 0.0
        for batch in self.batches:
            self.progress.update(self.task, description=f"{side.name}, batch {batch}")
            if speeds and (self._late() or cost * batch > self.arguments.seconds / 2):
                self.results.note(f"{side.name}: no time for batch {batch}")
                break
            try:
                spent, started = 0.0, time.monotonic()
                for name, part in side.parts.items():
                    run = part.prepare(batch)
                    called = time.monotonic()
                    growth = peak_growth(run, device)
                    first = time.monotonic() - called
                    if device == "cpu" and batch == 1:  # in a call of its own: what is counted is not prepared
                        with FlopCounterMode(display=False) as counter:
                            run()
                        self.counted[side.name] += part.whole * counter.get_total_flops()
                    if growth is not None:
                        peak = growth + side.weight_bytes()
                        peaks[side.name, batch] = max(peak, peaks.get((side.name, batch)) or 0)
                    if len(self.batches) > 1:  # of a long call the first tells enough
                        long = first > self.arguments.seconds / 8
                        self.samples[side.name, name, batch] = [first if long else _timed(run)]
                        spent += part.whole * self.samples[side.name, name, batch][0]
                    self.progress.advance(self.task)
                cost = (time.monotonic() - started) / batch
                speeds[batch] = batch / spent if spent else 0.0
                if speeds[batch] < 1.02 * max((s for b, s in speeds.items() if b != batch), default=0.0):
                    break
            except OUT_OF_MEMORY:
                self.results.note(f"{side.name} does not fit at batch {batch}")
                break
            finally:
                gc.collect()
        if not speeds:
            raise MemoryError(f"{side.name} does not fit at batch {self.batches[0]}")
        side.settle(self.counted[side.name])
        return max(speeds, key=lambda batch: speeds[batch])

    def _late(self) -> bool:
        """Whether what is left of the limit should go to taking turns."""
        return time.monotonic() - self.started > 0.6 * self.limit

    def _take_turns(self, sides: dict[str, Side], best: dict[str, int]) -> dict[str, list[float]]:
        def ticking(run: Callable[[], Any]) -> Callable[[], Any]:
            def tick() -> None:
                run()
                self.progress.advance(self.task)

            return tick

        ceiling, work = ceiling_runs(DTYPES[self.arguments.dtype], self.arguments.device)
        runs = {
            f"{name}: {p}": part.prepare(best[name]) for name, s in sides.items() for p, part in s.parts.items()
        }
        turns = {name: ticking(run) for name, run in {**ceiling, **runs}.items()}
        for run in ceiling.values():
            run()
        left = self.started + self.limit - time.monotonic()
        samples = interleave(turns, min(self.arguments.seconds, max(1.0, left - 5)), warm=True)
        case = {"dtype": self.arguments.dtype, "device": self.arguments.device}
        taken = {name: samples.pop(name) for name in ceiling}
        self.rows.append(self.results.row("ceiling", case, taken, work=work))
        return samples

    def _dtype(self, side: Side) -> str:
        dtype = next(side.modules[0].parameters()).dtype
        return "bf16" if dtype == torch.bfloat16 else "tf32" if self.arguments.dtype == "tf32" else "fp32"

    def _row(self, bench: str, side: Side, batch: int, counted: float, peak: int | None) -> None:
        case = {
            "name": side.name, "family": side.family, "resolution": self.arguments.resolution,
            "dtype": self._dtype(side), "device": self.arguments.device, "batch": batch, "tokens": side.tokens,
            "steps": side.steps, "parameters": side.parameters, "note": side.note, "paper": side.paper,
        }  # fmt: skip
        samples = {part: self.samples[side.name, part, batch] for part in side.parts}
        whole, bare = ({part: getattr(p, kind) for part, p in side.parts.items()} for kind in ("whole", "bare"))
        row = self.results.row(
            bench, case, samples, whole=whole, bare=bare,
            flops=side.flops, bare_flops=side.bare_flops, flops_counted=counted, peak_bytes=peak,
        )  # fmt: skip
        self.rows.append(row)
        if bench == "speedup" and side.family == "dit" and side.steps == 250 and not self.arguments.whole:
            self.rows.append(self.results.write(_sides.fewer_steps(row, 50)))


def count(side: Side) -> float:
    """FLOP of one image as FlopCounterMode sees them."""
    total = 0.0
    for run, times in side.counted:
        with FlopCounterMode(display=False) as counter:
            run()
        total += times * counter.get_total_flops()
    return total


def ceiling_runs(dtype: torch.dtype, device: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What the machine can do: a large square matrix product and a copy; with FLOP and bytes of one call."""
    size, num_bytes = CEILING_SIZES[device]
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "mm": lambda: torch.mm(a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    return runs, {"mm": 2.0 * size**3, "copy": 2.0 * source.numel()}


def _timed(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def begin(arguments: argparse.Namespace) -> Path:
    """Sets what `--dtype` asks for and the seed; the file that results go to."""
    if arguments.device == "cpu" and arguments.dtype == "tf32":
        print("tf32 is what GPUs make of fp32; a CPU computes fp32")
        arguments.dtype = "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.dtype == "tf32"
    torch.manual_seed(0)
    return Path(arguments.out) if arguments.out else default_path(arguments.device)


def default_path(device: str) -> Path:
    about = environment()
    name = str(about["gpu" if device == "cuda" else "cpu"]).lower()
    machine = re.sub("[^a-z0-9]+", "-", re.sub(r"\(.*?\)|processor", "", name)).strip("-")
    return results_folder() / f"{machine}-{device}-{about['time'][:10]}.jsonl"


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = begin(arguments)
    results, table, left_out, console = Results(path), rows(arguments), {}, Console()
    if (reason := dit.why_not()) is not None:
        left_out = {name: reason for name in table if name.startswith("DiT")}
        table = {name: make for name, make in table.items() if name not in left_out}
    bench = Bench(arguments, results, console)
    bench.run(table, left_out)
    if arguments.ladder:
        _tables.show(*_tables.ladder_table(bench.rows), title=f"{arguments.ladder}")
    else:
        header, cells = _tables.speedup_table(bench.rows)
        _tables.show(*((header, cells) if console.width >= 250 else _tables.turned(header, cells)))
    for name, reason in left_out.items():
        console.print(f"left out: {name} ({reason})")
    console.print(f"medians of interleaved calls, random weights; samples in {path}")


if __name__ == "__main__":
    main()
