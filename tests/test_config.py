"""Configurations: errors name the field, JSON restores equal configurations, presets have the published sizes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from golden import manifest
from titok import (
    GeneratorConfig,
    MaskGIT,
    MaskGITVQGAN,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    ViTConfig,
    VQGANConfig,
)
from titok.config import GENERATOR_PRESETS, TOKENIZER_PRESETS

VIT = ViTConfig(64, 2, 4, 16)
TOKENIZER: dict[str, Any] = {
    "image_size": (64, 96), "encoder": VIT, "decoder": VIT, "num_latent_tokens": 8, "code_dim": 4,
}  # fmt: skip
PROXY = {"head": "proxy", "proxy": VQGANConfig()}
GENERATOR: dict[str, Any] = {"num_latent_tokens": 8, "codebook_size": 16}
NAN, INF = float("nan"), float("inf")

BAD: list[tuple[Any, dict[str, Any], str, dict[str, Any]]] = [
    *[
        (ViTConfig, dataclasses.asdict(VIT), name, {name: value})
        for name in ("width", "layers", "heads", "patch_size", "mlp_ratio")
        for value in (0, -1, 1.5, "4", True, None)
    ],
    (ViTConfig, dataclasses.asdict(VIT), "heads", {"heads": 5}),
    *[
        (VQGANConfig, {}, name, {name: value})
        for name in ("channels", "hidden_channels", "blocks_per_level", "codebook_size", "code_dim")
        for value in (0, 2.0, False)
    ],
    (VQGANConfig, {}, "hidden_channels", {"hidden_channels": 100}),
    *[(VQGANConfig, {}, "channel_multipliers", {"channel_multipliers": v}) for v in ((), (1, 0), (1, 2.5), 3, "12")],
    *[
        (TokenizerConfig, TOKENIZER, name, {name: value})
        for name in ("num_latent_tokens", "code_dim", "codebook_size", "channels")
        for value in (0, -8, 8.0, "8", True)
    ],
    *[
        (TokenizerConfig, TOKENIZER, "image_size", {"image_size": value})
        for value in ((64, 90), (0, 64), (64,), (64, 64, 3), (64.0, 96), -64, (-64, 64), "64", None, 64.0, True)
    ],
    *[(TokenizerConfig, TOKENIZER, name, {name: v}) for name in ("encoder", "decoder") for v in (None, 64, "small")],
    *[(TokenizerConfig, TOKENIZER, "proxy", {"proxy": v, "head": "proxy"}) for v in (None, "vqgan")],
    (TokenizerConfig, TOKENIZER, "bottleneck", {"bottleneck": "fsq"}),
    (TokenizerConfig, TOKENIZER, "head", {"head": "image"}),
    (TokenizerConfig, TOKENIZER, "head", {"bottleneck": "vae", **PROXY}),
    (TokenizerConfig, TOKENIZER, "pixel_decoder", {"pixel_decoder": True}),
    (TokenizerConfig, TOKENIZER, "channels", {"channels": 1, **PROXY}),
    (TokenizerConfig, TOKENIZER, "decoder", {"decoder": ViTConfig(64, 2, 4, 8), **PROXY}),
    *[(TokenizerConfig, TOKENIZER, "commitment_cost", {"commitment_cost": v}) for v in (-0.1, NAN, INF, "1", None)],
    *[
        (TokenizerConfig, TOKENIZER, name, {name: "yes"})
        for name in ("l2_normalize", "pixel_decoder", "signed_pixels", "reread_latents")
    ],
    *[(SamplingConfig, {}, "steps", {"steps": v}) for v in (0, -1, 2.0, "8", True)],
    *[
        (SamplingConfig, {}, name, {name: value})
        for name in ("guidance_scale", "guidance_power", "temperature")
        for value in (-0.1, NAN, INF, "1", None)
    ],
    *[
        (SamplingConfig, {}, name, {name: value})
        for name in ("guidance_schedule", "mask_schedule", "confidence")
        for value in ("", "Linear", None)
    ],
    (SamplingConfig, {}, "softmax_annealing", {"softmax_annealing": 1}),
    *[
        (GeneratorConfig, GENERATOR, name, {name: value})
        for name in ("num_latent_tokens", "codebook_size", "num_classes", "width", "layers", "heads", "mlp_width")
        for value in (0, 4.0, True)
    ],
    (GeneratorConfig, GENERATOR, "heads", {"heads": 7}),
    (GeneratorConfig, GENERATOR, "architecture", {"architecture": "gpt"}),
    (GeneratorConfig, GENERATOR, "layers", {"architecture": "uvit", "layers": 3}),
    *[(GeneratorConfig, GENERATOR, "dropout", {"dropout": v}) for v in (-0.1, 1.1, NAN, "0", None)],
    (GeneratorConfig, GENERATOR, "sampling", {"sampling": None}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "base", "field", "change"), BAD, ids=[f"{kind.__name__}-{change}" for kind, _, _, change in BAD]
)
def test_bad_values_name_the_field(kind: Any, base: dict[str, Any], field: str, change: dict[str, Any]) -> None:
    kind(**base)
    with pytest.raises((ValueError, TypeError), match=rf"^{kind.__name__}\.{field}: expected ") as caught:
        kind(**{**base, **change})
    message = str(caught.value)
    assert "\n" not in message
    assert "got " in message


def test_numbers_of_numpy_become_plain_numbers() -> None:
    """A configuration is hashed, compared and written as JSON, which knows the numbers of Python alone."""
    vit = ViTConfig(*map(np.int64, (64, 2, 4, 16)))
    size = (np.int32(64), np.uint8(96))
    tokenizer = TokenizerConfig(
        **{**TOKENIZER, "encoder": vit, "image_size": size, "commitment_cost": np.float32(0.5)}
    )
    assert tokenizer == TokenizerConfig(**{**TOKENIZER, "commitment_cost": 0.5})
    sampling = SamplingConfig(steps=np.int64(4), temperature=np.float32(2.5), guidance_scale=np.int64(3))
    assert sampling == SamplingConfig(steps=4, temperature=2.5, guidance_scale=3)
    vqgan = VQGANConfig(channel_multipliers=(np.int64(1), np.int64(2)))
    for config in (tokenizer, sampling, vqgan):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for true in (True, np.True_):
        for change in ({"temperature": true}, {"steps": true}):
            with pytest.raises(ValueError, match=r"SamplingConfig\.\w+: expected"):
                SamplingConfig(**change)
    with pytest.raises(ValueError, match="channel_multipliers"):
        VQGANConfig(channel_multipliers=(True, 2))


def test_bad_values_inside_say_where() -> None:
    with pytest.raises(ValueError, match=r"ViTConfig\.layers: expected an int >= 1, got 0"):
        TokenizerConfig.from_dict(
            {**TOKENIZER, "encoder": {"width": 64, "layers": 0, "heads": 4, "patch_size": 16}}
        )
    with pytest.raises(ValueError, match=r"SamplingConfig: unknown keys \['step'\]"):
        GeneratorConfig.from_dict({**GENERATOR, "sampling": {"step": 3}})


CONFIGS = {f"tokenizer {name}": config for name, config in TOKENIZER_PRESETS.items()} | {
    f"generator {name}": config for name, config in GENERATOR_PRESETS.items()
}


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name: str) -> None:
    config: Any = CONFIGS[name]
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    restored = kind.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert hash(restored) == hash(config), "lists of JSON must become tuples"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_latent_tokens = 1


@pytest.mark.parametrize("kind", [ViTConfig, VQGANConfig, TokenizerConfig, SamplingConfig, GeneratorConfig])
def test_unknown_and_missing_keys(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: unknown keys \['colour', 'shape'\]; known are \["):
        kind.from_dict({"shape": 1, "colour": 2})
    with pytest.raises(TypeError, match=f"{kind.__name__}: expected a dict, got list"):
        kind.from_dict([])
    if kind in (ViTConfig, TokenizerConfig, GeneratorConfig):
        required = [
            f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING
        ]
        with pytest.raises(ValueError, match=rf"{kind.__name__}: missing keys \['{required[0]}'"):
            kind.from_dict({})


def test_unknown_presets() -> None:
    with pytest.raises(
        ValueError, match=r"name: expected a tokenizer preset out of \['titok-b-128-512', .*got 'l32'"
    ):
        TokenizerConfig.preset("l32")
    with pytest.raises(ValueError, match=r"generator preset out of .*got 'titok-bl-64-vq8k'"):
        GeneratorConfig.preset("titok-bl-64-vq8k")
    with pytest.raises(ValueError, match=r"size: expected one of \['base', 'large', 'small'\], got 'huge'"):
        ViTConfig.named("huge", 16)


def test_an_int_is_a_square() -> None:
    assert TokenizerConfig(**{**TOKENIZER, "image_size": 64}).image_size == (64, 64)
    assert TokenizerConfig(**TOKENIZER).grid("encoder") == (4, 6)


# ---------------------------------------------------------------------------------------------------------------
# Published sizes

PUBLISHED = {
    "titok-l-32": "titok_l32", "titok-b-64": "titok_b64", "titok-s-128": "titok_s128",
    "titok-bl-64-vq8k": "titok_bl64_vq8k", "titok-bl-128-vq8k": "titok_bl128_vq8k",
    "titok-sl-256-vq8k": "titok_sl256_vq8k", "titok-ll-32-vae-c16": "titok_ll32_vae_c16",
    "titok-bl-64-vae-c16": "titok_bl64_vae_c16", "titok-bl-128-vae-c16": "titok_bl128_vae_c16",
}  # fmt: skip


def sizes(model: torch.nn.Module) -> tuple[int, int]:
    """How many tensors and how many numbers a checkpoint holds."""
    state = model.state_dict()
    return len(state), sum(t.numel() for t in state.values())


def test_every_published_tokenizer_has_a_preset() -> None:
    unpublished = {"titok-l-64-512", "titok-b-128-512"}
    assert set(PUBLISHED) | unpublished == set(TOKENIZER_PRESETS)
    assert set(PUBLISHED.values()) | {"maskgit_vqgan"} == set(manifest("summary"))
    with_generator = {name for name, key in PUBLISHED.items() if "generator" in manifest("summary")[key]}
    assert with_generator | unpublished == set(GENERATOR_PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokenizers_are_as_large_as_published(name: str) -> None:
    want = manifest("summary")[PUBLISHED[name]]["tokenizer"]
    with torch.device("meta"):
        model = TiTok(TokenizerConfig.preset(name))
    assert sizes(model) == (want["tensors"], want["parameters"])


@pytest.mark.parametrize("name", ["titok-l-32", "titok-b-64", "titok-s-128"])
def test_generators_are_as_large_as_published(name: str) -> None:
    want = manifest("summary")[PUBLISHED[name]]["generator"]
    config = GeneratorConfig.preset(name)
    with torch.device("meta"):
        tensors, numbers = sizes(MaskGIT(config))
    if config.architecture == "vit":
        numbers += 2 * config.width  # BERT's two token types: row 0 is added to our positions, row 1 is unused
        tensors += 1
        tensors += 2 * 2 * config.layers  # weights and biases of query, key and value, which we pack
    assert (tensors, numbers) == (want["tensors"], want["parameters"])


def test_vqgan_is_as_large_as_published() -> None:
    want = manifest("summary")["maskgit_vqgan"]["pretrained_tokenizer"]
    with torch.device("meta"):
        assert sizes(MaskGITVQGAN(VQGANConfig())) == (want["tensors"], want["parameters"])
