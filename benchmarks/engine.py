"""titok's generation against generation as published, on this machine: `python -m benchmarks.engine --batch 1 4`.

The rival is `benchmarks/baselines/as_published.py` with the same random weights: "native" in the dtype asked for
and, for bf16, "autocast" with float32 weights. For bf16, titok also runs with 8-bit layers where the CPU is fast with
them. All sides and a matrix product, the ceiling, take turns. A ratio is the
median over the rounds of their ratios, so that a change in the machine's speed affects both of its sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.baselines.as_published import AsPublished
from benchmarks.harness import flops, measures, tables
from benchmarks.harness.ceilings import ceiling_runs
from benchmarks.harness.measures import INT8, OURS
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, add_preset, command_parser, matching, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import Side, class_labels
from benchmarks.harness.timing import measure
from titok import sample_tokens
from titok.config import GeneratorConfig
from titok.inference.int8 import why_no_int8

NATIVE, AUTOCAST = "native", "autocast"  # two ways to run the published code
STAGES = ("generator", "ViT decoder", "both decoders")


def parser() -> argparse.ArgumentParser:
    p = command_parser("engine", __doc__)
    add_preset(p)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    p.add_argument("--rows", default="", help="parts of side names, comma-separated (default: all sides)")
    p.add_argument("--stages", action="store_true", help="time each stage alone instead of whole pictures")
    p.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="how long the sides take turns at each batch size, for three rounds at least (default: %(default)s)",
    )
    add_out(p)
    return p


def sides(arguments: argparse.Namespace) -> dict[str, tuple[Models, dict[str, Any]]]:
    """Name -> models, and the keyword arguments of `AsPublished` or, for titok, of `Models.ours`."""
    dtype = DTYPES[arguments.dtype]
    candidates = [NATIVE, AUTOCAST, OURS] if dtype == torch.bfloat16 else [NATIVE, OURS]
    if dtype == torch.bfloat16 and why_no_int8(arguments.device) is None:
        candidates.append(INT8)
    models: dict[torch.dtype, Models] = {}
    found: dict[str, tuple[Models, dict[str, Any]]] = {}
    for name in matching(candidates, arguments.rows):
        weights = torch.float32 if name == AUTOCAST else dtype
        if weights not in models:
            models[weights] = Models(arguments.preset, weights, arguments.device, all_steps=True)
        found[name] = models[weights], {AUTOCAST: {"autocast": True}, INT8: {"quantize": True}}.get(name, {})
    return found


def stages(name: str, models: Models, ways: dict[str, Any], batch: int) -> list[Callable[[], Any]]:
    """A function without arguments for each of `STAGES`."""
    labels, g = class_labels(batch), models.generator.config
    tokens = torch.randint(g.codebook_size, (batch, g.num_latent_tokens), device=models.generator.device)
    if name in (OURS, INT8):
        tokenizer, generator = models.quantized if name == INT8 else models.prepared
        return [
            partial(sample_tokens, generator, labels),
            torch.no_grad()(partial(tokenizer.decode_logits, tokens)),
            torch.no_grad()(partial(tokenizer.decode, tokens)),
        ]
    rival = AsPublished(models.tokenizer, models.generator, **ways)
    return [
        partial(rival.sample, labels),
        partial(rival.logits, tokens),
        lambda: rival.pixels(rival.logits(tokens)),
    ]


def stage_flops(name: str, side: Side, generator: GeneratorConfig) -> list[int]:
    """FLOP of one image in each of `STAGES`."""
    sampling = flops.generate(generator, as_written=name not in (OURS, INT8)).flops
    return [sampling, side.flops_without_pixels - sampling, side.flops - sampling]


def build(name: str, models: Models, ways: dict[str, Any]) -> Side:
    if name not in (OURS, INT8):
        return models.published(name, **ways)
    side = models.ours(name, **ways)
    side.choose_formula(side.count_flops())
    return side


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = start(arguments)
    results, chosen = Results(path), sides(arguments)
    built = {name: build(name, models, ways) for name, (models, ways) in chosen.items()}
    failed: dict[str, str] = {}
    for batch in arguments.batch:
        runs, work = ceiling_runs(DTYPES[arguments.dtype], arguments.device)
        for name, (models, ways) in chosen.items():
            if arguments.stages:
                names = [f"{name}: {stage}" for stage in STAGES]
                runs |= zip(names, stages(name, models, ways, batch), strict=True)
                work |= zip(names, stage_flops(name, built[name], models.generator.config), strict=True)
            else:
                runs[name], work[name] = built[name].parts["generate"].prepare(batch), built[name].flops
        measured = measure(runs, arguments.seconds)
        samples = measured.samples
        failed |= measured.problems
        for name, problem in measured.problems.items():
            results.note(f"{name} was not timed: {problem}")
            print(f"{name} was not timed: {problem}")
        case = {"preset": arguments.preset, "dtype": arguments.dtype, "device": arguments.device, "batch": batch}
        about = {"work": work, "checked": measured.checked, "conditions": measured.conditions}
        row = results.row("engine", case, samples, **about)
        header, lines = tables.engine_table(row)
        if arguments.stages:
            lines.sort(key=lambda line: STAGES.index(line[0].split(": ")[1]))
        tables.show(header, lines, f"{tables.describe(row)}, {len(samples['mm'])} rounds")
        mm = measures.own_ceiling(row, "mm")
        print(
            f"fastest matrix product in the same rounds: {mm / 1e9:,.0f} GFLOP/s; else medians; samples in {path}"
        )
    if failed:
        sys.exit(f"benchmarks.engine: wrong results: {', '.join(failed)}")


if __name__ == "__main__":
    main()
