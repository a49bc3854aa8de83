"""Small models whose linear layers are wide enough to be prepared for inference."""

from __future__ import annotations

from typing import Any

import torch

from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig, VQGANConfig


def wide_tokenizer(layers: int = 2) -> TiTok:
    """A tokenizer with 8 tokens of 64 codes for 32x32 pictures, with a pixel decoder and random weights."""
    torch.manual_seed(0)
    vit = ViTConfig(384, layers, 6, 16)
    proxy = VQGANConfig(
        hidden_channels=64, channel_multipliers=(1, 2), blocks_per_level=1, codebook_size=48, code_dim=32
    )
    config = TokenizerConfig(
        image_size=32, encoder=vit, decoder=vit, num_latent_tokens=8, code_dim=12, codebook_size=64, head="proxy",
        proxy=proxy, pixel_decoder=True,
    )  # fmt: skip
    return TiTok(config).eval()


def wide_generator(**change: Any) -> MaskGIT:
    """A generator of 10 classes for `wide_tokenizer`; keywords change its configuration."""
    torch.manual_seed(1)
    return MaskGIT(
        GeneratorConfig(8, 64, num_classes=10, width=384, layers=2, heads=6, mlp_width=1536, **change)
    ).eval()
