"""One comparison of sides: build them, count their FLOP, find each one's batch size, then time them in turns."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.ceilings import ceiling_runs
from benchmarks.harness.compiled import compiled_parts
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.options import DTYPES
from benchmarks.harness.results import Results, Row
from benchmarks.harness.sides import Side, counted_flops, fewer_steps
from benchmarks.harness.sustain import sustain
from benchmarks.harness.timing import Candidate, interleave, measure, time_once

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
GPU_TRIAL_SECONDS = 0.5  # of each part at each batch size; at least three calls
BUILDING_SHARE = (
    0.6  # of `--limit` on a CPU: after this share no more sides are built and no larger batch is tried
)


class Comparison:
    """One run of `benchmarks.speedup`.

    Attributes:
        rows: the rows of the sides that took turns, and of the ceilings.
        failed: the names of the sides that could not be measured.
        samples: (side, part, batch) -> seconds of each call.
        counted: side -> FLOP of one image as `torch.utils.flop_counter` counts them.
        peaks: (side, batch) -> peak bytes of a call plus the bytes of the weights.
        checked: side -> the parts whose results were compared with the plain path.
        conditions: what the machine was doing while the sides took turns.
    """

    def __init__(self, arguments: argparse.Namespace, results: Results, console: Console) -> None:
        self.arguments, self.results = arguments, results
        default = "1,8,32,128" if arguments.device == "cuda" else "1" if arguments.ladder else "1,2,4,8"
        self.batches = [int(batch) for batch in (arguments.batches or default).split(",")]
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.samples: dict[tuple[str, str, int], list[float]] = {}
        self.counted: dict[str, float] = {}
        self.peaks: dict[tuple[str, int], int] = {}
        self.checked: dict[str, list[str]] = {}
        self.conditions: dict[str, Any] | None = None
        self.started, self.limit = time.monotonic(), arguments.limit or math.inf
        columns = (
            *Progress.get_default_columns()[:2],
            TextColumn("{task.completed:.0f} calls"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("building", total=None)

    def run(self, table: Mapping[str, Callable[[], Side]], left_out: dict[str, str]) -> None:
        """Measures every side of `table` and writes its rows.

        Each batch size that is tried is written at once, as a row of "sweep", or of "rung" for a ladder. In the end the
        sides take turns, and their best batch sizes are written as rows of "speedup" or "ladder". A side that fails is
        left out.

        Args:
            table: name -> a function that makes the side.
            left_out: name -> reason, for sides that are not measured; those without time are added.
        """
        sides: dict[str, Side] = {}
        batches: dict[str, int] = {}
        with self.progress:
            for name, make in table.items():
                if sides and self._late():
                    left_out[name] = "no time left"
                    continue
                self.progress.update(self.task, description=f"building {name}")
                try:
                    side = make()
                    if self.arguments.ladder:  # its table shows whole images only
                        side.parts = {part: p for part, p in side.parts.items() if p.calls}
                    batches[name] = self.best_batch(side)
                except Exception as error:  # whatever a side raises, the others are measured
                    self.failed.append(name)
                    left_out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    continue
                sides[name] = side
            for name, reason in left_out.items():
                self.results.note(f"left out {name}: {reason}")
            if not sides:
                return
            self.progress.update(self.task, description="taking turns")
            if self.arguments.sustain:
                self.progress.update(self.task, description="running without a pause")
                for name, side in sides.items():
                    self._sustain(side, batches[name], left_out)
                return
            self._take_turns(sides, batches, left_out)
        for name, side in sides.items():  # those that are left
            self.rows += self._write("ladder" if self.arguments.ladder else "speedup", side, batches[name])

    def best_batch(self, side: Side) -> int:
        """The batch size with the most images per second.

        Larger batches are tried until one is less than 2% faster, does not fit in memory, or on a CPU would take more
        than half of `--seconds` to try.

        Raises:
            MemoryError: the smallest batch size does not fit.
            RuntimeError: the side should be compiled and runs uncompiled.
        """
        speeds: dict[int, float] = {}
        seconds_per_image = 0.0  # that trying a batch takes, all parts and calls together
        # On a GPU a call may replay a CUDA graph, which the counter cannot see into. On a CPU the calls at batch 1
        # are counted in `_try`.
        count_apart = self.arguments.device == "cuda" or 1 not in (side.batches or self.batches)
        self.counted[side.name] = side.count_flops() if count_apart else 0.0
        batches = side.batches or self.batches
        on_gpu = self.arguments.device == "cuda"  # where the first call compiles kernels: its time says little
        for batch in batches:
            self.progress.update(self.task, description=f"{side.name}, batch {batch}")
            too_long = not on_gpu and seconds_per_image * batch > self.arguments.seconds / 2
            if speeds and (self._late() or too_long):
                self.results.note(f"{side.name}: no time for batch {batch}")
                break
            started = time.monotonic()
            try:
                spent = sum(self._try(side, name, batch) for name in side.parts)
            except OUT_OF_MEMORY:
                self.results.note(f"{side.name} does not fit at batch {batch}")
                break
            finally:
                gc.collect()
            seconds_per_image = (time.monotonic() - started) / batch
            fastest_before = max(speeds.values(), default=0.0)
            speeds[batch] = batch / spent if spent else 0.0
            side.choose_formula(self.counted[side.name])
            if spent:
                self._write("rung" if self.arguments.ladder else "sweep", side, batch)
            if speeds[batch] < 1.02 * fastest_before:
                break
        if not speeds:
            raise MemoryError(f"{side.name} does not fit at batch {batches[0]}")
        return max(speeds, key=lambda batch: speeds[batch])

    def _try(self, side: Side, name: str, batch: int) -> float:
        """Calls a part for its peak memory, its FLOP and (if there is a choice of batch sizes) its time.

        Returns:
            Seconds that an image batch spends in this part; 0.0 where the time was not taken.

        Raises:
            RuntimeError: the side should be compiled and runs uncompiled.
        """
        part, device, seconds = side.parts[name], self.arguments.device, 0.0
        run, times = part.probe(batch) if part.probe else (part.prepare(batch), 1)
        called = time.monotonic()
        count, found = device == "cpu" and batch == 1, list[int]()
        together = count and not side.prepares_weights  # one call for both, because some take minutes
        growth = peak_growth((lambda: found.append(counted_flops(run))) if together else run, device)
        first_call = times * (time.monotonic() - called)
        if count:
            flops = found[0] if together else counted_flops(run)
            self.counted[side.name] += part.calls * times * flops
        if growth is not None:
            peak = growth + side.weight_bytes()
            self.peaks[side.name, batch] = max(peak, self.peaks.get((side.name, batch), 0))
        if side.must_be_compiled and not compiled_parts(run):
            raise RuntimeError(f"{side.name}: {name} does not run what torch.compile made")
        if device == "cuda":
            samples = [times * spent for spent in interleave({name: run}, GPU_TRIAL_SECONDS, warm=True)[name]]
        elif len(self.batches) > 1:
            long = first_call > self.arguments.seconds / 8  # then warming up matters little
            samples = [first_call if long else times * time_once(run)]
        else:
            samples = []
        if samples:
            self.samples[side.name, name, batch] = samples
            seconds = part.calls * statistics.median(samples)
        self.progress.advance(self.task)
        return seconds

    def _late(self) -> bool:
        """Whether the rest of the time limit is needed for taking turns."""
        if self.arguments.device == "cuda":
            return self.started + self.limit - time.monotonic() < 2 * self.arguments.seconds + 5
        return time.monotonic() - self.started > BUILDING_SHARE * self.limit

    def _take_turns(self, sides: dict[str, Side], batches: Mapping[str, int], left_out: dict[str, str]) -> None:
        """Times all parts of all sides and the machine's ceilings in turns; removes sides whose check fails."""
        ceiling, work = ceiling_runs(DTYPES[self.arguments.dtype], self.arguments.device)
        for run in ceiling.values():
            run()
        runs: dict[str, Candidate] = dict(ceiling)
        for name, side in sides.items():
            for part, p in side.parts.items():
                runs[f"{name}: {part}"] = p.prepare(batches[name])
        left = self.started + self.limit - time.monotonic()
        seconds = min(self.arguments.seconds, max(1.0, left - 5))
        measured = measure(
            runs,
            seconds,
            warm=True,
            rounds=self.arguments.min_rounds,
            after_call=lambda: self.progress.advance(self.task),
        )
        self.conditions = measured.conditions
        case = {"dtype": self.arguments.dtype, "device": self.arguments.device}
        of_ceiling = {name: measured.samples[name] for name in ceiling}
        self.rows.append(self.results.row("ceiling", case, of_ceiling, work=work, conditions=measured.conditions))
        if measured.problems:
            self.results.write(
                {"kind": "rejected", "problems": measured.problems, "samples_s": measured.rejected, "case": case}
            )
        for name, side in list(sides.items()):
            wrong = [
                measured.problems[key] for part in side.parts if (key := f"{name}: {part}") in measured.problems
            ]
            if wrong:
                del sides[name]
                self.failed.append(name)
                left_out[name] = f"not timed, {wrong[0]}"
                self.results.note(f"left out {name}: {left_out[name]}")
                continue
            for part in side.parts:
                self.samples[name, part, batches[name]] = measured.samples[f"{name}: {part}"]
            self.checked[name] = [part for part in side.parts if f"{name}: {part}" in measured.checked]

    def _write(self, bench: str, side: Side, batch: int) -> list[Row]:
        """Writes the row of a side, and of a DiT whose single step was timed also that for fewer steps."""
        case = self._case(side, batch)
        conditions = {} if bench in ("sweep", "rung") else {"conditions": self.conditions}
        row = self.results.row(
            bench,
            case,
            {part: self.samples[side.name, part, batch] for part in side.parts},
            calls={name: part.calls for name, part in side.parts.items()},
            calls_without_pixels={name: part.calls_without_pixels for name, part in side.parts.items()},
            flops=side.flops,
            flops_without_pixels=side.flops_without_pixels,
            flops_counted=self.counted[side.name],
            peak_bytes=self.peaks.get((side.name, batch)),
            checked=self.checked.get(side.name, []),
            **conditions,
        )
        rows = [row]
        if bench == "speedup" and side.family == "dit" and side.steps == 250 and not self.arguments.all_steps:
            rows.append(self.results.write(fewer_steps(row, 50)))
        return rows

    def _case(self, side: Side, batch: int) -> dict[str, Any]:
        """What identifies a row of a side."""
        return {
            "name": side.name,
            "family": side.family,
            "resolution": self.arguments.resolution,
            "dtype": self._dtype(side),
            "device": self.arguments.device,
            "batch": batch,
            "tokens": side.tokens,
            "steps": side.steps,
            "parameters": side.parameters,
            "note": side.note,
            "paper": side.paper,
            "fid": side.quality.fid if side.quality else None,
            "fid_source": side.quality.source if side.quality else None,
            "fid_of": side.quality.of if side.quality else None,
        }

    def _sustain(self, side: Side, batch: int, left_out: dict[str, str]) -> None:
        """Runs whole images of a side without a pause for `--sustain` seconds and writes a row of "sustain"."""
        parts = [part for part in side.parts.values() if part.calls]
        if any(part.calls > 1 for part in parts):
            left_out[side.name] = "a step of it is timed and multiplied; --whole runs all steps"
            return
        runs = [part.prepare(batch) for part in parts]
        found = sustain(runs, self.arguments.sustain, self.arguments.device)
        case = self._case(side, batch)
        self.rows.append(self.results.row("sustain", case, {"image": found.pop("samples")}, **found))

    def _dtype(self, side: Side) -> str:
        dtypes = {p.dtype for module in side.modules for p in module.parameters()}
        if torch.bfloat16 in dtypes:
            return "bf16"
        return "tf32" if self.arguments.dtype == "tf32" else "fp32"
