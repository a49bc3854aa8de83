"""The fast path: results of the plain one, prepared weights that follow the parameters, memory that is kept.

This file is longer than 400 lines because all its tests share models that are slow to make.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.as_published import AsPublished
from titok import (
    GeneratorConfig,
    MaskGIT,
    Pipeline,
    TiTok,
    TokenizerConfig,
    ViTConfig,
    VQGANConfig,
    engine,
    sample_tokens,
)
from titok.generation.captured import PictureDecoder, decode_captured
from titok.generation.request import GenerationRequest
from titok.inference.cuda_graphs import GraphCache
from titok.models import vqgan
from titok.models.layers import Linear
from titok.ops import last_backends

VIT = ViTConfig(384, 2, 6, 16)  # wide enough for packed weights


def tokenizer(shortcut_of_result: bool = True, seed: int = 0) -> TiTok:
    torch.manual_seed(seed)
    proxy = VQGANConfig(
        hidden_channels=64,
        channel_multipliers=(1, 2, 4),
        blocks_per_level=2,
        codebook_size=48,
        code_dim=32,
        shortcut_of_result=shortcut_of_result,
    )
    config = TokenizerConfig(
        image_size=(64, 96),
        encoder=VIT,
        decoder=VIT,
        num_latent_tokens=8,
        code_dim=12,
        codebook_size=64,
        head="proxy",
        proxy=proxy,
        pixel_decoder=True,
    )
    model = TiTok(config).eval()
    with torch.no_grad():
        model.pixel_codebook.normal_()
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))  # fresh norms and biases are 0 or 1 and would hide mistakes
    return model


def generator() -> MaskGIT:
    torch.manual_seed(1)
    model = MaskGIT(GeneratorConfig(8, 64, num_classes=10, width=384, layers=2, heads=6, mlp_width=1536)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


TOKENS = torch.arange(24).view(3, 8) * 37 % 64


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


# ---------------------------------------------------------------------------------------------------------------
# Same results


@pytest.mark.slow
@pytest.mark.parametrize("shortcut_of_result", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_pictures_are_those_of_the_plain_path(
    dtype: torch.dtype, tolerance: float, shortcut_of_result: bool
) -> None:
    model = tokenizer(shortcut_of_result).to(dtype)
    with torch.no_grad():
        fast = model.decode(TOKENS)
        with engine.plain():
            plain = model.decode(TOKENS)
    differentiable = model.decode(TOKENS)
    assert differentiable.requires_grad
    prepared = model.prepare().decode(TOKENS)
    with engine.plain():
        assert relative(model.decode(TOKENS), plain.double()) < 1e-12
    for got in (fast, differentiable.detach(), prepared):
        assert relative(got, plain.double()) < tolerance


@pytest.mark.slow
def test_tokens_are_those_of_the_plain_path() -> None:
    model, coder = generator(), tokenizer()
    labels, images = [1, 3, 3, 9], torch.rand(2, 3, 64, 96)
    with torch.no_grad(), engine.plain():
        tokens, coded = sample_tokens(model, labels, seed=4), coder.encode(images)
    for prepare in (False, True):
        if prepare:
            model.prepare(), coder.prepare()
        assert torch.equal(sample_tokens(model, labels, seed=4), tokens)
        assert torch.equal(coder.encode(images), coded)
    assert len(tokens.unique()) > 5


@pytest.mark.slow
def test_bfloat16_is_no_less_exact_than_as_published() -> None:
    model, tokens = tokenizer().bfloat16(), TOKENS
    exact = copy.deepcopy(model).double()
    published = AsPublished(copy.deepcopy(model), generator().bfloat16())
    model.prepare()
    with torch.no_grad():
        logits = exact.decode_logits(tokens)
        error = relative(model.decode_logits(tokens), logits)
        assert error < 1.05 * relative(published.logits(tokens), logits)
        pixels = exact.decode_pixels(logits.movedim(1, -1))
        ours = relative(model.decode_pixels(logits.movedim(1, -1).bfloat16()), pixels)
        assert ours < 1.05 * relative(published.pixels(logits.bfloat16()), pixels)
    assert 1e-4 < error < 0.05  # the model did compute in bfloat16


@pytest.mark.slow
def test_the_decoder_takes_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer().double()
    sizes = []
    decode = model.pixel_decoder._decode

    def counted(codes: Tensor, workspace: Any) -> Tensor:
        sizes.append(len(codes))
        return decode(codes, workspace)

    monkeypatch.setattr(model.pixel_decoder, "_decode", counted)
    with torch.no_grad():
        at_once = model.decode(TOKENS)
        monkeypatch.setattr(vqgan, "_MAX_MAP_BYTES_CPU", 2 * 64 * 96 * 64 * 8)
        assert torch.allclose(model.decode(TOKENS), at_once, rtol=1e-12)
        assert model.decode(TOKENS[:0]).shape == (0, 3, 64, 96)
    assert sizes == [3, 2, 1, 0]


@pytest.mark.slow
def test_one_graph_ends_in_pictures() -> None:
    """Without a GPU the buffers are tested uncaptured."""
    pipe = Pipeline(tokenizer(), generator())
    labels = torch.tensor([2, 2, 5])
    with torch.no_grad():
        config = pipe.generator.config
        request = GenerationRequest.checked(config, labels, seed=3, first_sample=7, sampling=None)
        pictures = PictureDecoder(pipe.tokenizer, "nearest")
        got = decode_captured(pipe.generator, request, GraphCache(), pictures, capture=False)
    want = pipe(labels, seed=3, first_sample=7)
    assert got.shape == want.shape == (3, 64, 96, 3)
    assert (got.int() - want.int()).abs().max() <= 1  # another batch size may round differently


# ---------------------------------------------------------------------------------------------------------------
# Which implementation runs


@pytest.mark.slow
def test_the_plain_engine_runs_plain_pytorch() -> None:
    pipe = Pipeline(tokenizer(), generator(), engine="plain")
    pipe([1])
    used = ("group_norm_silu", "add_layer_norm", "masked_attention", "maskgit_decode_step", "code_mixture")
    assert {name: last_backends()[name] for name in used} == dict.fromkeys(used, "plain")


@pytest.mark.slow
def test_stats() -> None:
    pipe = Pipeline(tokenizer(), generator())
    assert pipe.stats()["seconds"] == {}
    pipe([1, 2])
    stats = pipe.stats()
    assert list(stats["seconds"]) == ["generator", "decoder", "pixel decoder", "to 8 bits"]
    assert all(0 < seconds < 60 for seconds in stats["seconds"].values())
    assert stats["backends"]["group_norm_silu"] in ("cpp", "plain")


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="engine: expected 'fast' or 'plain', got 'turbo'"):
        Pipeline(tokenizer(), generator(), engine="turbo")  # type: ignore[arg-type]


def test_gelu_behind_a_linear_layer() -> None:
    torch.manual_seed(0)
    for layer in (Linear(384, 512), Linear(8, 16), Linear(384, 512).bfloat16()):
        x = torch.randn(2, 7, layer.in_features, dtype=layer.weight.dtype)
        exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
        with torch.no_grad():
            assert relative(layer(x, gelu=True), exact) < (3e-3 if x.dtype == torch.bfloat16 else 1e-6)
        assert torch.equal(layer(x, gelu=True), F.gelu(layer(x)))  # with gradients
