"""titok's generation against generation as published, on this machine: `python -m benchmarks.engine --batch 1 4`.

The rival is `benchmarks/baselines/as_published.py` on the same random weights: "native" in the dtype and, for bf16,
"autocast" with float32 weights. All sides and torch.mm, the ceiling, take turns; a ratio is the median over the
rounds, so that drift of the machine hits both of its sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import _sides, _tables, flops
from benchmarks._results import Results, quantiles
from benchmarks._sides import Models, Side
from benchmarks._timing import interleave
from benchmarks.baselines.as_published import AsPublished
from benchmarks.speedup import DTYPES, begin, ceiling_runs, count
from titok import sample_tokens
from titok.config import GENERATOR_PRESETS, GeneratorConfig

NATIVE, AUTOCAST, OURS = "native", "autocast", "titok"  # the first two as published
STAGES = ("generator", "ViT decoder", "both decoders")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    p.add_argument("--preset", default="titok-l-32", choices=list(GENERATOR_PRESETS))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    p.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    p.add_argument("--rows", default="", help="parts of side names, comma-separated; default all")
    p.add_argument("--stages", action="store_true", help="time each stage by itself in place of whole pictures")
    p.add_argument(
        "--seconds", type=float, default=30, help="of taking turns for a batch size; at least three rounds"
    )
    p.add_argument("--out", help="results file; default results/<machine>-<device>-<date>.jsonl")
    return p


def sides(arguments: argparse.Namespace) -> dict[str, tuple[Models, dict[str, Any]]]:
    """Name -> models, and the arguments of `AsPublished` (titok has none)."""
    dtype = DTYPES[arguments.dtype]
    names = _sides.chosen([NATIVE, AUTOCAST, OURS] if dtype == torch.bfloat16 else [NATIVE, OURS], arguments.rows)
    models = {
        d: Models(arguments.preset, d, arguments.device, whole=True)
        for d in {torch.float32 if name == AUTOCAST else dtype for name in names}
    }
    return {
        name: (models[torch.float32], {"autocast": True}) if name == AUTOCAST else (models[dtype], {})
        for name in names
    }


def stages(name: str, models: Models, ways: dict[str, Any], batch: int) -> list[Callable[[], Any]]:
    """How to run each of `STAGES` by itself."""
    labels, g = _sides._labels(batch), models.generator.config
    tokens = torch.randint(g.codebook_size, (batch, g.num_latent_tokens), device=models.generator.device)
    if name == OURS:
        tokenizer = models.tokenizer
        return [
            partial(sample_tokens, models.generator, labels),
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
    """Of one image, for each of `STAGES`."""
    sampling = flops.generate(generator, as_written=name != OURS).flops
    return [sampling, side.bare_flops - sampling, side.flops - sampling]


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Of one result row, every side, with the median of the rounds' ratios of its time to titok's for the same."""
    samples, batch, work = record["samples_s"], record["case"]["batch"], record["work"]
    mm = work["mm"] / quantiles(samples["mm"])[0]
    header = ["", "images/s", "20-80%", "ms an image", "GFLOP/s", "of mm", "titok is faster by"]
    cells = []
    for name in samples:
        if name in ("mm", "copy"):
            continue
        median, low, high = quantiles(samples[name])
        rates = (batch / median, batch / high, batch / low)
        rate, least, most = map(_tables.number, rates)
        achieved = work[name] * rates[0]
        line = [name, rate, f"{least}-{most}", _tables.number(1e3 / rates[0])]
        line += [_tables.number(achieved / 1e9), f"{achieved / mm:.0%}"]
        ours = samples.get(name.replace(name.split(":")[0], OURS))
        if ours is None or ours is samples[name]:
            line.append("")
        else:
            ratio = quantiles([theirs / own for theirs, own in zip(samples[name], ours, strict=True)])
            line.append("{:.2f}x ({:.2f}-{:.2f})".format(*ratio))
        cells.append(line)
    return header, cells


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    path = begin(arguments)
    results, chosen = Results(path), sides(arguments)
    built = {
        name: m.ours(name) if name == OURS else m.published(name, **ways) for name, (m, ways) in chosen.items()
    }
    if OURS in built:
        built[OURS].settle(count(built[OURS]))
    for batch in arguments.batch:
        runs, work = ceiling_runs(DTYPES[arguments.dtype], arguments.device)
        for name, (models, ways) in chosen.items():
            if arguments.stages:
                names = [f"{name}: {stage}" for stage in STAGES]
                runs |= zip(names, stages(name, models, ways, batch), strict=True)
                work |= zip(names, stage_flops(name, built[name], models.generator.config), strict=True)
            else:
                runs[name], work[name] = built[name].parts["generate"].prepare(batch), built[name].flops
        samples = interleave(runs, arguments.seconds)
        case = {"preset": arguments.preset, "dtype": arguments.dtype, "device": arguments.device, "batch": batch}
        record = results.row("engine", case, samples, work=work)
        header, cells = table(record)
        title = f"{arguments.preset}, {arguments.dtype}, batch {batch}, {len(samples['mm'])} rounds"
        if arguments.stages:
            cells.sort(key=lambda line: STAGES.index(line[0].split(": ")[1]))
        _tables.show(header, cells, title)
        rate = work["mm"] / quantiles(samples["mm"])[0]
        print(f"torch.mm in the same rounds: {rate / 1e9:,.0f} GFLOP/s; medians; samples in {path}")


if __name__ == "__main__":
    main()
