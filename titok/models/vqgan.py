"""MaskGIT-VQGAN (Chang et al. 2022): TiTok's proxy tokenizer and pixel decoder, and a 2D tokenizer on its own.

It is convolutional, without attention. Feature maps have the shape (B, C, H, W) in channels-last memory: the
channels of a pixel lie together, which is the order in which convolutions, norms and the code lookup read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok.checkpoints import official
from titok.checkpoints.lazy import LazyTensor
from titok.checkpoints.pretrained import Pretrained
from titok.checks import check_images, check_tensor, check_tokens
from titok.config import VQGANConfig
from titok.inference import cudnn, onednn
from titok.inference.folded_upsample import FoldedUpsampleConv, upsample_conv_in
from titok.inference.prepared import PreparableLayer
from titok.inference.prepared_weights import prepared_form, readable
from titok.inference.workspace import Buffers, Workspace
from titok.models.layers import Conv1x1, Conv3x3, UpsampleConv
from titok.ops import group_norm_silu, nearest_codebook
from titok.profiling import ranged

_EPS = 1e-6
_GROUPS = 32

# What each convolution of a decoder computes from once it is prepared. Taken all at once, because another thread may
# give the model its weights back during a call.
PackedWeights = dict[nn.Module, Any]

# Height and width of the codes of the published model's 256x256 images.
CODE_SIZE = (16, 16)

# The largest feature map that the decoder computes at once, in bytes. On a CPU 32 MiB, so that it stays in the
# caches; on a GPU 2 GiB, so that a batch of any size fits into memory.
_MAX_MAP_BYTES_CPU, _MAX_MAP_BYTES_GPU = 32 << 20, 2 << 30


def _norm_silu(x: Tensor, norm: nn.GroupNorm, out: Tensor | None = None) -> Tensor:
    """silu(norm(x)) in one pass, x (B, C, H, W), in the memory of `out` if that is given, which may be x.

    x may be float32 where the norm is bfloat16.
    """
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return group_norm_silu(x, norm.num_groups, weight, bias, norm.eps, out=out)


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _sum_norm_silu(x: Tensor, residual: Tensor | None, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """x + residual, or x alone, and silu(norm(...)) of it, in one op."""
    if residual is None:
        return x, _norm_silu(x, norm)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return group_norm_silu(x, norm.num_groups, weight, bias, norm.eps, residual=residual)


class ResidualBlock(PreparableLayer):
    """Group norm, SiLU and 3x3 convolution, twice, added to the input: (B, inputs, H, W) -> (B, outputs, H, W).

    Where the number of channels changes, the input passes a 1x1 convolution before it is added. With
    `shortcut_of_result` that convolution reads another tensor, see `titok.checkpoints.quirks`.

    Args:
        size: height and width of the maps that the block is prepared for.
    """

    def __init__(self, inputs: int, outputs: int, *, size: tuple[int, int], shortcut_of_result: bool) -> None:
        super().__init__()
        self.norm1: nn.GroupNorm = nn.GroupNorm(_GROUPS, inputs, eps=_EPS)
        self.conv1: Conv3x3 = Conv3x3(inputs, outputs, bias=False, size=size)
        self.norm2: nn.GroupNorm = nn.GroupNorm(_GROUPS, outputs, eps=_EPS)
        folds = shortcut_of_result and inputs != outputs
        self.conv2: Conv3x3 = Conv3x3(outputs, outputs, bias=False, size=size, takes_shortcut=folds)
        self.shortcut_of_result = shortcut_of_result
        self.nin_shortcut: Conv1x1 | None = None
        if inputs != outputs:
            self.nin_shortcut = Conv1x1(outputs if shortcut_of_result else inputs, outputs, bias=False)

    def prepare_weights(self) -> None:
        if self.nin_shortcut is not None and self.shortcut_of_result:
            self.conv2.prepare_weights(self.nin_shortcut)

    def folds_its_shortcut(self) -> bool:
        """Whether a shortcut that is folded into the second convolution, if any, is that of this block."""
        return not self.shortcut_of_result or self.conv2.is_prepared_with(self.nin_shortcut)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_norm_silu(x, self.norm1))
        h = _norm_silu(h, self.norm2)
        if self.nin_shortcut is None:
            return self.conv2(h, add=x)
        if self.shortcut_of_result:
            return self.conv2(h, shortcut=self.nin_shortcut)
        return self.conv2(h, add=self.nin_shortcut(x))

    def summands(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The two summands of the block's result, where its input is x + residual. None stands for nothing to add.

        On a GPU, in inference, the norm that reads a sum takes it in the same pass. Elsewhere the sum is taken here.
        """
        if not cudnn.is_used(x) or torch.is_grad_enabled():
            return self(_sum(x, residual)), None
        x, h = _sum_norm_silu(x, residual, self.norm1)
        h = _norm_silu(self.conv1(h), self.norm2)
        if self.nin_shortcut is None:
            return self.conv2(h), x
        if self.shortcut_of_result:
            return self.conv2(h, shortcut=self.nin_shortcut), None
        return self.conv2(h), self.nin_shortcut(x)

    def forward_in(self, buffers: Buffers, packed: PackedWeights, x: Tensor) -> Tensor:
        """`forward` from packed weights in buffers. x is overwritten, and the result may be in the block "map"."""
        h = _norm_silu(x, self.norm1, out=buffers.map("normed", x.shape, x.dtype))
        shape = (x.shape[0], self.conv1.out_channels, *x.shape[2:])
        hidden = onednn.add_conv(buffers.map("hidden", shape, x.dtype).zero_(), h, packed[self.conv1], None)
        hidden = _norm_silu(hidden, self.norm2, out=hidden)
        if self.nin_shortcut is None:
            total = x
        elif not self.shortcut_of_result:
            total = F.conv2d(x, readable(self.nin_shortcut.weight).to(x.dtype))
        else:  # the shortcut is in the packed weight
            # The result goes where h is, which is not read any more. x may lie in "map", which is free from here on.
            buffers.exchange("map", "normed")
            total = buffers.map("map", shape, x.dtype).zero_()
        return onednn.add_conv(total, hidden, packed[self.conv2], None)


