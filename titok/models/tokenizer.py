"""TiTok (Yu et al., NeurIPS 2024): a ViT encoder that keeps only K latent tokens, a bottleneck, a ViT decoder.

Shapes: B images, P patches of side p, K latent tokens, D width, C code dimension, V codebook size.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from titok.checkpoints import official
from titok.checkpoints.pretrained import Pretrained
from titok.checks import check_images, check_latents, check_tokens
from titok.config import TokenizerConfig
from titok.inference.memory import memory_that_stays
from titok.inference.prepared import PreparedWeight, float32_copy, uses_prepared_weights
from titok.models.layers import Linear
from titok.models.quantizer import DiagonalGaussian, VectorQuantizer
from titok.models.transformer import FirstLayerInput, Transformer, init_weights
from titok.models.vqgan import VQGANDecoder
from titok.ops import code_mixture
from titok.profiling import ranged


class Encoder(nn.Module):
    """Images (B, C, H, W) -> latents (B, K, code_dim): class token, P patches and K latent tokens go in, the
    latents alone come out."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        vit, tokens = config.encoder, config.num_latent_tokens
        h, w = config.grid("encoder")
        scale = vit.width**-0.5
        self.reread_latents = config.reread_latents
        self.patch_embed = nn.Conv2d(config.channels, vit.width, vit.patch_size, stride=vit.patch_size)
        self.class_token = nn.Parameter(scale * torch.randn(1, vit.width))
        self.patch_positions = nn.Parameter(scale * torch.randn(1 + h * w, vit.width))  # row 0: the class token
        self.latent_tokens = nn.Parameter(scale * torch.randn(tokens, vit.width))
        self.latent_positions = nn.Parameter(scale * torch.randn(tokens, vit.width))
        self.trunk = Transformer(vit.width, vit.layers, vit.heads, vit.mlp_ratio * vit.width)
        outputs = 2 * config.code_dim if config.bottleneck == "vae" else config.code_dim
        self.project = Linear(vit.width, outputs)
        init_weights(self, "xavier")

    @ranged("encoder")
    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]
        patches = rearrange(self.patch_embed(images), "b d h w -> b (h w) d")
        patches = patches + self.patch_positions[1:]
        class_token = (self.class_token + self.patch_positions[:1]).expand(batch, -1, -1)
        latents = (self.latent_tokens + self.latent_positions).expand(batch, -1, -1)
        x = torch.cat([class_token, patches, latents], dim=1)
        x = self.trunk(x, rows=(x.shape[1] - latents.shape[1], x.shape[1]))
        return self.project(official.reread_latents(x) if self.reread_latents else x)


