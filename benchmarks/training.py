"""A training step of each recipe against the same step in plain PyTorch, as the official code computes it.

`python -m benchmarks.training` runs all of them; `--rows proxy` runs one. Both sides have the same weights, images and
optimizer (AdamW; titok's is the fused one, the official code takes the default), clip the gradients, and must agree on
the first loss, or the case is not timed. They take turns. Left out are dropout, and the terms of the loss that are the
same code on both sides: the perceptual distance and the discriminator. On a CPU the MaskGIT-VQGAN is trained on twice
as many images, of 128 pixels in place of 256.

A second table is the paper's claim: titok's step of a generator of 32 tokens beside that of one of 256, as many as a 2D
tokenizer gives, in turns.

`python -m benchmarks.report` writes the tables of the latest run into docs/performance.md.

Memory is the peak of two steps beyond the memory of the process before them, which holds the weights: gradients, the
optimizer's state and activations. On a GPU it is counted by PyTorch. On a CPU each side takes its steps in a process of
its own, and the peak is that of the resident set (VmHWM, Linux).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines.published_training import (
    PublishedMaskGIT,
    PublishedSingleStage,
    PublishedStage,
    PublishedVQGAN,
)
from benchmarks.harness import tables
from benchmarks.harness.measures import OURS
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.options import DTYPES, add_out, command_parser, matching, start
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig
from titok.models.vqgan import MaskGITVQGAN
from titok.training.config import (
    DecoderTraining,
    GeneratorTraining,
    ProxyTraining,
    TokenizerTraining,
    TrainingConfig,
    VQGANTraining,
)
from titok.training.decoder import DecoderObjective, join_stages
from titok.training.generator import GeneratorObjective
from titok.training.masking import random_mask
from titok.training.objective import Objective
from titok.training.optimized import Optimized
from titok.training.order import seed_of
from titok.training.proxy import ProxyObjective
from titok.training.tokenizer import TokenizerObjective
from titok.training.vqgan import VQGANObjective

PUBLISHED = "as published"
CASES = ("vqgan", "proxy", "decoder", "tokenizer (VQ)", "tokenizer (VAE)", "generator of 32 tokens")
CLAIM = "generator, 32 against 256 tokens"
TOKENS = ("32 tokens", "256 tokens")
# Further apart than this, relative, two first losses are not of the same step.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}
ALONE: dict[str, Any] = {"perceptual": "", "perceptual_weight": 0.0, "adversarial_weight": 0.0}


class Case(NamedTuple):
    """A step on both sides.

    Attributes:
        objective, config: titok's.
        batch: what the objective takes.
        rival: a module whose result is the loss.
        inputs: of the rival, called before each step.
        samples: images or sequences in a step.
    """

    objective: Objective[Any]
    config: TrainingConfig
    batch: Tensor
    rival: nn.Module
    inputs: Callable[[], tuple[Tensor, ...]]
    samples: int


def parser() -> argparse.ArgumentParser:
    p = command_parser("training", __doc__)
    p.set_defaults(dtype="fp32")
    p.add_argument("--preset", default="titok-s-128", help="two-stage tokenizer of stage 1 and 2 (%(default)s)")
    p.add_argument("--vq", default="titok-bl-64-vq8k", help="single-stage tokenizer with codes (%(default)s)")
    p.add_argument("--vae", default="titok-bl-64-vae-c16", help="single-stage tokenizer without (%(default)s)")
    p.add_argument("--generator", default="titok-l-32", help="generator, but for its tokens (%(default)s)")
    p.add_argument("--batch", type=int, default=1, help="images of a step (default: %(default)s)")
    p.add_argument("--sequences", type=int, default=2, help="of tokens, of a generator's step (%(default)s)")
    p.add_argument("--rows", default="", help="parts of the cases' names, comma-separated (default: all)")
    p.add_argument(
        "--seconds", type=float, default=10, help="of each case; at least 3 steps (default: %(default)s)"
    )
    p.add_argument("--limit", type=float, help="seconds, after which no further case is begun")
    p.add_argument("--peak-of", choices=(OURS, PUBLISHED), help=argparse.SUPPRESS)  # in a process of its own
    add_out(p)
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.peak_of:
        steps = steps_of(build(arguments.rows, arguments), arguments)
        step = steps.pop(arguments.peak_of)
        del steps
        gc.collect()  # the other side's weights
        print(peak_growth(lambda: [step(), step()], arguments.device))
        return
    results = Results(start(arguments))
    end = math.inf if arguments.limit is None else time.monotonic() + arguments.limit
    rows = []
    for name in matching((*CASES, CLAIM), arguments.rows):
        if time.monotonic() >= end:
            results.note(f"{name} was left out: {arguments.limit:g} seconds were over")
            continue
        rows.append((measure_claim if name == CLAIM else measure)(name, arguments, results, argv))
    for some in tables.by_sides(rows):
        tables.show(*tables.training_table(some), f"{arguments.dtype}, {arguments.device}")


def measure(
    name: str, arguments: argparse.Namespace, results: Results, argv: Sequence[str] | None
) -> dict[str, Any]:
    """Times one case and writes it to the results."""
    peaks = {side: peak_bytes(name, side, arguments, argv) for side in (OURS, PUBLISHED)}
    case = build(name, arguments)
    runs = steps_of(case, arguments)
    first = {side: float(run()) for side, run in runs.items()}
    if abs(first[OURS] / first[PUBLISHED] - 1) > TOLERANCE[arguments.dtype]:
        raise SystemExit(f"{name}: the sides do not compute the same first loss: {first}")
    samples = interleave(runs, arguments.seconds, warm=True)
    about = {"preset": preset_of(name, arguments), **about_run(arguments), "recipe": name}
    return results.row("training", about, samples, count=case.samples, peak_bytes=peaks, first_loss=first[OURS])


def measure_claim(
    claim: str, arguments: argparse.Namespace, results: Results, argv: Sequence[str] | None
) -> dict[str, Any]:
    """Times titok's steps of generators of 32 and of 256 tokens and writes them to the results."""
    names = {tokens: f"generator of {tokens}" for tokens in TOKENS}
    peaks = {tokens: peak_bytes(name, OURS, arguments, argv) for tokens, name in names.items()}
    runs = {tokens: steps_of(build(name, arguments), arguments)[OURS] for tokens, name in names.items()}
    for run in runs.values():
        run()
    samples = interleave(runs, arguments.seconds, warm=True)
    about = {"preset": arguments.generator, **about_run(arguments), "recipe": claim}
    return results.row("training", about, samples, count=arguments.sequences, peak_bytes=peaks)


