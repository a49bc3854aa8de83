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

from benchmarks.baselines.as_published import AsPublished
from benchmarks.harness import tables
from benchmarks.harness.measures import INT8, OURS
from benchmarks.harness.memory import status_bytes
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, add_preset, command_parser, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import class_labels
from titok import MaskGIT, Pipeline, TiTok
from titok.inference.dtypes import Dtype
from titok.inference.int8 import why_no_int8

TORCH, PUBLISHED = "import torch", "as published"


def parser() -> argparse.ArgumentParser:
    p = command_parser("memory", __doc__)
    add_preset(p)
    p.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    p.add_argument(
        "--side", choices=[TORCH, PUBLISHED, OURS, INT8], help="measure one side in this process and print JSON"
    )
    p.add_argument("--folder", type=Path, help="where the models of --side are")
    add_out(p)
    return p


def measure(side: str, folder: Path, dtype: torch.dtype, batch: int) -> dict[str, int]:
    """Bytes of this process: "loaded", and the peaks "peak_loading" and "peak_generating" up to these points."""
    found = {"loaded": status_bytes("VmRSS")}
    if side == TORCH:
        return found
    if side in (OURS, INT8):
        precision: Dtype = "int8" if side == INT8 else dtype
        generate = Pipeline.from_pretrained(folder / "tokenizer", folder / "generator", dtype=precision)
    else:
        tokenizer = TiTok.from_pretrained(folder / "tokenizer", dtype=dtype)  # with its encoder, as in titok
        generator = MaskGIT.from_pretrained(folder / "generator", dtype=dtype)
        generate = AsPublished(tokenizer, generator, dtype=dtype)  # type: ignore[assignment]
    found = {"loaded": status_bytes("VmRSS"), "peak_loading": status_bytes("VmHWM")}
    generate(class_labels(batch))
    return found | {"peak_generating": status_bytes("VmHWM")}


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
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder, dtype, arguments.batch)))
        return
    results = Results(start(arguments))
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, whose memory ends with it.
        program = "import sys, torch; from pathlib import Path; from benchmarks.memory import write_models;"
        program += f"print(write_models({arguments.preset!r}, {dtype}, Path(sys.argv[1])))"
        written = subprocess.run(
            [sys.executable, "-c", program, folder], check=True, capture_output=True, text=True
        )
        command = [sys.executable, "-m", "benchmarks.memory", "--dtype", arguments.dtype, "--device", "cpu"]
        command += ["--batch", str(arguments.batch), "--folder", folder]
        chosen = [TORCH, PUBLISHED, OURS]
        if dtype == torch.bfloat16 and why_no_int8("cpu") is None:
            chosen.append(INT8)
        sides = {
            side: json.loads(
                subprocess.run([*command, "--side", side], check=True, capture_output=True, text=True).stdout
            )
            for side in chosen
        }
    case = {"preset": arguments.preset, "dtype": arguments.dtype, "device": "cpu", "batch": arguments.batch}
    row = results.row("memory", case, {}, weight_bytes=int(written.stdout), sides=sides)
    tables.show(*tables.memory_table(row), f"{arguments.preset}, {arguments.dtype}, batch {arguments.batch}")
    print(f"weights: {row['weight_bytes'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
