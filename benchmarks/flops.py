"""FLOP and least bytes of one image by formula, nothing measured: `python -m benchmarks.flops --preset titok-l-32`."""

from __future__ import annotations

import argparse

from benchmarks.harness import flops, tables
from benchmarks.harness.flops import Work
from benchmarks.harness.tables import number
from titok.config import GENERATOR_PRESETS, GeneratorConfig, TokenizerConfig


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.flops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--preset",
        nargs="+",
        default=list(GENERATOR_PRESETS),
        choices=list(GENERATOR_PRESETS),
        help="default: all",
    )
    p.add_argument("--batch", type=int, default=1, help="images that share the reading of weights (default: 1)")
    p.add_argument("--bytes", type=int, default=2, dest="width", help="of one number (default: 2, as bfloat16)")
    return p


def stages(preset: str, batch: int) -> dict[str, Work]:
    """Stage -> its cost for one batch, as titok computes it."""
    t, g = TokenizerConfig.preset(preset), GeneratorConfig.preset(preset)
    return {
        "encoder": flops.encoder(t, batch),
        "generator": flops.generate(g, batch),
        "ViT decoder": flops.decoder(t, batch),
        "pixel decoder": flops.pixel_decoder(t, batch, folded=True),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    lines = []
    for preset in arguments.preset:
        for name, work in stages(preset, arguments.batch).items():
            moved = work.bytes(arguments.width) / arguments.batch
            lines.append([preset, name, number(work.flops / arguments.batch / 1e9, 4), number(moved / 1e6)])
    tables.show(["preset", "stage", "GFLOP an image", "least MB an image"], lines)


if __name__ == "__main__":
    main()
