"""The published tokenizer's decoder: tokens to logits over the proxy's codes, and those to pixels.

Attention is `nn.MultiheadAttention` with the sequence in the first dimension; every norm, sum and activation is an
op of its own; convolutions are contiguous (NCHW) and enlarged feature maps are stored.
"""

from __future__ import annotations

import itertools
import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.baselines.published_parts import conv3x3, mlp, with_weights
from titok import TiTok
from titok.config import TokenizerConfig, VQGANConfig


class LengthFirstBlock(nn.Module):
    """Pre-norm transformer layer on x (N, B, D)."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and a 3x3 convolution, then the sum with x.

    Where the channels change, the published weights add a 1x1 convolution of the block's result instead of x.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels, eps=1e-6) for channels in (inputs, outputs))
        self.conv1, self.conv2 = (conv3x3(channels, outputs, bias=False) for channels in (inputs, outputs))
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Upsample(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution of the enlarged map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the upsampling to the next."""

    def __init__(self, widths: list[int], *, upsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(itertools.starmap(ResidualBlock, itertools.pairwise(widths)))
        self.upsample = Upsample(widths[-1], widths[-1], 3, padding=1) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.upsample(x)


class PixelDecoder(nn.Module):
    """Code vectors (B, code_dim, h, w) -> images (B, 3, H, W)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        self.conv_in = conv3x3(config.code_dim, widths[-1])
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2)))
        self.levels = nn.ModuleList(
            Level([before] + [width] * config.blocks_per_level, upsample=i > 0)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = conv3x3(widths[0], config.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PublishedDecoder(nn.Module):
    """Tokens to logits over the proxy's codes, and those to pixels.

    Raises:
        ValueError: the official code has no tokenizer of this configuration that decodes through a proxy.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        proxy = config.proxy
        if config.head != "proxy" or proxy is None or not proxy.shortcut_of_result or config.signed_pixels:
            raise ValueError("tokenizer: expected one whose decoder ends at the published proxy codes")
        vit = config.decoder
        self.grid = config.grid("decoder")
        self.side = vit.patch_size // proxy.factor  # each patch predicts side x side codes
        self.l2_normalize = config.l2_normalize
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))
        self.embed = nn.Linear(config.code_dim, vit.width)
        self.class_token = nn.Parameter(torch.empty(1, vit.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.patch_positions = nn.Parameter(torch.empty(1 + math.prod(self.grid), vit.width))
        self.latent_positions = nn.Parameter(torch.empty(config.num_latent_tokens, vit.width))
        self.norm_pre, self.norm_post = nn.LayerNorm(vit.width), nn.LayerNorm(vit.width)
        self.blocks = nn.Sequential(
            *(LengthFirstBlock(vit.width, vit.heads, vit.mlp_ratio * vit.width) for _ in range(vit.layers))
        )
        self.head = nn.Sequential(
            nn.Conv2d(vit.width, 2 * vit.width, 1),
            nn.Tanh(),
            nn.Conv2d(2 * vit.width, proxy.codebook_size * self.side**2, 1),
        )
        self.pixel_decoder: PixelDecoder | None = None
        if config.pixel_decoder:
            self.pixel_codebook = nn.Parameter(torch.empty(proxy.codebook_size, proxy.code_dim))
            self.pixel_decoder = PixelDecoder(proxy)

    @classmethod
    def of(cls, tokenizer: TiTok, dtype: torch.dtype | None = None) -> PublishedDecoder:
        """With the weights of a titok tokenizer, in `dtype`; None keeps theirs."""
        return with_weights(lambda: cls(tokenizer.config), cls.weights_of(tokenizer), dtype)

    @staticmethod
    def weights_of(tokenizer: TiTok) -> dict[str, Tensor]:
        """The weights of the decoder and the quantizer of a titok tokenizer, by the names that are used here."""
        weights = {}
        for name, value in tokenizer.state_dict().items():
            if name.startswith("encoder."):
                continue
            name = re.sub(r"^(quantizer|decoder\.trunk|decoder)\.", "", name)
            name = name.replace("attn.qkv.", "attn.in_proj_").replace("attn.proj.", "attn.out_proj.")
            weights[name] = value[..., None, None] if re.match(r"head\.\d\.weight", name) else value
        return weights

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) -> logits (B, codes, h, w)."""
        batch, (h, w) = len(tokens), self.grid
        latents = F.embedding(tokens.reshape(-1), self.codebook)
        if self.l2_normalize:
            latents = F.normalize(latents, dim=-1)
        latents = rearrange(latents, "(b k) c -> b c 1 k", b=batch).contiguous()
        x = self.embed(latents.flatten(1, 2).permute(0, 2, 1))
        masks = self.mask_token.repeat(batch, h * w, 1).to(x.dtype)
        masks = torch.cat([self.class_token[None].expand(batch, -1, -1).to(x.dtype), masks], dim=1)
        masks = masks + self.patch_positions.to(x.dtype)
        x = self.norm_pre(torch.cat([masks, x + self.latent_positions], dim=1))
        x = self.blocks(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.norm_post(x[:, 1 : 1 + h * w])
        x = self.head(x.permute(0, 2, 1).reshape(batch, -1, h, w).contiguous())
        if self.side == 1:
            return x
        return rearrange(x, "b (r s c) h w -> b c (h r) (w s)", r=self.side, s=self.side)

    def pixels(self, logits: Tensor) -> Tensor:
        """logits (B, codes, h, w) -> images (B, 3, H, W)."""
        if self.pixel_decoder is None:
            raise ValueError("tokenizer: expected one with a pixel decoder, got one that ends at proxy logits")
        return self.pixel_decoder(torch.einsum("nchw,cd->ndhw", logits.softmax(1), self.pixel_codebook))
