"""From nothing to generated digits in a few minutes on a CPU: trains a small tokenizer and generator, and reports.

`titok quickstart` and `python -m titok.quickstart` run it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch

from titok.checkpoints.files import write_json
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig
from titok.data.folders import Digits, load_digits
from titok.generation.pipeline import Pipeline
from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.quickstart.metrics import BARS, measure
from titok.quickstart.report import picture_rows, reconstruction_rows, save_picture, write_report
from titok.training import (
    GeneratorTraining,
    TokenizerTraining,
    tokenize_images,
    train_generator,
    train_tokenizer,
)
from titok.training.run import CHECKPOINT, read_about

_SIDE = ViTConfig(width=128, layers=3, heads=4, patch_size=8)
TOKENIZER = TokenizerConfig(
    image_size=(32, 32),
    channels=1,
    encoder=_SIDE,
    decoder=_SIDE,
    num_latent_tokens=8,
    code_dim=12,
    codebook_size=256,
    l2_normalize=True,
    signed_pixels=True,
)
# MaskGIT's own confidence rule. Guidance trades diversity for digits that are read right: without it about 89% and
# 94%, with it 75% and 99%.
SAMPLING = SamplingConfig(
    steps=8,
    guidance_scale=1.0,
    guidance_schedule="constant",
    temperature=4.5,
    softmax_annealing=False,
    confidence="maskgit",
)
GENERATOR = GeneratorConfig(
    num_latent_tokens=8,
    codebook_size=256,
    num_classes=10,
    width=128,
    layers=4,
    heads=4,
    mlp_width=512,
    sampling=SAMPLING,
)


def fastest_precision() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the CPU multiplies it natively: there a step takes about 0.7 of the CPU time of float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bfloat16" if native else "float32"


def tokenizer_training(steps: int = 1_200, seed: int = 0) -> TokenizerTraining:
    """The tokenizer's training run."""
    return TokenizerTraining(
        model=TOKENIZER,
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        final_learning_rate=4e-5,
        warmup_steps=min(50, steps - 1),
        random_shift=1,
        position_std=0.7,
        precision=fastest_precision(),
        seed=seed,
        checkpoint_every=250,
    )


def generator_training(steps: int = 1_000, seed: int = 0) -> GeneratorTraining:
    """The generator's training run, on tokens of every training digit and of its copies shifted by a pixel."""
    return GeneratorTraining(
        model=GENERATOR,
        steps=steps,
        batch_size=64,
        learning_rate=1e-3,
        final_learning_rate=2e-5,
        warmup_steps=min(50, steps - 1),
        precision=fastest_precision(),
        seed=seed,
        checkpoint_every=250,
    )


def run(
    out_dir: str | os.PathLike[str] = "runs/quickstart",
    seed: int = 0,
    *,
    resume: bool = False,
    progress: bool = True,
    tokenizer_steps: int = 1_200,
    generator_steps: int = 1_000,
    samples_per_class: int = 100,
) -> dict[str, Any]:
    """Trains, generates, measures, and writes into `out_dir`: `tokenizer/` and `generator/` (as `save_pretrained`
    leaves them), `reconstructions.png`, `samples.png`, `metrics.json` and `report.html`.

    Args:
        resume: continue a run that was stopped; otherwise models that are there already are trained anew.
        progress: show progress bars, the figures and where the files are.
        samples_per_class: generated digits that the figures are computed on.

    Returns:
        what `metrics.json` holds.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is not installed; says what to install.
    """
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        raise ModuleNotFoundError(f"the quickstart needs {names}: pip install 'titok[quickstart]'")
    folder, started = Path(out_dir), (time.perf_counter(), time.process_time())
    if not resume:
        for name in ("tokenizer", "generator"):
            (folder / name / CHECKPOINT).unlink(missing_ok=True)
    digits = load_digits()
    tokenizer, generator = _train(
        digits,
        tokenizer_training(tokenizer_steps, seed),
        generator_training(generator_steps, seed),
        folder,
        progress=progress,
    )
    labels = torch.arange(10).repeat_interleave(samples_per_class)
    samples = Pipeline(tokenizer, generator)(labels, seed=seed).permute(0, 3, 1, 2).float() / 255
    figures = measure(tokenizer, digits, samples, labels)
    metrics = {
        "seed": seed,
        "metrics": figures,
        "bars": {bar.key: {"at_least" if bar.at_least else "at_most": bar.value} for bar in BARS},
        "all_bars_reached": all(bar.reached(figures[bar.key]) for bar in BARS),
        "wall_seconds": round(time.perf_counter() - started[0], 1),
        "cpu_seconds": round(time.process_time() - started[1], 1),
        "steps": {"tokenizer": tokenizer_steps, "generator": generator_steps},
        "samples": len(labels),
    }
    _write(folder, digits, tokenizer, samples, metrics)
    if progress:
        _print(folder, metrics)
    return metrics


