"""Everything that needs a GPU, in one command: `make gpu`.

Runs the tests marked `gpu`, compute-sanitizer over the decode step where it is there, then every op benchmark, each
within its share of the time, and the comparison with DiT-XL/2 in the rest; what fails or is not installed is said by
name and the rest goes on. Writes under `$OUT` (else benchmarks/results/): `gpu-<date>.jsonl` with every raw sample,
and `gpu-<date>.log`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

from benchmarks._results import environment, results_folder

OPS = (
    "nearest_codebook",
    "masked_attention",
    "code_mixture",
    "group_norm_silu",
    "add_layer_norm",
    "maskgit_decode_step",
)

ENGINE_SECONDS = 45  # at most for benchmarks.engine: images a second and one image's latency at 256 pixels
HEADLINE_MINUTES = 3  # of the time, kept for it and benchmarks.speedup


def ceilings() -> dict[str, float]:
    """What this card reaches: bytes/s of a device-to-device copy (read plus written), FLOP/s of a bf16 product."""
    from benchmarks._timing import interleave

    source = torch.randn(1 << 30, device="cuda")  # 4 GiB, far beyond any cache
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    samples = interleave({"copy": lambda: target.copy_(source), "mm": lambda: a @ b}, seconds=3)
    medians = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
    return {
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / medians["copy"],
        "bf16_flop_per_s": 2 * 8192**3 / medians["mm"],
    }


def _run(command: list[str], log: IO[str], limit: float) -> str:
    """Runs one part, copying its output to screen and log. Returns "ok" or what went wrong."""
    print(f"\n$ {' '.join(command)}", flush=True)
    log.write(f"\n$ {' '.join(command)}\n")
    log.flush()
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
        output, verdict = run.stdout, "ok" if run.returncode == 0 else f"exit status {run.returncode}"
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        verdict = f"stopped after {limit:.0f} s"
    log.write(output)
    log.flush()
    print(output[-6000:], flush=True)
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="for everything together (default: %(default)s)"
    )
    parser.add_argument("--ops", nargs="*", default=list(OPS), help="op benchmarks to run (default: all)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device here")
    end = time.monotonic() + 60 * arguments.minutes
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{stamp}.jsonl"
    verdicts: dict[str, str] = {}
    with path.open("a") as file, (folder / f"gpu-{stamp}.log").open("a") as log:
        file.write(json.dumps(environment()) + "\n")
        file.write(json.dumps({"kind": "ceilings", **ceilings()}) + "\n")
        file.flush()
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        verdicts["tests"] = _run(tests, log, max(30.0, (end - time.monotonic()) * 0.4))
        if sanitizer := shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck"):
                check = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "-k", "sanitize"]
                verdicts[tool] = _run(check, log, max(20.0, (end - time.monotonic()) * 0.15))
        else:
            verdicts["compute-sanitizer"] = "not installed"
        for i, op in enumerate(arguments.ops):
            share = (end - 60 * HEADLINE_MINUTES - time.monotonic()) / (len(arguments.ops) - i)
            bench = [sys.executable, "-m", f"benchmarks.bench_{op}", "--json", str(path)]
            verdicts[op] = _run(bench, log, share) if share > 10 else "no time left"
        engine = [sys.executable, "-m", "benchmarks.engine", "--device", "cuda", "--rows", "titok"]
        engine += ["--batch", "1", "64", "--seconds", "5", "--out", str(path)]
        headline = [sys.executable, "-m", "benchmarks.speedup", "--device", "cuda", "--out", str(path)]
        if missing := [name for name in ("rich", "einops") if importlib.util.find_spec(name) is None]:
            verdicts["speedup"] = f"not installed: {', '.join(missing)}"
        else:
            verdicts["engine"] = _run(engine, log, ENGINE_SECONDS)
            left = end - time.monotonic()
            verdicts["speedup"] = (
                _run([*headline, f"--limit={left - 20:.0f}"], log, left) if left > 60 else "no time left"
            )
        file.write(json.dumps({"kind": "verdicts", **verdicts}) + "\n")
    print("\n" + "\n".join(f"{name:22} {verdict}" for name, verdict in verdicts.items()))
    print(f"results: {Path(path)}")
    sys.exit(any(v != "ok" and not v.startswith("not installed") for v in verdicts.values()))


if __name__ == "__main__":
    main()
