"""Whole models under pytest-benchmark: `python -m pytest benchmarks/bench_models.py --benchmark-only`.

The environment variable TITOK_BENCH chooses the sizes: "small" (the default; seconds on a CPU) or "full"
(titok-l-32 and its parts). `benchmarks.regression` divides by the calibration row, so that saved runs of a busy or
of another machine can be compared.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.models import train_step
from benchmarks.harness.sides import build, class_labels
from benchmarks.regression import CALIBRATION
from titok import GeneratorConfig, MaskGIT, SamplingConfig, TiTok, TokenizerConfig, ViTConfig, sample_tokens
from titok.config import VQGANConfig

FULL = os.environ.get("TITOK_BENCH", "small") == "full"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 8 if FULL else 1


def tokenizer(tokens: int) -> TiTok:
    """titok-l-32 with another number of tokens, or a narrow model of the same shape."""
    config = dataclasses.replace(TokenizerConfig.preset("titok-l-32"), num_latent_tokens=tokens)
    if not FULL:
        vit, proxy = ViTConfig(256, 4, 4, 16), VQGANConfig(hidden_channels=32)
        config = dataclasses.replace(config, encoder=vit, decoder=vit, proxy=proxy)
    model: TiTok = build(lambda: TiTok(config), torch.float32, DEVICE)
    return model


def generator(tokens: int) -> MaskGIT:
    """The generator of titok-l-32 with another number of tokens and a single step, or a narrow one."""
    config = GeneratorConfig(tokens, 4096, sampling=SamplingConfig(steps=1, guidance_schedule="constant"))
    if not FULL:
        config = dataclasses.replace(config, width=256, layers=4, heads=4, mlp_width=1024)
    model: MaskGIT = build(lambda: MaskGIT(config), torch.float32, DEVICE)
    return model


def synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, returning only when the GPU has finished."""

    def call() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


@pytest.mark.benchmark(group=CALIBRATION)
def test_calibration(benchmark: Any) -> None:
    """A square matrix product in float32, which the other times are divided by."""
    a, b = torch.randn(2, 1024, 1024, device=DEVICE).unbind()
    benchmark(synchronised(lambda: torch.mm(a, b)))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="tokenize")
def test_tokenize(benchmark: Any, tokens: int) -> None:
    model, images = tokenizer(tokens), torch.rand(BATCH, 3, 256, 256, device=DEVICE)
    benchmark(synchronised(torch.no_grad()(lambda: model.encode(images))))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="decode")
def test_decode(benchmark: Any, tokens: int) -> None:
    model, codes = tokenizer(tokens), torch.randint(4096, (BATCH, tokens), device=DEVICE)
    benchmark(synchronised(torch.no_grad()(lambda: model.decode(codes))))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="generator step (the paper: 4.5x more images/s sampled at 32 than at 256 tokens)")
def test_generator_step(benchmark: Any, tokens: int) -> None:
    model = generator(tokens)
    start = torch.full((BATCH, tokens), model.mask_token, device=DEVICE)
    start[:, 0] = 0
    benchmark(synchronised(lambda: sample_tokens(model, class_labels(BATCH), init_tokens=start)))


@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.benchmark(group="train step (the paper: 12.8x more images/s trained at 32 than at 256 tokens)")
def test_train_step(benchmark: Any, tokens: int) -> None:
    benchmark(synchronised(train_step(generator(tokens), BATCH)))