def _train(
    digits: Digits,
    tokenizer_run: TokenizerTraining,
    generator_run: GeneratorTraining,
    folder: Path,
    *,
    progress: bool,
) -> tuple[TiTok, MaskGIT]:
    tokenizer = train_tokenizer(
        digits.train_images, tokenizer_run, folder / "tokenizer", resume=True, progress=progress
    )
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    tokens = tokenize_images(tokenizer, digits.train_images, shifts=shifts)
    generator = train_generator(
        tokens, digits.train_labels, generator_run, folder / "generator", resume=True, progress=progress
    )
    return tokenizer, generator


@torch.no_grad()
def _write(folder: Path, digits: Digits, tokenizer: TiTok, samples: torch.Tensor, metrics: dict[str, Any]) -> None:
    write_json(folder / "metrics.json", metrics)
    reconstructions = tokenizer.decode(tokenizer.encode(digits.test_images))
    rows = reconstruction_rows(digits.test_images, reconstructions, digits.test_labels)
    save_picture(folder / "reconstructions.png", picture_rows(rows))
    shown = samples.unflatten(0, (10, -1))[:, :10]
    save_picture(
        folder / "samples.png", picture_rows([(str(i), row) for i, row in enumerate(shown)], font_size=40)
    )
    histories = {name: read_about(folder / name / CHECKPOINT)["history"] for name in ("tokenizer", "generator")}
    figures, counts = metrics["metrics"], metrics["steps"]
    about = {
        "tokens": TOKENIZER.num_latent_tokens,
        "decoding_steps": SAMPLING.steps,
        "summary": (
            f"A TiTok of 1.2 M parameters learned to write a 32x32 picture as {TOKENIZER.num_latent_tokens} tokens "
            f"out of {TOKENIZER.codebook_size} codes ({counts['tokenizer']:,} steps); a MaskGIT of 0.9 M learned to "
            f"generate such tokens by class ({counts['generator']:,} steps). Both from scratch, on "
            f"{len(digits.train_images):,} real digits, in {metrics['wall_seconds']:.0f} seconds "
            f"({metrics['cpu_seconds']:.0f} CPU-seconds), seed {metrics['seed']}."
        ),
        "notes": (
            f"Held out: {len(digits.test_images)} real digits. Generated: {metrics['samples']:,}. Distances are l2 "
            f"over all pixels: {figures['sample_distance']:.2f} between samples of a class, "
            f"{figures['real_distance']:.2f} between real digits of a class. Of the held-out digits themselves, 5% "
            "count as copies by that measure."
        ),
    }
    write_report(folder, figures, histories, about)


def _print(folder: Path, metrics: dict[str, Any]) -> None:
    print()
    for bar in BARS:
        value = metrics["metrics"][bar.key]
        sign, mark = ("≥" if bar.at_least else "≤"), ("ok  " if bar.reached(value) else "MISS")
        print(f"  {mark} {bar.text(value):>9}  ({sign} {bar.text(bar.value)})  {bar.meaning}")
    print(f"\n  {metrics['wall_seconds']:.0f} s, of CPU time {metrics['cpu_seconds']:.0f} s; written:")
    for name in ("report.html", "samples.png", "reconstructions.png", "metrics.json", "tokenizer/", "generator/"):
        print(f"  {folder / name}{'/' if name.endswith('/') else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m titok.quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("--out-dir", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    arguments = parser.parse_args()
    run(arguments.out_dir, arguments.seed, resume=arguments.resume)


if __name__ == "__main__":
    main()
