"""Every recipe on a model that trains in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, TiTok, TokenizerConfig, ViTConfig, VQGANConfig
from titok import training as t
from titok.training.decoder import DecoderObjective, join_stages
from titok.training.folder import RunFolder
from titok.training.generator import GeneratorObjective
from titok.training.proxy import ProxyObjective
from titok.training.reconstruction import make_adversary
from titok.training.run import Run
from titok.training.tokenizer import TokenizerObjective
from titok.training.vqgan import VQGANObjective

KINDS = ("vqgan", "proxy", "decoder", "tokenizer", "vae", "vit", "uvit")
VIT = ViTConfig(width=16, layers=2, heads=2, patch_size=8)
VQGAN = VQGANConfig(
    hidden_channels=32, channel_multipliers=(1, 1), blocks_per_level=1, codebook_size=16, code_dim=8
)
FIRST = TokenizerConfig(
    image_size=(16, 16), encoder=VIT, decoder=VIT, num_latent_tokens=4, code_dim=4, codebook_size=16,
    l2_normalize=True, head="proxy", proxy=VQGAN,
)  # fmt: skip
WHOLE = dataclasses.replace(FIRST, pixel_decoder=True)
SINGLE = dataclasses.replace(FIRST, head="pixels", proxy=None, signed_pixels=True)
VAE = dataclasses.replace(SINGLE, bottleneck="vae", l2_normalize=False)
GENERATOR = GeneratorConfig(4, 16, num_classes=3, width=16, layers=2, heads=2, mlp_width=32)

SHARED: dict[str, Any] = {
    "steps": 12, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "checkpoint_every": 5, "log_every": 4,
    "ema_decay": 0.9,
}  # fmt: skip
ADVERSARIAL: dict[str, Any] = {
    "perceptual_weight": 0.1, "adversarial_weight": 0.1, "adversarial_start": 4, "discriminator_warmup_steps": 1,
    "discriminator_width": 32, "discriminator_stages": 1, "discriminator_grid": 2,
}  # fmt: skip


RECIPES: dict[str, Any] = {
    "vqgan": t.VQGANTraining, "proxy": t.ProxyTraining, "decoder": t.DecoderTraining,
    "tokenizer": t.TokenizerTraining, "vae": t.TokenizerTraining, "vit": t.GeneratorTraining,
    "uvit": t.GeneratorTraining,
}  # fmt: skip


def pictures(count: int = 12) -> Tensor:
    """Smooth colour images (count, 3, 16, 16)."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(16, 16), mode="bilinear")


def perceptual(images: Tensor, target: Tensor) -> Tensor:
    """A distance without weights: that of the images at a quarter of their size."""
    return F.mse_loss(F.avg_pool2d(images, 4), F.avg_pool2d(target, 4))


def seeded(model: type, config: Any) -> Any:
    """A model with random weights that are always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return model(config).eval()


def config_of(kind: str, **changes: Any) -> t.TrainingConfig:
    """The settings of a recipe. Changes of settings that it does not have are left out."""
    known = {field.name for field in dataclasses.fields(RECIPES[kind])}
    changes = {name: value for name, value in changes.items() if name in known}
    if kind in ("vit", "uvit"):
        model = dataclasses.replace(GENERATOR, architecture=kind)
        return t.GeneratorTraining(model=model, **{**SHARED, **changes})
    if kind in ("proxy", "tokenizer"):
        changes = {"start_as_patches": "position_std" not in changes, "quantize_from": 2, **changes}
    if kind == "proxy":
        return t.ProxyTraining(model=FIRST, **{**SHARED, **changes})
    model = {"vqgan": VQGAN, "decoder": WHOLE, "tokenizer": SINGLE, "vae": VAE}[kind]
    if kind == "vqgan":
        changes = {"image_size": 16, **changes}
    config: t.TrainingConfig = RECIPES[kind](model=model, **{**SHARED, **ADVERSARIAL, **changes})
    return config


def sequences() -> tuple[Tensor, Tensor]:
    """Tokens (20, 4) and classes (20,)."""
    return torch.randint(0, 16, (20, 4), generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def train(kind: str, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> torch.nn.Module:
    """Trains by a recipe."""
    config: Any = config_of(kind, **(changes or {}))
    images = pictures()
    options = {"progress": False, **options}
    if kind in ("vit", "uvit"):
        return t.train_generator(*sequences(), config, out, **options)
    if kind == "proxy":
        return t.train_proxy(images, seeded(MaskGITVQGAN, VQGAN), config, out, **options)
    options["perceptual"] = perceptual
    if kind == "vqgan":
        return t.train_vqgan(images, config, out, **options)
    if kind == "decoder":
        proxy, first = seeded(MaskGITVQGAN, VQGAN), seeded(TiTok, FIRST)
        return t.train_decoder(images, first, proxy, config, out, **options)
    return t.train_tokenizer(images, config, out, **options)


def train_in_float64(kind: str, out: Path, changes: dict[str, Any]) -> Run[Any]:
    """Trains by a recipe with weights, images and arithmetic in float64, which the functions of `train` do not do."""
    config: Any = config_of(kind, **changes)
    samples, adversary = pictures().double(), None
    if kind in ("vit", "uvit"):
        samples = torch.arange(20)
        model: Any = seeded(MaskGIT, config.model).double()
        objective: Any = GeneratorObjective(model, config, *sequences())
    elif kind == "proxy":
        proxy = seeded(MaskGITVQGAN, VQGAN).double()
        objective = ProxyObjective(seeded(TiTok, FIRST).double(), proxy, config)
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            adversary = make_adversary(config, 3, "cpu")
        if adversary is not None:
            adversary.double()  # which replaces the buffers
            adversary.state = {"real": adversary.averages.real, "fake": adversary.averages.fake}
        if kind == "vqgan":
            make, model = VQGANObjective, seeded(MaskGITVQGAN, VQGAN)
        elif kind == "decoder":
            first, proxy = seeded(TiTok, FIRST), seeded(MaskGITVQGAN, VQGAN)
            make, model = DecoderObjective, join_stages(first, proxy, WHOLE)
        else:
            make, model = TokenizerObjective, seeded(TiTok, config.model)
        objective = make(model.double(), config, perceptual=perceptual, adversary=adversary)
    with RunFolder(out, resume=False) as folder:
        run: Run[Any] = Run(objective, config, folder, data={}, adversary=adversary)
        run.train((samples[indices] for indices in run.batches(len(samples))), name="", progress=False)
    return run