def about_run(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": arguments.dtype, "device": arguments.device}


def preset_of(name: str, arguments: argparse.Namespace) -> str:
    """The preset of the model that a case trains."""
    if name.startswith("generator"):
        preset: str = arguments.generator
    elif name.startswith("tokenizer"):
        preset = arguments.vae if "VAE" in name else arguments.vq
    else:
        preset = arguments.preset
    return preset


def peak_bytes(name: str, side: str, arguments: argparse.Namespace, argv: Sequence[str] | None) -> int | None:
    """The peak memory of two steps of one side; None where it is not known."""
    if arguments.device == "cuda":
        step = steps_of(build(name, arguments), arguments)[side]
        return peak_growth(lambda: [step(), step()], arguments.device)
    own = list(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "benchmarks.training", *own, "--rows", name, "--peak-of", side]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]
    return None if printed == "None" else int(printed)


def steps_of(case: Case, arguments: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """A training step of each side, which returns the loss."""
    rival = copy.deepcopy(case.rival)  # which shares weights with titok's model
    dtype = DTYPES[arguments.dtype]
    autocast = torch.autocast(arguments.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    ours = Optimized(case.objective.model, case.objective, case.config, first_step=0, warmup_steps=0)
    trained = [p for p in rival.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.config.learning_rate, betas=case.config.betas)

    def our_step() -> Tensor:
        losses, _ = ours.optimize([(case.batch,)], 1)
        return losses[0].loss

    def published_step() -> Tensor:
        optimizer.zero_grad()
        with autocast:
            loss: Tensor = rival(*case.inputs())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, case.config.clip_norm)
        optimizer.step()
        return loss.detach()

    return {OURS: our_step, PUBLISHED: published_step}


def build(name: str, arguments: argparse.Namespace) -> Case:
    """Both sides of a case, with the same random weights."""
    torch.manual_seed(0)
    precision: Any = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}[arguments.dtype]
    common: dict[str, Any] = {"steps": 1_000, "warmup_steps": 0, "precision": precision}
    if name.startswith("generator"):
        return generator(int(name.split()[2]), arguments, common)
    if name.startswith("tokenizer"):
        return single_stage(preset_of(name, arguments), arguments, common)
    whole = TokenizerConfig.preset(arguments.preset)
    assert whole.proxy is not None
    vqgan = MaskGITVQGAN(whole.proxy).to(arguments.device).train()
    nn.init.normal_(vqgan.codebook)  # codes of the scale of the features, so that none is chosen by rounding
    count, size = arguments.batch, whole.image_size
    if name == "vqgan" and arguments.device == "cpu":
        count, size = 2 * count, (128, 128)
    common["batch_size"] = count
    images = torch.rand(count, 3, *size, device=arguments.device)
    objective: Objective[Any]
    config: TrainingConfig
    if name == "vqgan":
        config = VQGANTraining(
            model=whole.proxy, image_size=size[0], restart_every=0, random_flip=False, **ALONE, **common
        )
        rival: nn.Module = PublishedVQGAN(vqgan)
        objective = VQGANObjective(vqgan, config)
    else:
        proxy_config = dataclasses.replace(whole, pixel_decoder=False)
        first = TiTok(proxy_config).to(arguments.device)
        assert first.quantizer is not None
        nn.init.normal_(first.quantizer.codebook)
        if name == "proxy":
            config = ProxyTraining(model=proxy_config, random_flip=False, **common)
            rival = PublishedStage(first, vqgan, pixels=False)
            objective = ProxyObjective(first, vqgan.eval(), config)
        else:
            config = DecoderTraining(model=whole, random_flip=False, **ALONE, **common)
            model = join_stages(first, vqgan, whole).to(arguments.device)
            rival = PublishedStage(model, vqgan, pixels=True)
            objective = DecoderObjective(model, config)
    return Case(objective.train(), config, images, rival.train(), lambda: (images,), len(images))


