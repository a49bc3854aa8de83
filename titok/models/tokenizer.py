"""TiTok (Yu et al., NeurIPS 2024): a ViT encoder that keeps only K latent tokens, a bottleneck, and a ViT decoder.

Shapes: B images of height H and width W, P patches, K latent tokens, D width, C code dimension, V codebook size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from titok.checkpoints import official
from titok.checkpoints.lazy import LazyTensor
from titok.checkpoints.pretrained import Pretrained
from titok.checkpoints.quirks import reread_latents
from titok.checks import check_images, check_latents, check_tokens
from titok.config import TokenizerConfig
from titok.inference.workspace import Workspace
from titok.models.layers import Linear
from titok.models.quantizer import DiagonalGaussian, VectorQuantizer
from titok.models.transformer import Transformer, init_weights
from titok.models.vqgan import VQGANDecoder
from titok.ops import code_mixture
from titok.profiling import ranged


def token_table(*shape: int) -> nn.Parameter:
    """Normally distributed vectors, of length 1 on average; on the meta device none, as in `Embedding`."""
    table = torch.empty(shape)
    return nn.Parameter(table if table.is_meta else table.normal_() * shape[-1] ** -0.5)


class Encoder(nn.Module):
    """Images (B, channels, H, W) -> latents (B, K, C), of a VAE (B, K, 2C).

    The transformer reads one class token, P patches and K latent tokens, and only the latent tokens' outputs are
    used.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        vit, tokens = config.encoder, config.num_latent_tokens
        h, w = config.grid("encoder")
        self.reread_latents: bool = config.reread_latents
        self.patch_embed: nn.Conv2d = nn.Conv2d(config.channels, vit.width, vit.patch_size, stride=vit.patch_size)
        self.class_token: nn.Parameter = token_table(1, vit.width)
        self.patch_positions: nn.Parameter = token_table(1 + h * w, vit.width)  # row 0: the class token
        self.latent_tokens: nn.Parameter = token_table(tokens, vit.width)
        self.latent_positions: nn.Parameter = token_table(tokens, vit.width)
        self.trunk: Transformer = Transformer(vit.width, vit.layers, vit.heads, vit.mlp_ratio * vit.width)
        outputs = 2 * config.code_dim if config.bottleneck == "vae" else config.code_dim
        self.project: Linear = Linear(vit.width, outputs)
        init_weights(self, "xavier")

    @ranged("encoder")
    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        return self.project(reread_latents(x) if self.reread_latents else x)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> the normed output of the last block for the latent tokens, (B, K, D)."""
        batch = images.shape[0]
        patches = rearrange(self.patch_embed(images), "b d h w -> b (h w) d")
        patches = patches + self.patch_positions[1:]
        class_token = (self.class_token + self.patch_positions[:1]).expand(batch, -1, -1)
        latents = (self.latent_tokens + self.latent_positions).expand(batch, -1, -1)
        x = torch.cat([class_token, patches, latents], dim=1)
        return self.trunk(x, query_range=(x.shape[1] - latents.shape[1], x.shape[1]))


class Decoder(nn.Module):
    """Quantised latents (B, K, C) -> what the head predicts.

    The transformer reads one class token, P mask tokens and K latent tokens, and only the mask tokens' outputs are
    used. A "pixels" head predicts images (B, channels, H, W). A "proxy" head predicts logits over the proxy
    tokenizer's codes, (B, h, w, codes) on that tokenizer's grid: each patch predicts all codes of the grid that it
    covers.
    """

    grid: tuple[int, int]

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        vit, tokens = config.decoder, config.num_latent_tokens
        self.grid = h, w = config.grid("decoder")
        self.embed: Linear = Linear(config.code_dim, vit.width)
        self.class_token: nn.Parameter = token_table(1, vit.width)
        self.mask_token: nn.Parameter = token_table(1, 1, vit.width)
        self.patch_positions: nn.Parameter = token_table(1 + h * w, vit.width)  # row 0: the class token
        self.latent_positions: nn.Parameter = token_table(tokens, vit.width)
        self.trunk: Transformer = Transformer(vit.width, vit.layers, vit.heads, vit.mlp_ratio * vit.width)
        self.smooth: nn.Conv2d | None = None
        if config.head == "proxy":
            assert config.proxy is not None  # checked by the configuration
            self.values_per_side: int = vit.patch_size // config.proxy.factor  # codes along each side of a patch
            outputs = config.proxy.codebook_size * self.values_per_side**2
            hidden = Linear(vit.width, 2 * vit.width)
            self.head: nn.Sequential = nn.Sequential(hidden, nn.Tanh(), Linear(2 * vit.width, outputs))
        else:
            self.values_per_side = vit.patch_size  # pixels along each side of a patch
            self.head = nn.Sequential(Linear(vit.width, config.channels * self.values_per_side**2))
            self.smooth = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        init_weights(self, "xavier")

    @ranged("decoder")
    def forward(self, latents: Tensor) -> Tensor:
        h, w = self.grid
        latents = self.embed(latents) + self.latent_positions
        class_token = self.class_token + self.patch_positions[:1]
        masks = self.mask_token[0] + self.patch_positions[1:]
        fixed = torch.cat([class_token, masks])  # (1 + P, D), the same in every image
        x = torch.cat([fixed.expand(latents.shape[0], -1, -1), latents], dim=1)
        x = self.head(self.trunk(x, query_range=(1, 1 + h * w)))
        # Both heads order the values of a patch by row r, column s, and then channel or code c.
        side = self.values_per_side
        x = rearrange(x, "b (h w) (r s c) -> b (h r) (w s) c", h=h, w=w, r=side, s=side)
        return x if self.smooth is None else self.smooth(rearrange(x, "b h w c -> b c h w"))


class TiTok(Pretrained):
    """The tokenizer. `TiTok(config)` has random weights; `TiTok.from_pretrained(path_or_repo)` reads them.

    Images are (B, channels, H, W) with (H, W) = `config.image_size`, of any floating dtype with values in [0, 1],
    on the device of the model. Tokens are (B, K) int64 in [0, V); a VAE has latents (B, K, C) in their place.
    """

    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: Encoder = Encoder(config)
        self.quantizer: VectorQuantizer | None = None
        if config.bottleneck == "vq":
            self.quantizer = VectorQuantizer(
                config.codebook_size, config.code_dim,
                l2_normalize=config.l2_normalize, commitment_cost=config.commitment_cost,
            )  # fmt: skip
        self.decoder: Decoder = Decoder(config)
        self.pixel_decoder: VQGANDecoder | None = None
        if config.pixel_decoder:
            assert config.proxy is not None  # checked by the configuration
            size = (config.proxy.codebook_size, config.proxy.code_dim)
            self.pixel_codebook: nn.Parameter = nn.Parameter(torch.empty(size).uniform_(-1 / size[0], 1 / size[0]))
            height, width = (pixels // config.proxy.factor for pixels in config.image_size)
            self.pixel_decoder = VQGANDecoder(config.proxy, (height, width))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in. That of the codebook may be wider."""
        return self.decoder.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.embed.weight.device

    # -----------------------------------------------------------------------------------------------------------
    # Images to tokens. Each method checks its images once, in `_encode_checked`.

    @ranged("tokenize")
    def encode(self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Images to tokens.

        Args:
            images: (B, channels, H, W), as described at the class.
            sample: of a VAE, draw from the posterior; otherwise its mean is returned.
            generator: of the draw's noise, on the device of the model; None takes PyTorch's global one.

        Returns:
            (B, K) int64, of a VAE (B, K, C).

        Raises:
            TypeError: `images` is not a floating tensor.
            ValueError: its shape is not (B, channels, *config.image_size), or a value is outside [0, 1]; or
                `sample` is set for a vector-quantised tokenizer.
        """
        if sample and self.quantizer is not None:
            raise ValueError("sample: expected False, because this tokenizer is vector-quantised")
        latents = self._encode_checked(images)
        if self.quantizer is not None:
            return self.quantizer.indices(latents)
        posterior = DiagonalGaussian.from_parameters(latents)
        return posterior.sample(generator) if sample else posterior.mean

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images to latents (B, K, C) before quantisation; of a VAE the posterior's mean. Raises as `encode`."""
        latents = self._encode_checked(images)
        if self.config.bottleneck == "vae":
            return DiagonalGaussian.from_parameters(latents).mean
        return latents

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images to the posterior of a VAE. Raises as `encode`; `ValueError` for a vector-quantised tokenizer."""
        if self.config.bottleneck != "vae":
            raise ValueError("posterior: expected a tokenizer whose bottleneck is 'vae', got 'vq'")
        return DiagonalGaussian.from_parameters(self._encode_checked(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        """Images to their reconstruction and the bottleneck's result, for training. Raises as `encode`.

        Where gradients are enabled, a prepared model is given its weights back first.

        Returns:
            the reconstruction (B, channels, H, W), not clamped, and a `Quantized` (straight-through) or a
            `DiagonalGaussian` (the reconstruction is that of a draw).
        """
        if torch.is_grad_enabled() and self.prepared:
            self.unprepare()
        latents = self._encode_checked(images)
        if self.quantizer is not None:
            quantized = self.quantizer(latents)
            return self.decode_latents(quantized.quantized), quantized
        posterior = DiagonalGaussian.from_parameters(latents)
        return self.decode_latents(posterior.sample()), posterior

    def encode_features(self, images: Tensor) -> Tensor:
        """Images to the normed output of the encoder's last block for the latent tokens, (B, K, D). Raises as `encode`.

        The latents are a linear projection of it.
        """
        return self.encoder.features(self._encoder_input(images))

    def _encode_checked(self, images: Tensor) -> Tensor:
        """Checks the images and encodes them: (B, K, C), of a VAE (B, K, 2C)."""
        return self.encoder(self._encoder_input(images))

    def _encoder_input(self, images: Tensor) -> Tensor:
        """Checks the images, and returns what the encoder reads."""
        check_images(images, self.config.channels, self.config.image_size)
        images = images.to(self.dtype)
        return 2 * images - 1 if self.config.signed_pixels else images

    # -----------------------------------------------------------------------------------------------------------
    # Tokens to images. `decode` and `decode_logits` check their tokens; what they call does not.

    @ranged("detokenize")
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to images.

        Args:
            tokens: (B, K) of any integer dtype, of a VAE (B, K, C) of any floating dtype.

        Returns:
            (B, channels, H, W) in the dtype of the model, not clamped.

        Raises:
            TypeError: `tokens` is not a tensor of that dtype.
            ValueError: its shape does not fit, an id is outside [0, V), a latent is not finite; or the model has
                no pixel decoder and ends at proxy logits (`decode_logits`).
        """
        return self.decode_pixels(self.decode_head(self._checked_tokens(tokens)))

    def decode_logits(self, tokens: Tensor) -> Tensor:
        """Tokens to logits over the proxy codes, (B, codes, h, w).

        Raises:
            TypeError, ValueError: as `decode`, or the tokenizer has another head than "proxy".
        """
        if self.config.head != "proxy":
            raise ValueError("decode_logits: expected a tokenizer with head 'proxy', got 'pixels'")
        tokens = self._checked_tokens(tokens)
        return rearrange(self.decode_head(tokens), "b h w c -> b c h w")

    def decode_head(self, tokens: Tensor) -> Tensor:
        """Tokens, not checked here, to what `decode_pixels` reads: images, or proxy logits (B, h, w, codes)."""
        latents = tokens if self.quantizer is None else self.quantizer.lookup(tokens)
        return self.decoder(latents.to(self.dtype))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, K, C), as the bottleneck returns them, to images, not clamped. Differentiable."""
        return self.decode_pixels(self.decoder(latents.to(self.dtype)))

    def decode_pixels(self, prediction: Tensor, workspace: Workspace | None = None) -> Tensor:
        """What the decoder's head predicts (images, or proxy logits (B, h, w, codes)) to images, not clamped.

        Logits become the expectation of the code vectors under their softmax. Taking the most likely code would
        stop the gradients.

        Args:
            workspace: holds the feature maps of a prepared model on a CPU; None takes memory for this call alone.

        Raises:
            ValueError: the head predicts proxy logits, and the model has no pixel decoder.
        """
        if self.config.head == "proxy":
            if self.pixel_decoder is None:
                raise ValueError(
                    "decode: this tokenizer has no pixel decoder; use decode_logits and a MaskGITVQGAN"
                )
            vectors = code_mixture(prediction, self.pixel_codebook)
            prediction = self.pixel_decoder(rearrange(vectors, "b h w c -> b c h w"), workspace)
        return 0.5 * prediction + 0.5 if self.config.signed_pixels else prediction

    def _checked_tokens(self, tokens: Tensor) -> Tensor:
        if self.quantizer is not None:
            return check_tokens(tokens, self.config.num_latent_tokens, self.config.codebook_size)
        check_latents(tokens, self.config.num_latent_tokens, self.config.code_dim)
        return tokens

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> tuple[TokenizerConfig, bool]:
        """The configuration in a `config.json` of ours or of the official layout, and whether it is the latter."""
        if official.is_official(values):
            return official.tokenizer_config(values), True
        return TokenizerConfig.from_dict(values), False

    @staticmethod
    def convert_official(
        weights: Mapping[str, LazyTensor], config: TokenizerConfig | None = None
    ) -> dict[str, LazyTensor]:
        """The tensors of an official checkpoint under the names of this model's parameters."""
        return official.tokenizer_weights(weights, config)

    @classmethod
    def preset_config(cls, name: str) -> TokenizerConfig:
        """See `TokenizerConfig.preset`."""
        return TokenizerConfig.preset(name)