class Decoder(nn.Module):
    """Quantised latents (B, K, code_dim) -> what the head predicts at each of the P positions.

    A "pixels" head answers with an image (B, C, H, W); a "proxy" head with logits (B, h, w, codes), where (h, w) is
    the grid of the proxy tokenizer: every decoder patch predicts the r x r proxy codes that it covers.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        vit, tokens = config.decoder, config.num_latent_tokens
        self.grid = h, w = config.grid("decoder")
        scale = vit.width**-0.5
        self.embed = Linear(config.code_dim, vit.width)
        self.class_token = nn.Parameter(scale * torch.randn(1, vit.width))
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, vit.width))
        self.patch_positions = nn.Parameter(scale * torch.randn(1 + h * w, vit.width))  # row 0: the class token
        self.latent_positions = nn.Parameter(scale * torch.randn(tokens, vit.width))
        self.trunk = Transformer(vit.width, vit.layers, vit.heads, vit.mlp_ratio * vit.width)
        self._entered: PreparedWeight[FirstLayerInput] = PreparedWeight()
        self.smooth: nn.Conv2d | None = None
        if config.head == "proxy":
            assert config.proxy is not None  # checked by the configuration
            self.side = vit.patch_size // config.proxy.factor  # proxy codes along each side of a patch
            outputs = config.proxy.codebook_size * self.side**2
            hidden = Linear(vit.width, 2 * vit.width)
            self.head = nn.Sequential(hidden, nn.Tanh(), Linear(2 * vit.width, outputs))
        else:
            self.side = vit.patch_size
            self.head = nn.Sequential(Linear(vit.width, config.channels * self.side**2))
            self.smooth = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        init_weights(self, "xavier")

    @ranged("decoder")
    def forward(self, latents: Tensor) -> Tensor:
        h, w = self.grid
        x = self.embed(latents) + self.latent_positions
        entered = None
        if uses_prepared_weights():
            first = self.trunk.blocks[0]
            sources = [self.class_token, self.mask_token, self.patch_positions, *self.trunk.norm_pre.parameters()]
            sources += [*first.norm1.parameters(), *first.attn.qkv.parameters()]  # type: ignore[union-attr]
            entered = self._entered.get(lambda: self.trunk.enter(self._known()), *sources)
        else:
            x = torch.cat([self._known().expand(len(x), -1, -1), x], dim=1)
        x = self.head(self.trunk(x, rows=(1, 1 + h * w), entered=entered))
        # Within a patch: row, column, then channels or codes fastest (both kinds of head).
        x = rearrange(x, "b (h w) (r s c) -> b (h r) (w s) c", h=h, w=w, r=self.side, s=self.side)
        return x if self.smooth is None else self.smooth(rearrange(x, "b h w c -> b c h w"))

    def _known(self) -> Tensor:
        """Class and mask tokens in front of the latents, the same in every image: (1, 1 + P, D)."""
        masks = self.mask_token[0] + self.patch_positions[1:]
        return torch.cat([self.class_token + self.patch_positions[:1], masks])[None]


class TiTok(Pretrained):
    """The tokenizer. `TiTok(config)` has random weights; `TiTok.from_pretrained(path_or_repo)` reads them.

    Images are (B, channels, H, W) with values in [0, 1] and exactly `config.image_size`; any floating dtype, on the
    device of the model.
    """

    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer: VectorQuantizer | None = None
        if config.bottleneck == "vq":
            self.quantizer = VectorQuantizer(
                config.codebook_size, config.code_dim,
                l2_normalize=config.l2_normalize, commitment_cost=config.commitment_cost,
            )  # fmt: skip
        self.decoder = Decoder(config)
        self.pixel_decoder: VQGANDecoder | None = None
        if config.pixel_decoder:
            assert config.proxy is not None  # checked by the configuration
            size = (config.proxy.codebook_size, config.proxy.code_dim)
            self.pixel_codebook = nn.Parameter(torch.empty(size).uniform_(-1 / size[0], 1 / size[0]))
            self.pixel_decoder = VQGANDecoder(config.proxy)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in (the codebook's may be wider)."""
        return self.decoder.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.weight.device

    def encode_latents(self, images: Tensor) -> Tensor:
        """images -> latents (B, K, C) before quantisation; of a VAE the posterior's mean.

        Raises:
            TypeError: `images` is no floating tensor.
            ValueError: its shape is not (B, channels, *config.image_size), or a value is outside [0, 1].
        """
        latents = self._encode(images)
        if self.config.bottleneck == "vae":
            return DiagonalGaussian.from_parameters(latents).mean
        return latents

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """images -> the posterior of a VAE: mean, logvar, `sample()`, `kl()`. Raises as `encode_latents`."""
        if self.config.bottleneck != "vae":
            raise ValueError("posterior: expected a tokenizer whose bottleneck is 'vae', got 'vq'")
        return DiagonalGaussian.from_parameters(self._encode(images))

    @ranged("tokenize")
    @memory_that_stays()
    def encode(self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """images -> tokens (B, K) int64; of a VAE the posterior's mean (B, K, C), or with `sample` a draw from it.

        Raises as `encode_latents`, and `ValueError` for `sample` with a vector-quantised tokenizer.
        """
        if (twin := float32_copy(self)) is not self:
            return twin.encode(images, sample=sample, generator=generator)
        if self.quantizer is not None:
            if sample:
                raise ValueError("sample: expected False, because this tokenizer is vector-quantised")
            return self.quantizer.indices(self._encode(images))
        posterior = self.posterior(images)
        return posterior.sample(generator) if sample else posterior.mean

    @ranged("detokenize")
    @memory_that_stays()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) int64, of a VAE latents (B, K, C) -> images (B, channels, H, W), not clamped.

        Raises:
            TypeError, ValueError: wrong dtype, K or ids; or the model ends at proxy logits (`decode_logits`).
        """
        if (twin := float32_copy(self)) is not self:
            return twin.decode(tokens).to(self.dtype)
        return self.decode_latents(self._lookup(tokens))

    def decode_logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) -> logits over the proxy codes (B, codes, h, w). Raises as `decode`."""
        if self.config.head != "proxy":
            raise ValueError("decode_logits: expected a tokenizer with head 'proxy', got 'pixels'")
        return rearrange(self.decode_head(tokens), "b h w c -> b c h w")

    @memory_that_stays()
    def decode_head(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) -> what `decode_pixels` makes images of: images, or proxy logits (B, h, w, codes)."""
        return self.decoder(self._lookup(tokens).to(self.dtype))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, K, C), as a bottleneck gives them -> images, not clamped. Differentiable."""
        return self.decode_pixels(self.decoder(latents.to(self.dtype)))

    @memory_that_stays()
    def decode_pixels(self, x: Tensor) -> Tensor:
        """What the decoder's head says (an image, or proxy logits (B, h, w, codes)) -> images, not clamped."""
        if self.config.head == "proxy":
            if self.pixel_decoder is None:
                raise ValueError(
                    "decode: this tokenizer has no pixel decoder; use decode_logits and a MaskGITVQGAN"
                )
            # The expectation of the code vectors under the predicted distribution: no arg max, so gradients pass.
            x = self.pixel_decoder(rearrange(code_mixture(x, self.pixel_codebook), "b h w c -> b c h w"))
        return 0.5 * x + 0.5 if self.config.signed_pixels else x

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        """images -> (reconstruction, bottleneck): `Quantized` (straight-through) or `DiagonalGaussian` (sampled)."""
        latents = self._encode(images)
        if self.quantizer is not None:
            quantized = self.quantizer(latents)
            return self.decode_latents(quantized.quantized), quantized
        posterior = DiagonalGaussian.from_parameters(latents)
        return self.decode_latents(posterior.sample()), posterior

    def _encode(self, images: Tensor) -> Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        images = images.to(self.dtype)
        return self.encoder(2 * images - 1 if self.config.signed_pixels else images)

    def _lookup(self, tokens: Tensor) -> Tensor:
        if self.quantizer is None:
            check_latents(tokens, self.config.num_latent_tokens, self.config.code_dim)
            return tokens
        check_tokens(tokens, self.config.num_latent_tokens, self.config.codebook_size)
        return self.quantizer.lookup(tokens)

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> tuple[TokenizerConfig, bool]:
        if official.is_official(values):
            return official.tokenizer_config(values), True
        return TokenizerConfig.from_dict(values), False

    convert_official = staticmethod(official.tokenizer_weights)
