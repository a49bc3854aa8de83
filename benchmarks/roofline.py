"""Where the time of a preset goes, and how far each stage is from what the machine can do.

`python -m benchmarks.roofline --preset titok-l-64-512` prints for each stage its FLOP, its least bytes, its floor,
the time it took, and the ratio of the two. The floor is the longer of FLOP at the rate of a matrix product and of least
bytes at the rate of a copy, both measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import flops, measures, tables
from benchmarks.harness.ceilings import ceiling_runs
from benchmarks.harness.flops import Work
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, add_preset, command_parser, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import Run, class_labels
from benchmarks.harness.timing import measure
from titok import Pipeline, sample_tokens

MIN_ROUNDS = 7  # also where they take longer than --seconds: the ceilings need calls that nothing disturbed


def parser() -> argparse.ArgumentParser:
    p = command_parser("roofline", __doc__)
    add_preset(p)
    p.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    p.add_argument(
        "--seconds", type=float, default=30, help="how long the stages take turns (default: %(default)s)"
    )
    add_out(p)
    return p


def stages(models: Models, batch: int) -> dict[str, tuple[Work, Run]]:
    """Stage -> its cost by formula, with upsampling folded, and a function without arguments that runs it."""
    pipe = Pipeline(models.tokenizer, models.generator)
    tokenizer, generator = pipe.tokenizer, pipe.generator
    t, g = tokenizer.config, generator.config
    images = torch.rand(batch, t.channels, *t.image_size, dtype=tokenizer.dtype, device=tokenizer.device)
    tokens = torch.randint(t.codebook_size, (batch, t.num_latent_tokens), device=tokenizer.device)
    labels = class_labels(batch)
    with torch.no_grad():
        logits = tokenizer.decode_head(tokens)

    def run(function: Callable[..., Any], *arguments: Any) -> Run:
        @torch.no_grad()
        def call() -> Any:
            return function(*arguments)

        return call

    generate, decode = flops.generate(g, batch), flops.decoder(t, batch)
    decode_pixels = flops.pixel_decoder(t, batch, folded=True)
    return {
        "encoder": (flops.encoder(t, batch), run(tokenizer.encode, images)),
        "generator": (generate, run(sample_tokens, generator, labels)),
        "decoder": (decode, run(tokenizer.decode_head, tokens)),
        "pixel decoder": (decode_pixels, run(tokenizer.decode_pixels, logits)),
        "labels to pictures": (flops.total((generate, decode, decode_pixels)), run(pipe, labels)),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = start(arguments)
    dtype, batch = DTYPES[arguments.dtype], arguments.batch
    todo = stages(Models(arguments.preset, dtype, arguments.device), batch)
    ceiling, work = ceiling_runs(dtype, arguments.device)
    runs = {**ceiling, **{name: run for name, (_, run) in todo.items()}}
    measured = measure(runs, arguments.seconds, rounds=MIN_ROUNDS)
    case = {"preset": arguments.preset, "dtype": arguments.dtype, "device": arguments.device, "batch": batch}
    costs = {name: {"flops": w.flops, "bytes": w.bytes(dtype.itemsize)} for name, (w, _) in todo.items()}
    row = Results(path).row(
        "roofline", case, measured.samples, work=work, stages=costs, conditions=measured.conditions
    )
    tables.show(*tables.stage_table(row), tables.describe(row))
    mm, copy = (measures.own_ceiling(row, name) for name in ("mm", "copy"))
    print(
        f"ceilings, the fastest calls: matrix product {mm / 1e9:,.0f} GFLOP/s, "
        f"copy {copy / 1e9:,.1f} GB/s (read and written); medians; "
        f"samples in {path}"
    )


if __name__ == "__main__":
    main()
