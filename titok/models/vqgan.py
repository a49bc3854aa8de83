"""MaskGIT-VQGAN (Chang et al. 2022): TiTok's proxy tokenizer and pixel decoder, and the benchmarks' 2D baseline.

Convolutional, without attention. Feature maps are logical (B, C, H, W), in channels-last memory: there a pixel's
channels lie together, which is what convolutions, norms and the code lookup all read.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok.checkpoints import official
from titok.checkpoints.pretrained import Pretrained
from titok.checks import check_images, check_tokens
from titok.config import VQGANConfig
from titok.inference.prepared import uses_prepared_weights
from titok.models.layers import Conv3x3, UpsampleConv
from titok.ops import group_norm_silu, nearest_codebook
from titok.profiling import ranged

_EPS = 1e-6
_GROUPS = 32
_MAP_BYTES = (32 << 20, 2 << 30)  # of one feature map when decoding: on a CPU what its caches hold, on a GPU


def _norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution; a 1x1 shortcut where the number of channels changes."""

    def __init__(self, inputs: int, outputs: int, *, shortcut_of_result: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, inputs, eps=_EPS)
        self.conv1 = Conv3x3(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, outputs, eps=_EPS)
        self.conv2 = Conv3x3(outputs, outputs, bias=False)
        self.shortcut_of_result = shortcut_of_result
        self.nin_shortcut: nn.Conv2d | None = None
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs if shortcut_of_result else inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_norm_silu(x, self.norm1))
        h = _norm_silu(h, self.norm2)
        if self.nin_shortcut is None:
            return self.conv2(h, add=x)
        if self.shortcut_of_result:
            return self.conv2(h, shortcut=self.nin_shortcut)
        return self.conv2(h, add=self.nin_shortcut(x))


class Level(nn.Module):
    """The blocks of one resolution; in the decoder all levels but the first end in nearest-neighbour x2 and a 3x3."""

    def __init__(self, widths: list[int], *, upsample: bool, shortcut_of_result: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, shortcut_of_result=shortcut_of_result) for a, b in itertools.pairwise(widths)
        )
        self.upsample = UpsampleConv(widths[-1]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class VQGANEncoder(nn.Module):
    """Image (B, 3, H, W) -> features (B, code_dim, H/factor, W/factor)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        accident = config.shortcut_of_result
        self.conv_in = Conv3x3(config.channels, config.hidden_channels, bias=False)
        self.levels = nn.ModuleList(
            Level([before] + [w] * config.blocks_per_level, upsample=False, shortcut_of_result=accident)
            for before, w in zip([config.hidden_channels, *widths[:-1]], widths, strict=True)
        )
        self.mid = nn.ModuleList(
            ResidualBlock(widths[-1], widths[-1], shortcut_of_result=accident) for _ in range(2)
        )
        self.norm_out = nn.GroupNorm(_GROUPS, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    @ranged("pixel encoder")
    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.levels) - 1:
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        return self.conv_out(_norm_silu(x, self.norm_out))


class VQGANDecoder(nn.Module):
    """Code vectors (B, code_dim, h, w) -> image (B, 3, h * factor, w * factor), not clamped."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        self.factor, self.channels, self.width = config.factor, config.channels, widths[0]
        accident = config.shortcut_of_result
        self.conv_in = Conv3x3(config.code_dim, widths[-1], bias=True)
        self.mid = nn.ModuleList(
            ResidualBlock(widths[-1], widths[-1], shortcut_of_result=accident) for _ in range(2)
        )
        self.levels = nn.ModuleList(  # stored from the finest to the coarsest, run the other way round
            Level([before] + [w] * config.blocks_per_level, upsample=i > 0, shortcut_of_result=accident)
            for i, (before, w) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(_GROUPS, widths[0], eps=_EPS)
        self.conv_out = Conv3x3(widths[0], config.channels, bias=True)

    @ranged("pixel decoder")
    def forward(self, codes: Tensor) -> Tensor:
        part = self._images_at_once(codes)
        if not uses_prepared_weights() or part >= len(codes):
            return self._decode(codes)
        out = codes.new_empty(len(codes), self.channels, *(side * self.factor for side in codes.shape[2:]))
        for images, some in zip(out.split(part), codes.split(part), strict=True):
            images.copy_(self._decode(some))
        return out

    def _images_at_once(self, codes: Tensor) -> int:
        """As many as keep one map of the finest level within `_MAP_BYTES`: images do not depend on each other."""
        pixels = codes.shape[2] * codes.shape[3] * self.factor**2
        return max(1, _MAP_BYTES[codes.device.type == "cuda"] // (pixels * self.width * codes.element_size() or 1))

    def _decode(self, codes: Tensor) -> Tensor:
        x = self.conv_in(codes.contiguous(memory_format=torch.channels_last))
        for block in self.mid:
            x = block(x)
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(_norm_silu(x, self.norm_out))


class MaskGITVQGAN(Pretrained):
    """The stand-alone 2D tokenizer: images to an h x w grid of codes and back."""

    config: VQGANConfig

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or VQGANConfig()
        self.encoder = VQGANEncoder(self.config)
        self.decoder = VQGANDecoder(self.config)
        self.codebook = nn.Parameter(torch.empty(self.config.codebook_size, self.config.code_dim))
        nn.init.uniform_(self.codebook, -1 / self.config.codebook_size, 1 / self.config.codebook_size)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], sides multiples of `config.factor` -> codes (B, h, w) int64."""
        factor = self.config.factor
        if isinstance(images, Tensor) and (
            images.ndim != 4 or images.shape[2] % factor or images.shape[3] % factor
        ):
            raise ValueError(
                f"images: expected (B, C, H, W), H and W multiples of {factor}, got {tuple(images.shape)}"
            )
        check_images(images, self.config.channels, (images.shape[2], images.shape[3]))
        features = self.encoder(images.to(self.codebook.dtype))
        return nearest_codebook(rearrange(features, "b c h w -> b h w c"), self.codebook)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 -> images (B, 3, H, W), clamped to [0, 1] as the published tokenizer does."""
        if not isinstance(codes, Tensor) or codes.ndim != 3:
            got = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"codes: expected shape (B, h, w), got {got}")
        check_tokens(codes.flatten(1), codes.shape[1] * codes.shape[2], self.config.codebook_size)
        vectors = F.embedding(codes, self.codebook)
        return self.decoder(rearrange(vectors, "b h w c -> b c h w")).clamp(0, 1)

    @classmethod
    def read_config(cls, values: dict[str, object]) -> tuple[VQGANConfig, bool]:
        """Its official checkpoint is a bare weights file: without a `config.json` of ours it is the published one."""
        if not values:
            return VQGANConfig(), True
        return VQGANConfig.from_dict(values), False

    convert_official = staticmethod(official.vqgan_weights)
