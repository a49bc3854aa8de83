"""How the training of a tokenizer begins: latent tokens that copy patches, and latents that are not quantised yet."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titok import TiTok, TokenizerConfig, ViTConfig
from titok.training import TokenizerTraining
from titok.training.starting import quantize_latents, start_as_patches

PATCH = 4


def tokenizer(latents: int, *, signed_pixels: bool) -> TiTok:
    """16 patches of 4 x 4 pixels."""
    vit = ViTConfig(width=64, layers=2, heads=2, patch_size=PATCH)
    config = TokenizerConfig(
        image_size=(16, 16), encoder=vit, decoder=vit, num_latent_tokens=latents, code_dim=12, codebook_size=32,
        l2_normalize=True, signed_pixels=signed_pixels,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = TiTok(config)
        start_as_patches(model)
    return model


def patches_of(images: Tensor) -> Tensor:
    """(B, 3, 16, 16) -> (B, 16, 3, 4, 4), a view."""
    return images.unflatten(2, (4, PATCH)).unflatten(4, (4, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("signed_pixels", [False, True])
@pytest.mark.parametrize("latents", [16, 8])
def test_each_latent_token_reads_its_patch_and_gives_it_back(latents: int, signed_pixels: bool) -> None:
    """What changes when one patch, or one latent, is exchanged. With random weights everything changes."""
    model = tokenizer(latents, signed_pixels=signed_pixels)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=random)
    codes = F.normalize(model.encode_latents(images), dim=-1)
    pictures = model.decode_latents(codes)
    for latent in range(latents):
        patch = latent * 16 // latents
        changed = images.clone()
        row, column = divmod(patch, 4)
        part = changed[:, :, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
        part.copy_(torch.rand(part.shape, generator=random))
        moved = (F.normalize(model.encode_latents(changed), dim=-1) - codes).norm(dim=-1).mean(dim=0)
        assert moved.argmax() == latent
        assert moved[latent] > 4 * moved[torch.arange(latents) != latent].max()

        swapped = codes.clone()
        swapped[:, latent] = F.normalize(torch.randn(4, codes.shape[-1], generator=random), dim=-1)
        painted = patches_of(model.decode_latents(swapped) - pictures).flatten(2).norm(dim=-1).mean(dim=0)
        assert painted.argmax() == patch
        if latents == 16:
            assert painted[patch] > 4 * painted[torch.arange(16) != patch].max()


def test_latents_are_quantised_from_a_step_on() -> None:
    model = tokenizer(16, signed_pixels=True)
    assert model.quantizer is not None
    latents = torch.randn(2, 16, 12, requires_grad=True)
    usual = model.quantizer(latents)
    for step in (5, 6, -1):
        vectors, quantized = quantize_latents(model.quantizer, latents, step=step, quantize_from=5)
        assert torch.equal(vectors, usual.quantized)
        assert torch.equal(quantized.loss, usual.loss)
    vectors, quantized = quantize_latents(model.quantizer, latents, step=4, quantize_from=5)
    assert torch.equal(vectors, latents / latents.norm(dim=-1, keepdim=True))
    assert torch.equal(quantized.counts, usual.counts)
    assert quantized.loss == 0
    (vectors.sum() + quantized.loss).backward()
    assert model.quantizer.codebook.grad is not None  # DDP waits for a gradient of every parameter
    assert model.quantizer.codebook.grad.count_nonzero() == 0
    assert latents.grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_as_patches": 1}, "start_as_patches"),
        ({"start_as_patches": True, "position_std": 0.5}, "start_as_patches: expected False where position_std"),
        ({"quantize_from": 100}, r"quantize_from: expected an int in \[0, steps = 100\)"),
        ({"quantize_from": -1}, "quantize_from"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, object], message: str) -> None:
    model = tokenizer(16, signed_pixels=True).config
    with pytest.raises(ValueError, match=message):
        TokenizerTraining(model=model, steps=100, warmup_steps=1, **changes)  # type: ignore[arg-type]


def test_a_vae_has_nothing_to_quantise() -> None:
    model = tokenizer(16, signed_pixels=True).config
    vae = dataclasses.replace(model, bottleneck="vae", l2_normalize=False)
    with pytest.raises(ValueError, match="quantize_from: expected 0 for a VAE"):
        TokenizerTraining(model=vae, quantize_from=5)
