"""Trains a small tokenizer and generator on handwritten digits in a few minutes on a CPU, and writes a report.

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
from titok.checkpoints.writing import remove_abandoned
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig
from titok.data.digits import Digits, load_digits
from titok.generation.pipeline import Pipeline
from titok.models.tokenizer import TiTok
from titok.quickstart.metrics import REQUIREMENTS, measure
from titok.quickstart.report import picture_rows, reconstruction_rows, save_picture, write_report
from titok.training import (
    GeneratorTraining,
    TokenizerTraining,
    tokenize_images,
    train_generator,
    train_tokenizer,
)
from titok.training.folder import RunFolder
from titok.training.metrics import read_metrics

_TRANSFORMER = ViTConfig(width=128, layers=3, heads=4, patch_size=8)
TOKENIZER = TokenizerConfig(
    image_size=(32, 32),
    channels=1,
    encoder=_TRANSFORMER,
    decoder=_TRANSFORMER,
    num_latent_tokens=8,
    code_dim=12,
    codebook_size=256,
    l2_normalize=True,
    signed_pixels=True,
)
# The confidence rule is that of MaskGIT. Guidance makes samples less diverse and easier to read: without it,
# diversity is about 89% and the classifier reads 94% of the samples correctly; with it, 75% and 99%.
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
    """ "bfloat16" if the CPU multiplies it natively, where a step takes 0.7 times the CPU time of float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bfloat16" if native else "float32"


def tokenizer_training(steps: int = 1_200, seed: int = 0) -> TokenizerTraining:
    """Settings of the tokenizer's training run."""
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
    """Settings of the generator's training run, on the tokens of all training digits and of their shifted copies."""
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
    """Trains both models, generates digits, measures, and writes a report.

    Args:
        out_dir: receives the folders `tokenizer` and `generator`, which `from_pretrained` reads, and the files
            `reconstructions.png`, `samples.png`, `metrics.json` and `report.html`.
        seed: of both training runs and of the samples.
        resume: True continues a run that was stopped. False trains models again that are in `out_dir` already.
        progress: True shows progress bars on a terminal, and prints the figures and the names of the files.
        tokenizer_steps, generator_steps: optimizer steps of the two training runs.
        samples_per_class: number of generated digits, for each class, that the figures are computed on.

    Returns:
        the contents of `metrics.json`.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is not installed; the message says what to install.
        ValueError: another run is at work in `out_dir`, or `resume` is True and `out_dir` holds a run with other
            settings.
    """
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}  # by the name of the module
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        needed = " and ".join(missing)
        raise ModuleNotFoundError(f"the quickstart needs {needed}: pip install 'titok-kernels[quickstart]'")
    folder = Path(out_dir)
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    with (
        RunFolder(folder / "tokenizer", resume=True) as tokenizer_folder,
        RunFolder(folder / "generator", resume=True) as generator_folder,
    ):
        remove_abandoned(folder)
        if not resume:
            tokenizer_folder.checkpoint.unlink(missing_ok=True)
            generator_folder.checkpoint.unlink(missing_ok=True)
        digits = load_digits()
        tokenizer = train_tokenizer(
            digits.train_images, tokenizer_training(tokenizer_steps, seed), tokenizer_folder, progress=progress
        )
        shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        tokens = tokenize_images(tokenizer, digits.train_images, shifts=shifts)
        generator = train_generator(
            tokens,
            digits.train_labels,
            generator_training(generator_steps, seed),
            generator_folder,
            progress=progress,
        )
        labels = torch.arange(10).repeat_interleave(samples_per_class)
        samples = Pipeline(tokenizer, generator)(labels, seed=seed).permute(0, 3, 1, 2).float() / 255
        figures = measure(tokenizer, digits, samples, labels)
        metrics = {
            "seed": seed,
            "metrics": figures,
            "bars": {r.key: {"at_least" if r.at_least else "at_most": r.value} for r in REQUIREMENTS},
            "all_bars_reached": all(r.met_by(figures[r.key]) for r in REQUIREMENTS),
            "wall_seconds": round(time.perf_counter() - wall_start, 1),
            "cpu_seconds": round(time.process_time() - cpu_start, 1),
            "steps": {"tokenizer": tokenizer_steps, "generator": generator_steps},
            "samples": len(labels),
        }
        _write_results(folder, digits, tokenizer, samples, metrics)
    if progress:
        _print_results(folder, metrics)
    return metrics


@torch.no_grad()
def _write_results(
    folder: Path, digits: Digits, tokenizer: TiTok, samples: torch.Tensor, metrics: dict[str, Any]
) -> None:
    """Writes metrics, pictures and report. `samples` are sorted by class, as many of each."""
    write_json(folder / "metrics.json", metrics)
    reconstructions = tokenizer.decode(tokenizer.encode(digits.test_images))
    rows = reconstruction_rows(digits.test_images, reconstructions, digits.test_labels)
    save_picture(folder / "reconstructions.png", picture_rows(rows))
    ten_of_each = samples.unflatten(0, (10, -1))[:, :10]
    rows = [(str(digit), images) for digit, images in enumerate(ten_of_each)]
    save_picture(folder / "samples.png", picture_rows(rows, font_size=40))
    histories = {name: read_metrics(folder / name) for name in ("tokenizer", "generator")}
    figures, counts = metrics["metrics"], metrics["steps"]
    texts = {
        "tokens": TOKENIZER.num_latent_tokens,
        "decoding_steps": SAMPLING.steps,
        "summary": (
            f"A TiTok of 1.2 million parameters learned to encode a 32x32 picture as {TOKENIZER.num_latent_tokens} "
            f"tokens out of {TOKENIZER.codebook_size} codes ({counts['tokenizer']:,} steps). A MaskGIT of 0.9 million "
            f"parameters learned to generate such tokens for a class ({counts['generator']:,} steps). Both were "
            f"trained from scratch on {len(digits.train_images):,} real digits, in {metrics['wall_seconds']:.0f} "
            f"seconds ({metrics['cpu_seconds']:.0f} CPU-seconds), with seed {metrics['seed']}."
        ),
        "notes": (
            f"Figures are computed on {len(digits.test_images)} held-out digits and {metrics['samples']:,} generated "
            f"ones. Distances are l2 norms over all pixels: {figures['sample_distance']:.2f} between samples of a "
            f"class, {figures['real_distance']:.2f} between real digits of a class. By the measure in the last row, "
            "5% of the held-out digits count as copies."
        ),
    }
    write_report(folder, figures, histories, texts)


def _print_results(folder: Path, metrics: dict[str, Any]) -> None:
    print()
    for requirement in REQUIREMENTS:
        value = metrics["metrics"][requirement.key]
        sign = "≥" if requirement.at_least else "≤"
        mark = "ok  " if requirement.met_by(value) else "MISS"
        limit = requirement.text(requirement.value)
        print(f"  {mark} {requirement.text(value):>9}  ({sign} {limit})  {requirement.meaning}")
    print(f"\n  {metrics['wall_seconds']:.0f} s, of CPU time {metrics['cpu_seconds']:.0f} s; written:")
    for name in ("report.html", "samples.png", "reconstructions.png", "metrics.json", "tokenizer/", "generator/"):
        print(f"  {folder / name}{'/' if name.endswith('/') else ''}")


def main() -> None:
    """`python -m titok.quickstart`."""
    parser = argparse.ArgumentParser(prog="python -m titok.quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("--out-dir", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    arguments = parser.parse_args()
    run(arguments.out_dir, arguments.seed, resume=arguments.resume)


if __name__ == "__main__":
    main()