class Level(nn.Module):
    """The residual blocks of one resolution and, where `upsample` is set, an upsampling by 2 after them.

    Args:
        widths: channels in front of the first block, then after each block.
        size: height and width of the maps that the level is prepared for.
    """

    def __init__(
        self, widths: list[int], *, size: tuple[int, int], upsample: bool, shortcut_of_result: bool
    ) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(
            ResidualBlock(before, after, size=size, shortcut_of_result=shortcut_of_result)
            for before, after in itertools.pairwise(widths)
        )
        self.upsample: UpsampleConv | None = UpsampleConv(widths[-1], size=size) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H, W), or (B, C', 2H, 2W) with `upsample`."""
        for block in self.blocks:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)

    def summands(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The two summands of the level's result, as `ResidualBlock.summands`."""
        for block in self.blocks:
            x, residual = block.summands(x, residual)  # type: ignore[operator]
        return (x, residual) if self.upsample is None else (self.upsample(_sum(x, residual)), None)

    def forward_in(self, buffers: Buffers, packed: PackedWeights, x: Tensor) -> Tensor:
        """`forward` from packed weights in buffers. x is overwritten, and the result may be in the block "map"."""
        for block in self.blocks:
            x = block.forward_in(buffers, packed, x)  # type: ignore[operator]
        if self.upsample is None:
            return x
        buffers.exchange("map", "normed")  # the result is written to "map", where x may lie
        return upsample_conv_in(buffers, x, packed[self.upsample]._replace(bias=self.upsample.bias))


def _middle_blocks(width: int, *, size: tuple[int, int], shortcut_of_result: bool) -> nn.ModuleList:
    """The two residual blocks of the coarsest resolution."""
    quirk = {"shortcut_of_result": shortcut_of_result}
    return nn.ModuleList(ResidualBlock(width, width, size=size, **quirk) for _ in range(2))


def _sizes(code_size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Height and width of the maps of each level, from fine to coarse, where the coarsest is `code_size`."""
    return [(code_size[0] << i, code_size[1] << i) for i in reversed(range(levels))]


class VQGANEncoder(nn.Module):
    """Images (B, channels, H, W) -> features (B, code_dim, H/factor, W/factor).

    Args:
        code_size: height and width of the map of features that the encoder is prepared for.
    """

    def __init__(self, config: VQGANConfig, code_size: tuple[int, int] = CODE_SIZE) -> None:
        super().__init__()
        sizes = _sizes(code_size, len(config.channel_multipliers))
        quirk = {"shortcut_of_result": config.shortcut_of_result}
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        self.conv_in: Conv3x3 = Conv3x3(config.channels, config.hidden_channels, bias=False, size=sizes[0])
        self.levels: nn.ModuleList = nn.ModuleList(
            Level([before] + [width] * config.blocks_per_level, size=size, upsample=False, **quirk)
            for before, width, size in zip([config.hidden_channels, *widths[:-1]], widths, sizes, strict=True)
        )
        self.mid: nn.ModuleList = _middle_blocks(widths[-1], size=code_size, **quirk)
        self.norm_out: nn.GroupNorm = nn.GroupNorm(_GROUPS, widths[-1], eps=_EPS)
        self.conv_out: nn.Conv2d = nn.Conv2d(widths[-1], config.code_dim, 1)

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
    """Code vectors (B, code_dim, h, w) -> images (B, channels, h * factor, w * factor), not clamped.

    Args:
        code_size: the (h, w) that the decoder is prepared for.
    """

    factor: int
    channels: int
    finest_width: int

    def __init__(self, config: VQGANConfig, code_size: tuple[int, int] = CODE_SIZE) -> None:
        super().__init__()
        sizes = _sizes(code_size, len(config.channel_multipliers))
        quirk = {"shortcut_of_result": config.shortcut_of_result}
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        self.factor, self.channels, self.finest_width = config.factor, config.channels, widths[0]
        self.conv_in: Conv3x3 = Conv3x3(config.code_dim, widths[-1], bias=True, size=code_size)
        self.mid: nn.ModuleList = _middle_blocks(widths[-1], size=code_size, **quirk)
        # Stored from the finest level to the coarsest, as in the official weights, and computed in the opposite
        # order.
        self.levels: nn.ModuleList = nn.ModuleList(
            Level([before] + [width] * config.blocks_per_level, size=sizes[i], upsample=i > 0, **quirk)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out: nn.GroupNorm = nn.GroupNorm(_GROUPS, widths[0], eps=_EPS)
        self.conv_out: Conv3x3 = Conv3x3(widths[0], config.channels, bias=True, size=sizes[0])

    @ranged("pixel decoder")
    def forward(self, codes: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Decodes code vectors. `workspace` holds the feature maps on a CPU if the weights are prepared."""
        count = self._images_at_once(codes)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or count >= len(codes):
            return self._decode(codes, workspace)
        images = codes.new_empty(len(codes), self.channels, *(size * self.factor for size in codes.shape[2:]))
        for some_images, some_codes in zip(images.split(count), codes.split(count), strict=True):
            some_images.copy_(self._decode(some_codes, workspace))
        return images

    def _images_at_once(self, codes: Tensor) -> int:
        """How many images to decode at once: as many as keep the finest level's feature map within the limit."""
        pixels = codes.shape[2] * codes.shape[3] * self.factor**2
        bytes_per_image = pixels * self.finest_width * codes.element_size()
        limit = _MAX_MAP_BYTES_GPU if codes.device.type == "cuda" else _MAX_MAP_BYTES_CPU
        return max(1, limit // max(1, bytes_per_image))

    def _decode(self, codes: Tensor, workspace: Workspace | None) -> Tensor:
        x = codes.contiguous(memory_format=torch.channels_last)
        packed = self._packed_weights(x)
        if packed is not None:
            with (workspace or Workspace()).borrow() as buffers:
                return self._decode_in(buffers, packed, x)
        x, residual = self.conv_in(x), None
        for part in (*self.mid, *reversed(self.levels)):
            x, residual = part.summands(x, residual)
        return self.conv_out(_sum_norm_silu(x, residual, self.norm_out)[1])

    def _packed_weights(self, x: Tensor) -> PackedWeights | None:
        """The weights of all convolutions, if oneDNN packed them and x can be decoded from them; otherwise None."""
        packed: PackedWeights = {}
        for module in self.modules():
            if isinstance(module, Conv3x3 | UpsampleConv):
                packed[module] = form = prepared_form(module.weight, x)
                weight = form.weight[0] if isinstance(form, FoldedUpsampleConv) else form
                if weight is None or not weight.is_mkldnn:
                    return None
            elif isinstance(module, ResidualBlock) and not module.folds_its_shortcut():
                return None
        return packed

    def _decode_in(self, buffers: Buffers, packed: PackedWeights, codes: Tensor) -> Tensor:
        """`_decode` from packed weights in buffers."""
        x = codes.to(packed[self.conv_in].dtype)  # float32 for bfloat16 on some CPUs
        x = onednn.conv(x, packed[self.conv_in], self.conv_in.bias)
        for block in self.mid:
            x = block.forward_in(buffers, packed, x)  # type: ignore[operator]
        for level in reversed(self.levels):
            x = level.forward_in(buffers, packed, x)  # type: ignore[operator]
        x = _norm_silu(x, self.norm_out, out=x)
        return onednn.conv(x, packed[self.conv_out], self.conv_out.bias).to(codes.dtype)


class MaskGITVQGAN(Pretrained):
    """The 2D tokenizer: images to an h x w grid of codes and back.

    `MaskGITVQGAN(config)` has random weights; `MaskGITVQGAN.from_pretrained(path_or_repo)` reads them.
    """

    config: VQGANConfig

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or VQGANConfig()
        self.encoder: VQGANEncoder = VQGANEncoder(self.config)
        self.decoder: VQGANDecoder = VQGANDecoder(self.config)
        self.codebook: nn.Parameter = nn.Parameter(torch.empty(self.config.codebook_size, self.config.code_dim))
        nn.init.uniform_(self.codebook, -1 / self.config.codebook_size, 1 / self.config.codebook_size)

    def encode(self, images: Tensor) -> Tensor:
        """Images to the nearest codes.

        Args:
            images: (B, channels, H, W) of any floating dtype with values in [0, 1]; H and W are multiples of
                `config.factor`.

        Returns:
            (B, H/factor, W/factor) int64.

        Raises:
            TypeError: `images` is not a floating tensor.
            ValueError: the shape does not fit, or a value is outside [0, 1].
        """
        check_tensor("images", images, shape=("B", self.config.channels, "H", "W"))
        height, width = images.shape[2:]
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(f"images: expected H and W multiples of {factor}, got {tuple(images.shape)}")
        check_images(images, self.config.channels, (height, width))
        features = self.encoder(images.to(self.codebook.dtype))
        return nearest_codebook(rearrange(features, "b c h w -> b h w c"), self.codebook)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to images.

        Args:
            codes: (B, h, w) int64 in [0, codebook_size).

        Returns:
            (B, channels, h * factor, w * factor), clamped to [0, 1] as the published tokenizer does.

        Raises:
            TypeError: `codes` is not an int64 tensor.
            ValueError: it does not have three dimensions, or a code is outside [0, codebook_size).
        """
        check_tensor("codes", codes, shape=("B", "h", "w"))
        flat = check_tokens(
            codes.flatten(1), codes.shape[1] * codes.shape[2], self.config.codebook_size, name="codes"
        )
        vectors = F.embedding(flat.reshape(codes.shape), self.codebook)
        return self.decoder(rearrange(vectors, "b h w c -> b c h w")).clamp(0, 1)

    @classmethod
    def read_config(cls, values: dict[str, object]) -> tuple[VQGANConfig, bool]:
        """The configuration, and whether the weights have the official names.

        The official checkpoint has no `config.json`: an empty dict stands for the published configuration.
        """
        if not values:
            return VQGANConfig(), True
        return VQGANConfig.from_dict(values), False

    @staticmethod
    def convert_official(
        weights: Mapping[str, LazyTensor], config: VQGANConfig | None = None
    ) -> dict[str, LazyTensor]:
        """The tensors of an official checkpoint under the names of this model's parameters."""
        return official.vqgan_weights(weights, config)
