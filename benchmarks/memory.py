"""Memory of whole processes on a CPU: `python -m benchmarks.memory --preset titok-l-32 --dtype fp32`.

Each side loads both models from files in a process of its own and generates one batch: titok by
`Pipeline.from_pretrained`, for bf16 also with 8-bit layers where the CPU is fast with them; the rival
`benchmarks/baselines/as_published.py` with the models from the same files. A further process only imports PyTorch. The
files hold random weights. Linux only, because it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import tables
from benchmarks.harness.measures import INT8, OURS
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, add_preset, command_parser, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import class_labels
from titok.inference.int8 import why_no_int8

TORCH, PUBLISHED = "import torch", "as published"

# What a process runs, with the folder of the models, the dtype and the labels as its arguments. It imports nothing but
# what it needs, because imported modules count as well.
_REPORT = """
import json, sys, torch
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
"""
_GENERATE = """
found = {"loaded": status("VmRSS:"), "peak_loading": status("VmHWM:")}
generate(labels)
print(json.dumps(found | {"peak_generating": status("VmHWM:")}))
"""
_ARGUMENTS = "folder, dtype, labels = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
_OURS = """
from titok import Pipeline
dtype = dtype if dtype == "int8" else getattr(torch, dtype)
generate = Pipeline.from_pretrained(f"{folder}/tokenizer", f"{folder}/generator", dtype=dtype)
"""
_PUBLISHED = """
from benchmarks.baselines.as_published import AsPublished
from titok import MaskGIT, TiTok
dtype = getattr(torch, dtype)
tokenizer = TiTok.from_pretrained(f"{folder}/tokenizer", dtype=dtype)  # with its encoder, as in titok
generate = AsPublished(tokenizer, MaskGIT.from_pretrained(f"{folder}/generator", dtype=dtype), dtype=dtype)
"""
PROGRAMS = {
    TORCH: _REPORT + 'print(json.dumps({"loaded": status("VmRSS:")}))',
    PUBLISHED: _REPORT + _ARGUMENTS + _PUBLISHED + _GENERATE,
    OURS: _REPORT + _ARGUMENTS + _OURS + _GENERATE,
    INT8: _REPORT + _ARGUMENTS + _OURS + _GENERATE,
}


def parser() -> argparse.ArgumentParser:
    p = command_parser("memory", __doc__)
    add_preset(p)
    p.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    add_out(p)
    return p


def measure(side: str, folder: str, dtype: torch.dtype, batch: int) -> dict[str, int]:
    """Bytes of a process: "loaded", and the peaks "peak_loading" and "peak_generating" up to these points."""
    name = "int8" if side == INT8 else str(dtype).removeprefix("torch.")
    command = [sys.executable, "-c", PROGRAMS[side], folder, name, json.dumps(class_labels(batch))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, int] = json.loads(output)
    return found


def write_models(preset: str, dtype: torch.dtype, folder: Path) -> int:
    """Writes both models of a preset with random weights, and returns the bytes of their weights."""
    models = Models(preset, dtype, "cpu")
    models.tokenizer.save_pretrained(folder / "tokenizer")
    models.generator.save_pretrained(folder / "generator")
    weights = [*models.tokenizer.parameters(), *models.generator.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    dtype = DTYPES[arguments.dtype]
    results = Results(start(arguments))
    sides = [TORCH, PUBLISHED, OURS]
    if dtype == torch.bfloat16 and why_no_int8("cpu") is None:
        sides.append(INT8)
    with tempfile.TemporaryDirectory() as folder:
        weight_bytes = write_models(arguments.preset, dtype, Path(folder))
        found = {side: measure(side, folder, dtype, arguments.batch) for side in sides}
    case = {"preset": arguments.preset, "dtype": arguments.dtype, "device": "cpu", "batch": arguments.batch}
    row = results.row("memory", case, {}, weight_bytes=weight_bytes, sides=found)
    tables.show(*tables.memory_table(row), f"{arguments.preset}, {arguments.dtype}, batch {arguments.batch}")
    print(f"weights: {row['weight_bytes'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
