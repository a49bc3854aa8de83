"""The benchmark's plain path is the same model as ours; the harness multiplies, counts and tells as it says."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from benchmarks._plain import Plain
from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig, VQGANConfig
from titok.config import SamplingConfig


def tiny(architecture="vit") -> tuple[TiTok, MaskGIT]:
    vit = ViTConfig(width=32, layers=2, heads=2, patch_size=8)
    proxy = VQGANConfig(hidden_channels=32, channel_multipliers=(1, 2, 2), codebook_size=16, code_dim=8)
    config = TokenizerConfig(
        32,
        vit,
        vit,
        num_latent_tokens=5,
        code_dim=6,
        codebook_size=20,
        head="proxy",
        proxy=proxy,
        pixel_decoder=True,
    )
    generator = GeneratorConfig(
        5, 20, num_classes=3, architecture=architecture, width=32, layers=2, heads=2, mlp_width=48,
        sampling=SamplingConfig(steps=3),
    )  # fmt: skip
    return TiTok(config).eval(), MaskGIT(generator).eval()


@pytest.mark.parametrize("architecture", ["vit", "uvit"])
@pytest.mark.parametrize(
    "switches", [{"sdpa": False}, {"channels_last": True}, {"fused_ops": True}], ids=lambda s: next(iter(s))
)
def test_plain_path_is_the_same_model(architecture, switches):
    tokenizer, generator = (model.double() for model in tiny(architecture))
    plain = Plain(tokenizer, generator, **switches)
    tokens, labels = torch.randint(20, (2, 5)), torch.tensor([1, 3])
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(tokens, labels), generator(tokens, labels))
        logits = plain.proxy_logits(tokens)
        torch.testing.assert_close(logits.permute(0, 3, 1, 2), tokenizer.decode_logits(tokens))
        torch.testing.assert_close(plain.pixels(logits), tokenizer.decode(tokens))


@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_plain_path_does_the_work_as_written(architecture):
    tokenizer, generator = tiny(architecture)
    plain = Plain(tokenizer, generator)
    with FlopCounterMode(display=False) as counter:
        pictures = plain([0, 2])
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == torch.uint8
    t, g = tokenizer.config, generator.config
    parts = (flops.generate(g, 2, as_written=True), flops.decoder(t, 2, all_rows=True), flops.pixel_decoder(t, 2))
    assert counter.get_total_flops() == sum(part.flops for part in parts)


@pytest.mark.parametrize("confidence", ["titok", "maskgit"])
def test_plain_sampling_fixes_every_token(confidence):
    tokenizer, generator = tiny()
    sampling = SamplingConfig(steps=4, confidence=confidence)
    generator.config = GeneratorConfig.from_dict({**generator.config.to_dict(), "sampling": sampling.to_dict()})
    tokens = Plain(tokenizer, generator).sample([0, 1, 2])
    assert tokens.shape == (3, 5)
    assert tokens.max() < generator.mask_token
