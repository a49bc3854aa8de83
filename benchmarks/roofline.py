"""Where the time of a preset goes, and how far each stage is from what the machine can do.

`python -m benchmarks.roofline --preset titok-l-64-512`: for each stage FLOP, least bytes, the floor (the longer of both
at the rates of torch.mm and of a copy, measured in the same run), the time it took, and the gap between the two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import _tables, flops
from benchmarks._results import Results
from benchmarks._sides import Models, Run, _labels
from benchmarks._timing import interleave
from benchmarks.flops import Work
from benchmarks.speedup import DTYPES, begin, ceiling_runs
from titok import Pipeline, sample_tokens
from titok.config import GENERATOR_PRESETS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    p.add_argument("--preset", default="titok-l-32", choices=list(GENERATOR_PRESETS))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--seconds", type=float, default=30)
    p.add_argument("--out", help="results file; default results/<machine>-<device>-<date>.jsonl")
    return p


def stages(models: Models, batch: int) -> dict[str, tuple[Work, Run]]:
    """Stage -> what it costs at least, with upsampling folded, and how to run it."""
    pipe = Pipeline(models.tokenizer, models.generator)
    tokenizer, generator = pipe.tokenizer, pipe.generator
    config, g = tokenizer.config, generator.config
    images = torch.rand(batch, config.channels, *config.image_size, dtype=tokenizer.dtype, device=tokenizer.device)
    tokens = torch.randint(config.codebook_size, (batch, config.num_latent_tokens), device=tokenizer.device)
    assert tokenizer.quantizer is not None
    latents = tokenizer.quantizer.lookup(tokens).to(tokenizer.dtype)
    with torch.no_grad():
        logits = tokenizer.decoder(latents)

    def run(function: Callable[..., Any], *arguments: Any) -> Run:
        @torch.no_grad()
        def call() -> Any:
            return function(*arguments)

        return call

    labels = _labels(batch)
    return {
        "encoder": (flops.encoder(config, batch), run(tokenizer.encode, images)),
        "generator": (flops.generate(g, batch), run(sample_tokens, generator, labels)),
        "decoder": (flops.decoder(config, batch), run(tokenizer.decode_head, tokens)),
        "pixel decoder": (flops.pixel_decoder(config, batch, folded=True), run(tokenizer.decode_pixels, logits)),
        "labels to pictures": (
            flops.total(
                (
                    flops.generate(g, batch),
                    flops.decoder(config, batch),
                    flops.pixel_decoder(config, batch, folded=True),
                )
            ),
            run(pipe, labels),
        ),
    }


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one result row, per stage: floors by arithmetic and by memory in seconds, time, and the gap."""
    ceiling = _tables.ceilings([{**record, "bench": "ceiling"}])
    dtype = record["case"]["dtype"]
    mm, copy = ceiling[f"mm {dtype}"], ceiling[f"copy {dtype}"]
    found = []
    for name, cost in record["stages"].items():
        seconds = record["median_s"][name]
        floor = max(cost["flops"] / mm, cost["bytes"] / copy)
        bound = "arithmetic" if cost["flops"] / mm >= cost["bytes"] / copy else "memory"
        found.append(
            {"stage": name, **cost, "floor_s": floor, "bound": bound, "s": seconds, "gap": seconds / floor}
        )
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["stage", "GFLOP", "least MB", "floor, ms", "bound by", "measured, ms", "gap", "could save, ms"]
    cells = []
    for row in rows(record):
        figures = (row["flops"] / 1e9, row["bytes"] / 1e6, 1e3 * row["floor_s"])
        measured = (1e3 * row["s"], row["gap"], 1e3 * (row["s"] - row["floor_s"]))
        cells.append([row["stage"], *map(_tables.number, figures), row["bound"], *map(_tables.number, measured)])
    return header, cells


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = begin(arguments)
    dtype, batch = DTYPES[arguments.dtype], arguments.batch
    todo = stages(Models(arguments.preset, dtype, arguments.device), batch)
    ceiling, work = ceiling_runs(dtype, arguments.device)
    samples = interleave({**ceiling, **{name: run for name, (_, run) in todo.items()}}, arguments.seconds)
    case = {"preset": arguments.preset, "dtype": arguments.dtype, "device": arguments.device, "batch": batch}
    costs = {name: {"flops": w.flops, "bytes": w.bytes(dtype.itemsize)} for name, (w, _) in todo.items()}
    record = Results(path).row("roofline", case, samples, work=work, stages=costs)
    header, cells = table(record)
    _tables.show(header, cells, f"{arguments.preset}, {arguments.dtype}, batch {batch}")
    ceilings = _tables.ceilings([{**record, "bench": "ceiling"}])
    print(
        f"ceilings: torch.mm {ceilings[f'mm {arguments.dtype}'] / 1e9:,.0f} GFLOP/s, "
        f"copy {ceilings[f'copy {arguments.dtype}'] / 1e9:,.1f} GB/s (read and written); medians; samples in {path}"
    )


if __name__ == "__main__":
    main()
