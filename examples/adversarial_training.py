"""Adversarial training against squared error alone: stage 2 of `titok quickstart --colour`, continued with both.

    python examples/adversarial_training.py runs/colour -o runs/adversarial
    python examples/adversarial_training.py runs/colour -o runs/adversarial --weights 0 0.01 --steps 600 --seeds 0 1 2
    python examples/adversarial_training.py runs/colour -o runs/adversarial --weights 0 0.01 --perceptual 0.1

Every run starts from the same tokenizer and takes the same number of steps. Runs of one seed see the same pictures in
the same order. One of weight 0 has no discriminator. The table compares held-out emoji with their reconstructions: the
PSNR in dB, and the Frechet distance between features of EfficientNet-Lite0. With `--perceptual` the runs minimise a
distance between feature maps of that same network as well. Their Frechet distances are then not independent of the
training.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from titok import MaskGITVQGAN, TiTok
from titok.data.emoji import Emoji, load_emoji
from titok.data.images import grid, to_uint8, write_image
from titok.evaluation.features import EfficientNetLite0Features
from titok.quickstart.colour import SIZE, decoder_training, feature_distance
from titok.quickstart.metrics import psnr
from titok.training import DecoderTraining, train_decoder

SHOWN = 12  # held-out emoji in a row of the picture


def settings(start: TiTok, options: argparse.Namespace, weight: float, seed: int) -> DecoderTraining:
    """The settings of a run with this weight of the adversarial term."""
    return dataclasses.replace(
        decoder_training(options.steps, seed),
        model=start.config,
        learning_rate=options.learning_rate,
        betas=tuple(options.betas),
        final_learning_rate=options.learning_rate / 10,
        warmup_steps=min(20, options.steps - 1),
        batch_size=options.batch,
        perceptual_weight=options.perceptual,
        adversarial_weight=weight,
        adversarial_start=0,
        discriminator_warmup_steps=10,
        discriminator_width=options.width,
        discriminator_stages=options.stages,
        discriminator_grid=options.grid,
        picture_every=0,
    )


def feature_map_distance(extractor: EfficientNetLite0Features) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean squared difference between EfficientNet-Lite0's feature maps of images (B, 3, H, W) in [0, 1]."""

    def features(images: Tensor) -> Tensor:
        images = F.interpolate(images, scale_factor=2.0, mode="bilinear")
        maps: Tensor = extractor.network.extract_features((255 * images - 127) / 128)
        return maps

    def distance(images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            expected = features(target)
        return F.mse_loss(features(images), expected)

    return distance


@torch.no_grad()
def reconstruct(tokenizer: TiTok, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [0, 1] from their tokens, in [0, 1]."""
    return torch.cat([tokenizer.decode(tokenizer.encode(batch)).clamp(0, 1) for batch in images.split(64)])


def main(arguments: list[str] | None = None, emoji: Emoji | None = None) -> list[dict[str, object]]:
    """Reads the command line, trains, and returns the lines of the table. `emoji` replaces OpenMoji in a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of `titok quickstart --colour`")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for models, figures and a picture"
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.01, 0.003], help="(%(default)s)")
    parser.add_argument("--perceptual", type=float, default=0.0, help="weight of the feature maps (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of both networks (%(default)s)")
    parser.add_argument(
        "--betas", type=float, nargs=2, default=[0.5, 0.9], help="of both optimizers (%(default)s)"
    )
    parser.add_argument("--width", type=int, default=32, help="channels of the discriminator (%(default)s)")
    parser.add_argument("--stages", type=int, default=2, help="of the discriminator (%(default)s)")
    parser.add_argument("--grid", type=int, default=8, help="side of its logits (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs (%(default)s)")
    options = parser.parse_args(arguments)

    emoji = emoji or load_emoji(SIZE)
    vqgan = MaskGITVQGAN.from_pretrained(options.run / "vqgan")
    start = TiTok.from_pretrained(options.run / "tokenizer")
    extractor = EfficientNetLite0Features()
    held_out = emoji.test_images
    rows, lines = [held_out[:SHOWN]], []

    def add(name: str, model: TiTok, entry: dict[str, object]) -> None:
        decoded = reconstruct(model, held_out)
        rows.append(decoded[:SHOWN])
        line = {
            "run": name,
            "psnr": round(float(psnr(held_out, decoded).mean()), 2),
            "distance": round(feature_distance(extractor, held_out, decoded), 1),
            **entry,
        }
        print("{run:40} {psnr:6.2f} dB   distance {distance:6.1f}".format(**line), flush=True)
        lines.append(line)

    add("start", start, {})
    perceptual = feature_map_distance(extractor) if options.perceptual else None
    for seed, weight in itertools.product(options.seeds, options.weights):
        name = f"adversarial {weight:g}, seed {seed}"
        name += f", perceptual {options.perceptual:g}" if perceptual else ""
        config = settings(start, options, weight, seed)
        folder = options.output / name.replace(", ", " ").replace(" ", "-")
        model = train_decoder(emoji.train_images, start, vqgan, config, folder, perceptual=perceptual, resume=True)
        add(name, model, {"settings": config.to_dict()})
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "figures.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    write_image(options.output / "reconstructions.png", grid(to_uint8(torch.cat(rows)), columns=SHOWN))
    return lines


if __name__ == "__main__":
    main()
