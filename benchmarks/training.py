"""A training step of each recipe against the same step in plain PyTorch, as the official code computes it.

`python -m benchmarks.training` runs all of them; `--rows proxy` runs one. Both sides have the same weights, images and
optimizer (AdamW; titok's is the fused one, the official code takes the default), clip the gradients, and must agree on
the first loss, or the case is not timed. They take turns. Left out are dropout, and the terms of the loss that are the
same code on both sides: the perceptual distance and the discriminator. A last case trains a generator of 256 tokens, as
many as a 2D tokenizer gives, beside that of 32. On a CPU the MaskGIT-VQGAN is trained on images of 128 pixels.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines.published_training import PublishedMaskGIT, PublishedStage, PublishedVQGAN
from benchmarks.harness import tables
from benchmarks.harness.measures import OURS
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.options import DTYPES, add_out, command_parser, matching, start
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig
from titok.models.vqgan import MaskGITVQGAN
from titok.training.config import DecoderTraining, GeneratorTraining, ProxyTraining, TrainingConfig, VQGANTraining
from titok.training.decoder import DecoderObjective, join_stages
from titok.training.generator import GeneratorObjective
from titok.training.masking import random_mask
from titok.training.objective import Objective
from titok.training.order import seed_of
from titok.training.proxy import ProxyObjective
from titok.training.run import Optimized
from titok.training.vqgan import VQGANObjective

PUBLISHED = "as published"
CASES = ("vqgan", "proxy", "decoder", "generator of 32 tokens", "generator of 256 tokens")
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
    p.add_argument("--batch", type=int, default=2, help="images of a step (default: %(default)s)")
    p.add_argument("--sequences", type=int, default=8, help="of tokens, of a generator's step (%(default)s)")
    p.add_argument("--rows", default="", help="parts of the cases' names, comma-separated (default: all)")
    p.add_argument("--seconds", type=float, default=30, help="of each case (default: %(default)s)")
    add_out(p)
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    results = Results(start(arguments))
    rows = [measure(name, arguments, results) for name in matching(CASES, arguments.rows)]
    tables.show(*tables.training_table(rows), f"{arguments.preset}, {arguments.dtype}, {arguments.device}")


def measure(name: str, arguments: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Times one case and writes it to the results."""
    case = build(name, arguments)
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

    runs = {OURS: our_step, PUBLISHED: published_step}
    first = {side: float(run()) for side, run in runs.items()}
    if abs(first[OURS] / first[PUBLISHED] - 1) > TOLERANCE[arguments.dtype]:
        raise SystemExit(f"{name}: the sides do not compute the same first loss: {first}")
    peaks = {side: peak_growth(run, arguments.device) for side, run in runs.items()}
    samples = interleave(runs, arguments.seconds, warm=True)
    about = {"preset": arguments.preset, "dtype": arguments.dtype, "device": arguments.device, "recipe": name}
    return results.row("training", about, samples, count=case.samples, peak_bytes=peaks, first_loss=first[OURS])


def build(name: str, arguments: argparse.Namespace) -> Case:
    """Both sides of a case, with the same random weights."""
    torch.manual_seed(0)
    precision: Any = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}[arguments.dtype]
    common: dict[str, Any] = {"steps": 1_000, "warmup_steps": 0, "precision": precision}
    if name.startswith("generator"):
        return generator(int(name.split()[2]), arguments, common)
    whole = TokenizerConfig.preset(arguments.preset)
    assert whole.proxy is not None
    vqgan = MaskGITVQGAN(whole.proxy).to(arguments.device).train()
    nn.init.normal_(vqgan.codebook)  # codes of the scale of the features, so that none is chosen by rounding
    common["batch_size"] = arguments.batch
    size = (128, 128) if name == "vqgan" and arguments.device == "cpu" else whole.image_size
    images = torch.rand(arguments.batch, 3, *size, device=arguments.device)
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


def generator(length: int, arguments: argparse.Namespace, common: dict[str, Any]) -> Case:
    """The published generator of TiTok-L-32 on sequences of `length` random tokens, without dropout."""
    count, device = arguments.sequences, arguments.device
    model_config = dataclasses.replace(GeneratorConfig.preset("titok-l-32"), num_latent_tokens=length, dropout=0.0)
    model = MaskGIT(model_config).to(device)
    tokens = torch.randint(model_config.codebook_size, (count, length), device=device)
    labels = torch.randint(model_config.num_classes, (count,), device=device)
    config = GeneratorTraining(model=model_config, class_dropout=0.0, batch_size=count, **common)
    objective = GeneratorObjective(model, config, tokens, labels)

    seed = seed_of(config.seed, 0, 1, 0)  # of the micro-batch, so that both sides mask the same tokens

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        uniform = torch.rand(count, length + 2)
        return tokens, labels, random_mask(uniform[:, 1], uniform[:, 2:]).to(device)

    return Case(objective.train(), config, torch.arange(count), PublishedMaskGIT(model).train(), inputs, count)


if __name__ == "__main__":
    main()
