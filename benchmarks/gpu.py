"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu --minutes 8.5 --out benchmarks/results`.

It runs the tests marked `gpu`, compute-sanitizer over the decoding step if that tool is installed, every op
benchmark, and the comparison with DiT-XL/2, and divides the time budget between them. A part that fails, or whose
tools are not installed, is named at the end, and the others run all the same. Two files are written to the output
folder: `gpu-<date>.jsonl` with every raw sample, and `gpu-<date>.log` with all output. The exit status is 1 if any
part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

from benchmarks.harness.ceilings import ceiling_runs
from benchmarks.harness.results import FOLDER, Results
from benchmarks.harness.timing import interleave

OPS = (
    "nearest_codebook",
    "masked_attention",
    "code_mixture",
    "group_norm_silu",
    "add_layer_norm",
    "maskgit_decode_step",
)
ENGINE_SECONDS = 45  # at most, for `benchmarks.engine`
COMPARISON_SECONDS = 180  # kept free for `benchmarks.engine` and `benchmarks.speedup`
NOT_INSTALLED, NO_TIME = "not installed", "no time left"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=8.5,
        help="time budget for everything; a part that overruns its share is stopped (default: %(default)s)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="where the results file and the log go; made if missing (default: benchmarks/results)",
    )
    p.add_argument("--ops", nargs="*", default=list(OPS), choices=OPS, help="op benchmarks to run (default: all)")
    return p


class Runner:
    """Runs parts one after the other within the time budget and remembers how each of them ended."""

    def __init__(self, minutes: float, log: IO[str]) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.log = log
        self.verdicts: dict[str, str] = {}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def run(self, name: str, command: list[str], limit: float) -> None:
        """Runs one part for at most `limit` seconds; its output goes to the screen (its end) and the log."""
        print(f"\n$ {' '.join(command)}", flush=True)
        self.log.write(f"\n$ {' '.join(command)}\n")
        self.log.flush()
        try:
            run = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
            )
            output, verdict = run.stdout, "ok" if run.returncode == 0 else f"exit status {run.returncode}"
        except subprocess.TimeoutExpired as error:
            partial = error.stdout or b""
            output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
            verdict = f"stopped after {limit:.0f} s"
        self.log.write(output)
        self.log.flush()
        print(output[-6000:], flush=True)
        self.verdicts[name] = verdict

    def failed(self) -> bool:
        return any(v != "ok" and not v.startswith(NOT_INSTALLED) for v in self.verdicts.values())


def tests(runner: Runner) -> None:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    runner.run("tests", pytest, max(30.0, 0.4 * runner.left()))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        runner.verdicts["compute-sanitizer"] = NOT_INSTALLED
        return
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-k", "sanitize"]
        runner.run(tool, command, max(20.0, 0.15 * runner.left()))


def op_benchmarks(runner: Runner, ops: list[str], results: Path) -> None:
    for i, op in enumerate(ops):
        share = (runner.left() - COMPARISON_SECONDS) / (len(ops) - i)
        if share > 10:
            command = [sys.executable, "-m", f"benchmarks.bench_{op}", "--json", str(results)]
            runner.run(op, command, share)
        else:
            runner.verdicts[op] = NO_TIME


def comparison(runner: Runner, results: Path) -> None:
    if missing := [name for name in ("rich", "einops") if importlib.util.find_spec(name) is None]:
        runner.verdicts["speedup"] = f"{NOT_INSTALLED}: {', '.join(missing)}"
        return
    engine = [sys.executable, "-m", "benchmarks.engine", "--device", "cuda", "--rows", "titok"]
    engine += ["--batch", "1", "64", "--seconds", "5", "--out", str(results)]
    runner.run("engine", engine, ENGINE_SECONDS)
    left = runner.left()
    if left > 60:
        speedup = [sys.executable, "-m", "benchmarks.speedup", "--device", "cuda", "--out", str(results)]
        runner.run("speedup", [*speedup, f"--limit={left - 20:.0f}"], left)
    else:
        runner.verdicts["speedup"] = NO_TIME


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device here")
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    path = arguments.out / f"{name}.jsonl"
    with (arguments.out / f"{name}.log").open("a") as log:
        runner = Runner(arguments.minutes, log)
        results = Results(path)
        runs, work = ceiling_runs(torch.bfloat16, "cuda")
        results.row("ceiling", {"dtype": "bf16", "device": "cuda"}, interleave(runs, 3.0), work=work)
        del runs
        torch.cuda.empty_cache()  # this process keeps no GPU memory from the parts that follow
        tests(runner)
        op_benchmarks(runner, arguments.ops, path)
        comparison(runner, path)
        results.write({"kind": "verdicts", **runner.verdicts})
    print("\n" + "\n".join(f"{part:22} {verdict}" for part, verdict in runner.verdicts.items()))
    print(f"results: {path}")
    sys.exit(runner.failed())


if __name__ == "__main__":
    main()
