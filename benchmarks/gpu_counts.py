"""What a GPU is asked to do for one picture of TiTok-L-64 at 512 pixels, counted without a GPU.

    python -m benchmarks.gpu_counts                  # launches, bytes, FLOP, and the arithmetic of docs/performance.md
    python -m benchmarks.gpu_counts --tree FOLDER    # launches alone, of the sources in a folder

Launches are counted by the dry run of the tests (`tests/fake_cuda/`): the models run on tensors that have no values,
and every op and launch that would give a GPU work is recorded. Bytes and FLOP come from the formulas below. Nothing is
timed.

`--tree` counts an earlier commit with this very command:

    git worktree add FOLDER COMMIT && ln -s ../kernels FOLDER/titok/kernels
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PRESET, BYTES = "titok-l-64-512", 2  # of an element: bfloat16
# What the arithmetic assumes of an H200: bytes a second, FLOP a second of products, and multiprocessors.
BANDWIDTH, PRODUCTS, MULTIPROCESSORS = 4e12, 550e12, 132
Table = dict[str, tuple[float, ...]]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--tree", type=Path, metavar="FOLDER", help="count the launches of the sources in this folder")
    return p


# ---------------------------------------------------------------------------------------------------------------
# Launches


def launches(*, fused: bool = False) -> dict[str, float]:
    """Launches of one call at batch 1, from a label to 8-bit pictures, by the dry run in `tests` of Python's path.

    Args:
        fused: a linear layer and what follows it are one launch.
    """
    import torch

    dry_run, fake = importlib.import_module("test_dry_run"), importlib.import_module("fake_cuda")
    from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig
    from titok.data.images import to_uint8

    generator, tokenizer = GeneratorConfig.preset(PRESET), TokenizerConfig.preset(PRESET)
    found = []
    with contextlib.ExitStack() as stack:
        if fused:
            from benchmarks.choices import ADD_NORM_LAYERS, GELU_LAYERS, chosen
            from titok.inference import fused_linear

            stack.enter_context(chosen("LINEAR_GELU_LAYERS", dict.fromkeys(GELU_LAYERS, 1 << 30)))
            stack.enter_context(chosen("LINEAR_ADD_NORM_LAYERS", frozenset(ADD_NORM_LAYERS)))
        for layers in (1, 2):  # all layers of a transformer launch the same
            with fake.fake_gpus() as recorder, torch.no_grad(), contextlib.ExitStack() as run:
                sides = {
                    side: dataclasses.replace(getattr(tokenizer, side), layers=layers)
                    for side in ("encoder", "decoder")
                }
                few = dataclasses.replace(generator, layers=layers)
                maskgit = fake.build(lambda few=few: MaskGIT(few), "cuda:0", torch.bfloat16)
                titok = fake.build(
                    lambda sides=sides: TiTok(dataclasses.replace(tokenizer, **sides)), "cuda:0", torch.bfloat16
                )
                request = dry_run.request_for(generator, [1])
                batch = dry_run.batch_for(maskgit, request)
                if hasattr(fake, "prepared"):
                    run.enter_context(fake.prepared(titok))
                if fused:
                    zeros = fused_linear.new_counters(torch.device("cuda:0"))
                    run.enter_context(fused_linear.counters(zeros))
                counts = []
                recorder.clear()
                tokens = dry_run.decode(maskgit, request.sampling, batch)
                counts.append(len(recorder.device_ops))
                prediction = titok.decode_head(tokens)
                counts.append(len(recorder.device_ops))
                to_uint8(titok.decode_pixels(prediction), "nearest")
                counts.append(len(recorder.device_ops))
                found.append([now - before for before, now in itertools.pairwise([0, *counts])])
    (one_loop, one_head, pixels), (two_loop, two_head, _) = found
    steps, (in_loop, in_head) = generator.sampling.steps, (two_loop - one_loop, two_head - one_head)
    rows = {
        f"generator, {generator.layers} blocks in {steps} steps": in_loop * generator.layers,
        "generator, beside the blocks": one_loop - in_loop,
        "the same in one step": (one_loop - in_loop) / steps,
        f"ViT decoder, {tokenizer.decoder.layers} blocks": in_head * tokenizer.decoder.layers,
        "ViT decoder, beside the blocks": one_head - in_head,
        "pixel decoder and conversion to 8 bits": pixels,
    }
    return {**rows, "sum": sum(count for name, count in rows.items() if name != "the same in one step")}


# ---------------------------------------------------------------------------------------------------------------
# Bytes and FLOP of the pixel decoder


def pixel_decoder() -> Table:
    """Name -> FLOP or bytes of one image, of PyTorch's own layers and as titok computes them on a GPU.

    Bytes are those that are read or written beside the maps that each 3x3 convolution reads and writes, and beside
    what a norm without a residual reads and writes.
    """
    from benchmarks.harness import flops
    from titok import TokenizerConfig

    tokenizer = TokenizerConfig.preset(PRESET)
    config = tokenizer.proxy
    assert config is not None
    widths = [config.hidden_channels * m for m in config.channel_multipliers]
    side = tokenizer.image_size[0] // config.factor

    def size(channels: int, pixels_a_side: int) -> int:
        return channels * pixels_a_side**2 * BYTES

    # Maps whose sum with a residual is taken; those of which a norm takes it, those in front of an upsampling, and
    # the results of 1x1 shortcuts.
    normed = [size(widths[-1], side)]  # the second of the two blocks in the middle reads the sum of the first
    upsampled, shortcuts, enlarged = [], [], []
    waiting, before = True, widths[-1]  # whether the block before left its sum to the next norm
    for level in reversed(range(len(widths))):
        width = widths[level]
        for inputs in (before, *[width] * (config.blocks_per_level - 1)):
            if waiting:
                normed.append(size(inputs, side))
            waiting = inputs == width
            if not waiting:  # the shortcut is part of the second convolution, which then gives the sum
                shortcuts.append(size(width, side))
        if level > 0:
            upsampled.append(size(width, side))
            side *= 2
            enlarged.append(size(width, side))
            waiting = False
        before = width
    normed.append(size(widths[0], side))  # the last norm
    small, sums = sum(upsampled), sum(normed) + sum(upsampled)
    first, last = size(widths[-1], tokenizer.image_size[0] // config.factor), size(config.channels, side)
    written = [flops.pixel_decoder(tokenizer, folded=folded) for folded in (False, True)]
    weights = (
        written[0].weights - config.codebook_size * config.code_dim
    )  # of the mixture, which is no convolution
    return {
        "FLOP of all convolutions": (written[0].flops, written[1].flops),
        # A sum reads two maps and writes one. A shortcut reads and writes one, and its sum is one of PyTorch's. In a
        # norm, a sum adds one read, of the residual, and one write, of the sum.
        "residual sums, and 1x1 shortcuts with theirs": (
            3 * (sums + sum(shortcuts)) + 2 * sum(shortcuts),
            2 * sum(normed) + 3 * small,
        ),
        # A bias is added in place. Where channels are filled up, it is added on the way to a map without these.
        "biases of convolutions": (2 * (sum(enlarged) + first + last), 2 * (first + last)),
        # PyTorch reads the small map, writes the enlarged one, and the convolution reads that. Here two convolutions
        # read the small map, and their windows are read and copied to the enlarged map.
        "upsampled maps, before or after the convolution": (
            small + 2 * sum(enlarged),
            2 * small + 2 * sum(enlarged),
        ),
        "weights that PyTorch lays out again, once a call": (2 * weights * BYTES, 0),
    }


# ---------------------------------------------------------------------------------------------------------------
# The arithmetic of what is off or left out


def choices() -> dict[str, float]:
    """Name with its unit -> the figures of "Off until it is measured" and "Left out" in docs/performance.md."""
    from benchmarks.harness import flops
    from titok import GeneratorConfig, TokenizerConfig

    generator, tokenizer = GeneratorConfig.preset(PRESET), TokenizerConfig.preset(PRESET)
    vit, steps = tokenizer.decoder, generator.sampling.steps
    tokens = 1 + generator.num_latent_tokens
    rows = tokens * (2 * steps - 1)  # the first step has no guidance
    vit_rows = math.prod(tokenizer.grid("decoder")) + 1 + tokenizer.num_latent_tokens
    hidden = {"generator": rows * generator.layers * generator.mlp_width}
    hidden["ViT decoder"] = vit_rows * vit.layers * vit.mlp_ratio * vit.width
    first_layers = 2 * (hidden["generator"] * generator.width + hidden["ViT decoder"] * vit.width)
    moved = sum(2 * BYTES * count for count in hidden.values()) / BANDWIDTH
    product = first_layers / PRODUCTS
    config = tokenizer.proxy
    assert config is not None
    side, maps, folded = tokenizer.image_size[0] // config.factor, 0, 0
    for multiplier in reversed(config.channel_multipliers[1:]):
        side, width = 2 * side, config.hidden_channels * multiplier
        maps += side**2 * width * BYTES
        folded += flops.upsample_conv(1, side, side, width, folded=True).flops
    copied, convolved = 2 * maps / BANDWIDTH, folded / PRODUCTS
    unwritten = 2 * generator.layers * tokens * (2 * steps - 2) * generator.width * BYTES
    return {
        "GELU within fc1, generator, MB": 2 * BYTES * hidden["generator"] / 1e6,
        "GELU within fc1, ViT decoder, MB": 2 * BYTES * hidden["ViT decoder"] / 1e6,
        "GELU within fc1, saved ms": 1e3 * moved,
        "GELU within fc1, GFLOP": first_layers / 1e9,
        "GELU within fc1, ms of the products": 1e3 * product,
        "GELU within fc1, least share of cuBLAS's rate": product / (product + moved),
        "norm within a product, launches saved": 2 * (steps * generator.layers + vit.layers),
        "sums that post-norm blocks do not write, MB": unwritten / 1e6,
        **{f"multiprocessors busy at batch {batch}": busy(batch) for batch in (64, 128, 192)},
        "upsampled map written directly, MB": 2 * maps / 1e6,
        "upsampled map written directly, saved ms": 1e3 * copied,
        "upsampled map written directly, GFLOP": folded / 1e9,
        "upsampled map written directly, ms of the products": 1e3 * convolved,
        "upsampled map written directly, least share of cuDNN's rate": convolved / (convolved + copied),
        "largest map, MB": tokenizer.image_size[0] ** 2 * config.hidden_channels * BYTES / 1e6,
    }


def busy(batch: int) -> float:
    """The share of the time in which all multiprocessors work on tiles of 128 x 256, in a step with guidance."""
    from titok import GeneratorConfig

    config = GeneratorConfig.preset(PRESET)
    rows = 2 * (1 + config.num_latent_tokens) * batch
    needed = taken = 0.0
    width, mlp = config.width, config.mlp_width
    for inputs, outputs in ((width, 3 * width), (width, width), (width, mlp), (mlp, width)):
        needed += inputs * rows * outputs / (128 * 256 * MULTIPROCESSORS)
        taken += inputs * math.ceil(math.ceil(rows / 128) * math.ceil(outputs / 256) / MULTIPROCESSORS)
    return needed / taken


# ---------------------------------------------------------------------------------------------------------------
# Output


def figure(value: float) -> str:
    """A number with three digits, or all digits of an integer."""
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def rounded(name: str, values: Sequence[float]) -> list[str]:
    """FLOP in units of 10^9, bytes of 10^6."""
    if name.startswith("FLOP"):
        return [f"{value / 1e9:,.0f} G" for value in values]
    return [f"{value / 1e6:,.0f} MB" if value else "0" for value in values]


def show_launches(*, choices_too: bool) -> None:
    """Prints the launches, with a column for what is off by default if that is asked for."""
    columns = [launches(), launches(fused=True)] if choices_too else [launches()]
    print(
        f"launches of one call at batch 1: {', '.join(['as it is', 'with fused linear layers'][: len(columns)])}"
    )
    for name in columns[0]:
        print(f"| {name} | {' | '.join(figure(round(column[name], 1)) for column in columns)} |")


def main(argv: list[str] | None = None) -> None:
    tree = parser().parse_args(argv).tree
    if tree is not None:  # in a process of its own, because this one has imported titok
        folder = tree.resolve()
        code = f"import runpy; runpy.run_path({__file__!r})['show_launches'](choices_too=False)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")])}
        sys.exit(subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=False).returncode)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    show_launches(choices_too=True)
    print("\none image of the pixel decoder: PyTorch's own layers, titok's")
    for name, values in pixel_decoder().items():
        print(f"| {name} | {' | '.join(rounded(name, values))} |")
    print("\nwhat is off until it is measured, and what is left out")
    for name, value in choices().items():
        print(f"| {name} | {figure(value)} |")


if __name__ == "__main__":
    main()