def single_stage(preset: str, arguments: argparse.Namespace, common: dict[str, Any]) -> Case:
    """A single-stage tokenizer with a squared error and the loss of its bottleneck."""
    model_config = TokenizerConfig.preset(preset)
    model = TiTok(model_config).to(arguments.device).train()
    if model.quantizer is not None:
        nn.init.normal_(model.quantizer.codebook)
    config = TokenizerTraining(
        model=model_config,
        batch_size=arguments.batch,
        restart_every=0,
        reconstruction_weight=1.0,
        **ALONE,
        **common,
    )
    images = torch.rand(arguments.batch, model_config.channels, *model_config.image_size, device=arguments.device)

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(seed_of_step(config))  # both sides draw the same sample of a VAE
        return (images,)

    rival = PublishedSingleStage(model, config.kl_weight).train()
    return Case(TokenizerObjective(model, config).train(), config, images, rival, inputs, len(images))


def seed_of_step(config: TrainingConfig) -> int:
    """The seed of the only micro-batch of the step that is timed."""
    return seed_of(config.seed, 0, 1, 0)


def generator(length: int, arguments: argparse.Namespace, common: dict[str, Any]) -> Case:
    """A published generator on sequences of `length` random tokens, without dropout."""
    count, device = arguments.sequences, arguments.device
    model_config = dataclasses.replace(
        GeneratorConfig.preset(arguments.generator), num_latent_tokens=length, dropout=0.0
    )
    model = MaskGIT(model_config).to(device)
    tokens = torch.randint(model_config.codebook_size, (count, length), device=device)
    labels = torch.randint(model_config.num_classes, (count,), device=device)
    config = GeneratorTraining(model=model_config, class_dropout=0.0, batch_size=count, **common)
    objective = GeneratorObjective(model, config, tokens, labels)

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(seed_of_step(config))  # both sides mask the same tokens
        uniform = torch.rand(count, length + 2)
        return tokens, labels, random_mask(uniform[:, 1], uniform[:, 2:]).to(device)

    return Case(objective.train(), config, torch.arange(count), PublishedMaskGIT(model).train(), inputs, count)


if __name__ == "__main__":
    main()
