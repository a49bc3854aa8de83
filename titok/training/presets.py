"""Settings of training by name: the published ones of each published model, and "small" ones for a CPU.

The numbers are those of the official repository's training configurations. Where no configuration of TiTok was
published (the single stage), they are those of TA-TiTok, its successor, which are the nearest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from titok.config import (
    GENERATOR_PRESETS,
    TOKENIZER_PRESETS,
    GeneratorConfig,
    SamplingConfig,
    TokenizerConfig,
    ViTConfig,
    VQGANConfig,
)
from titok.training.config import (
    DecoderTraining,
    GeneratorTraining,
    ProxyTraining,
    TokenizerTraining,
    TrainingConfig,
    VQGANTraining,
)

SMALL = "small"  # the name of the settings that train on a CPU

RECIPES: dict[str, type[TrainingConfig]] = {
    "vqgan": VQGANTraining,
    "proxy": ProxyTraining,
    "decoder": DecoderTraining,
    "tokenizer": TokenizerTraining,
    "generator": GeneratorTraining,
}

# Of the published runs. Theirs save and evaluate every 50,000 steps; here a run that is killed loses less.
_RUN: dict[str, Any] = {
    "ema_decay": 0.999, "log_every": 50, "picture_every": 5_000, "checkpoint_every": 5_000, "keep_every": 50_000,
}  # fmt: skip
_SMALL_RUN: dict[str, Any] = {
    "steps": 10_000, "batch_size": 32, "learning_rate": 1e-3, "final_learning_rate": 2e-5, "warmup_steps": 500,
    "picture_every": 500,
}  # fmt: skip

_SMALL_VIT = ViTConfig(width=256, layers=4, heads=4, patch_size=8)
_SMALL_VQGAN = VQGANConfig(
    hidden_channels=32, channel_multipliers=(1, 2, 2), blocks_per_level=1, codebook_size=1024, code_dim=32,
    shortcut_of_result=False,
)  # fmt: skip
_SMALL_TOKENIZER = TokenizerConfig(
    image_size=(64, 64), encoder=_SMALL_VIT, decoder=_SMALL_VIT, num_latent_tokens=32, code_dim=12, codebook_size=1024,
    l2_normalize=True, signed_pixels=True,
)  # fmt: skip
_SMALL_TWO_STAGE = dataclasses.replace(
    _SMALL_TOKENIZER, signed_pixels=False, head="proxy", proxy=_SMALL_VQGAN, pixel_decoder=True
)
_SMALL_GENERATOR = GeneratorConfig(
    num_latent_tokens=32, codebook_size=1024, num_classes=1, width=256, layers=8, heads=4, mlp_width=1024,
    sampling=SamplingConfig(
        guidance_scale=0.0, guidance_schedule="constant", temperature=4.5, softmax_annealing=False, confidence="maskgit"
    ),
)  # fmt: skip
# Without a perceptual distance, whose weights would have to be downloaded.
_SMALL_ADVERSARY: dict[str, Any] = {
    "perceptual": "", "perceptual_weight": 0.0, "adversarial_weight": 0.01, "adversarial_start": 2_000,
    "discriminator_warmup_steps": 200, "discriminator_width": 32, "discriminator_stages": 2, "discriminator_grid": 8,
}  # fmt: skip


def _two_stage() -> list[str]:
    return [name for name, config in TOKENIZER_PRESETS.items() if config.pixel_decoder]


def _single_stage() -> list[str]:
    return [name for name, config in TOKENIZER_PRESETS.items() if config.head == "pixels"]


def _proxy(name: str) -> ProxyTraining:
    model = dataclasses.replace(TokenizerConfig.preset(name), pixel_decoder=False)
    return ProxyTraining(model=model, micro_batch_size=32, precision="float16", random_crop=True, **_RUN)


def _decoder(name: str) -> DecoderTraining:
    return DecoderTraining(
        model=TokenizerConfig.preset(name), micro_batch_size=32, precision="float16", random_crop=True, **_RUN
    )


def _tokenizer(name: str) -> TokenizerTraining:
    # The named distance is a weighted mean; with 1.1 it is LPIPS + 0.1 * ConvNeXt-S.
    return TokenizerTraining(
        model=TokenizerConfig.preset(name), steps=650_000, batch_size=1_024, micro_batch_size=32,
        precision="float16", warmup_steps=10_000, betas=(0.9, 0.999), reconstruction_weight=1.0,
        perceptual="lpips-convnext_s-1.0-0.1", perceptual_weight=1.1, adversarial_weight=0.1,
        adversarial_start=200_000, discriminator_warmup_steps=10_000, restart_every=0, random_flip=True,
        random_crop=True, **_RUN,
    )  # fmt: skip


def _generator(name: str) -> GeneratorTraining:
    return GeneratorTraining(
        model=GeneratorConfig.preset(name), steps=500_000, batch_size=2_048, micro_batch_size=256,
        precision="bfloat16", warmup_steps=10_000, **_RUN,
    )  # fmt: skip


def _vqgan(_: str) -> VQGANTraining:
    return VQGANTraining(model=VQGANConfig(), micro_batch_size=16, precision="bfloat16", random_crop=True, **_RUN)


def _small(recipe: str) -> TrainingConfig:
    if recipe == "vqgan":
        return VQGANTraining(model=_SMALL_VQGAN, image_size=64, ema_decay=0.0, **_SMALL_ADVERSARY, **_SMALL_RUN)
    if recipe == "proxy":
        model = dataclasses.replace(_SMALL_TWO_STAGE, pixel_decoder=False)
        return ProxyTraining(model=model, ema_decay=0.0, restart_every=25, **_SMALL_RUN)
    if recipe == "decoder":
        rates = {**_SMALL_RUN, "learning_rate": 2e-4}
        return DecoderTraining(model=_SMALL_TWO_STAGE, ema_decay=0.0, **_SMALL_ADVERSARY, **rates)
    if recipe == "tokenizer":
        return TokenizerTraining(model=_SMALL_TOKENIZER, **_SMALL_RUN)
    return GeneratorTraining(model=_SMALL_GENERATOR, **{**_SMALL_RUN, "batch_size": 64})


_PUBLISHED: dict[str, tuple[Callable[[str], TrainingConfig], list[str]]] = {
    "vqgan": (_vqgan, ["maskgit-vqgan"]),
    "proxy": (_proxy, _two_stage()),
    "decoder": (_decoder, _two_stage()),
    "tokenizer": (_tokenizer, _single_stage()),
    "generator": (_generator, list(GENERATOR_PRESETS)),
}


def preset_names(recipe: str) -> list[str]:
    """The names that `preset` takes for a recipe."""
    return [SMALL, *_PUBLISHED[recipe][1]]


def preset(recipe: str, name: str) -> TrainingConfig:
    """The settings of a recipe ("vqgan", "proxy", "decoder", "tokenizer", "generator") by name.

    Raises:
        ValueError: there is no such recipe or no such preset of it; the names are listed.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r:.80}")
    if name == SMALL:
        return _small(recipe)
    make, names = _PUBLISHED[recipe]
    if name not in names:
        raise ValueError(f"preset: expected one of {', '.join(preset_names(recipe))}, got {name!r:.80}")
    return make(name)


def with_changes(config: TrainingConfig, changes: Sequence[str]) -> TrainingConfig:
    """Settings with some of them changed, each given as "name=value".

    Args:
        changes: names of settings, with a dot in front of those of a part, such as "model.num_latent_tokens=64". Values
            are JSON; what is no JSON is taken as text.

    Raises:
        ValueError: a change is no "name=value", there is no such setting, or its value is refused.
    """
    values = config.to_dict()
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set: expected name=value, got {change!r:.80}")
        *path, last = name.strip().split(".")
        part: Any = values
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, dict) or last not in part:
            known = sorted(part if isinstance(part, dict) else values)
            raise ValueError(f"--set: there is no setting {name.strip()!r:.80}; here are {', '.join(known)}")
        try:
            part[last] = json.loads(text)
        except (ValueError, RecursionError):
            part[last] = text
    return type(config).from_dict(values)
