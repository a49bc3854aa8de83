"""Whole models under pytest-benchmark: `pytest benchmarks/bench_models.py --benchmark-only --benchmark-save=NAME`.

Sizes follow TITOK_BENCH: "small" (default; seconds on a CPU) or "full" (titok-l-32 and its parts). The calibration row
is what `benchmarks.regression` divides by, so that saved runs of a noisy or another machine can be compared.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks._sides import _labels, build
from titok import GeneratorConfig, MaskGIT, SamplingConfig, TiTok, TokenizerConfig, ViTConfig, sample_tokens
from titok.config import VQGANConfig
from titok.profiling import annotate

FULL = os.environ.get("TITOK_BENCH", "small") == "full"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 8 if FULL else 1
CALIBRATION = "calibration"


def tokenizer_config(tokens: int) -> TokenizerConfig:
    """titok-l-32's with another number of tokens, or a narrow one of the same shape."""
    if FULL:
        return dataclasses.replace(TokenizerConfig.preset("titok-l-32"), num_latent_tokens=tokens)
    vit, proxy = ViTConfig(256, 4, 4, 16), VQGANConfig(hidden_channels=32)
    config = TokenizerConfig.preset("titok-l-32")
    return dataclasses.replace(config, encoder=vit, decoder=vit, num_latent_tokens=tokens, proxy=proxy)


def generator_config(tokens: int) -> GeneratorConfig:
    sampling = SamplingConfig(steps=1, guidance_schedule="constant")
    if FULL:
        return GeneratorConfig(tokens, 4096, sampling=sampling)
    return GeneratorConfig(tokens, 4096, width=256, layers=4, heads=4, mlp_width=1024, sampling=sampling)


def train_step(config: TokenizerConfig, batch: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """Forward, backward and AdamW of a generator over `config`'s tokens."""
    model: MaskGIT = build(lambda: MaskGIT(_generator_for(config)), dtype, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.codebook_size, (batch, config.num_latent_tokens), device=device)
    shown = tokens.clone()
    shown[:, ::2] = model.mask_token
    labels = torch.tensor(_labels(batch), device=device)

    def step() -> None:
        with annotate("forward"):
            logits = model(shown, labels).float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, tokens.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        with annotate("backward"):
            loss.backward()
        with annotate("optimizer"):
            optimizer.step()

    return step


def _generator_for(config: TokenizerConfig) -> GeneratorConfig:
    full = GeneratorConfig(config.num_latent_tokens, config.codebook_size)
    return full if config.encoder.width >= 512 else generator_config(config.num_latent_tokens)


def _synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


@pytest.mark.benchmark(group=CALIBRATION)
def test_calibration(benchmark: Any) -> None:
    """A square matrix product in float32, the yardstick of this run."""
    a, b = torch.randn(2, 1024, 1024, device=DEVICE).unbind()
    benchmark(_synchronised(lambda: torch.mm(a, b)))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="tokenize")
def test_tokenize(benchmark: Any, tokens: int) -> None:
    model: TiTok = build(lambda: TiTok(tokenizer_config(tokens)), torch.float32, DEVICE)
    images = torch.rand(BATCH, 3, 256, 256, device=DEVICE)
    benchmark(_synchronised(torch.no_grad()(lambda: model.encode(images))))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="decode")
def test_decode(benchmark: Any, tokens: int) -> None:
    model: TiTok = build(lambda: TiTok(tokenizer_config(tokens)), torch.float32, DEVICE)
    ids = torch.randint(4096, (BATCH, tokens), device=DEVICE)
    benchmark(_synchronised(torch.no_grad()(lambda: model.decode(ids))))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="generator step (the paper: 4.5x more images/s sampled at 32 than at 256 tokens)")
def test_generator_step(benchmark: Any, tokens: int) -> None:
    model: MaskGIT = build(lambda: MaskGIT(generator_config(tokens)), torch.float32, DEVICE)
    start = torch.full((BATCH, tokens), model.mask_token, device=DEVICE)
    start[:, 0] = 0
    benchmark(_synchronised(lambda: sample_tokens(model, _labels(BATCH), init_tokens=start)))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="train step (the paper: 12.8x more images/s trained at 32 than at 256 tokens)")
def test_train_step(benchmark: Any, tokens: int) -> None:
    benchmark(_synchronised(train_step(tokenizer_config(tokens), BATCH, torch.float32, DEVICE)))
