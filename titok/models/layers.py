"""Linear, norm and convolution layers with the parameters of PyTorch's own, computed faster once they are prepared.

An ordinary layer computes from its weights what PyTorch's layer computes. Where the model was prepared for inference
(`titok.inference.prepared`), it computes from a prepared form of them; docs/performance.md says what that gains. Where
a prepared layer cannot do so (plain mode, autocast, a gradient with respect to its input), it computes from the
original weights, which it restores for the call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints.quirks import fold_shortcut_of_result, shortcut_of_result
from titok.inference import cudnn, fused_linear, int8, onednn
from titok.inference.folded_upsample import FoldedUpsampleConv, fold_upsample_conv, upsample_conv
from titok.inference.prepared import PreparableLayer
from titok.inference.prepared_weights import prepared_form, prepared_with, readable, replace_weights
from titok.models.conv_gradient import conv3x3
from titok.ops import layer_norm

# Number of values in a weight below which calling oneDNN's op costs more than the packed layout saves.
_MIN_PACKED_SIZE = 1 << 17


class Linear(nn.Linear, PreparableLayer):
    """nn.Linear, optionally followed by the exact (erf) GELU."""

    prepared_alone = True

    def prepare_weights(self) -> None:
        weight = self.weight
        if weight.numel() >= _MIN_PACKED_SIZE and onednn.packs(weight):
            dtype = weight.dtype
            replace_weights(
                [weight], lambda: onednn.pack_linear(weight), lambda packed, _: onednn.unpack(packed, dtype)
            )

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x (..., inputs) -> (..., outputs), with the GELU of it when `gelu` is set."""
        prepared = prepared_form(self.weight, x)
        if isinstance(prepared, int8.Int8Weight):
            return int8.linear(x, prepared, self.bias, gelu)
        if prepared is not None:
            return onednn.packed_linear(x, prepared, self.bias, gelu)
        weight = readable(self.weight)
        fused = fused_linear.gelu(x, weight, self.bias) if gelu else None
        if fused is not None:
            return fused
        y = F.linear(x, weight, self.bias)
        return fused_linear.gelu_of(y) if gelu else y

    def add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor] | None:
        """self(x) + residual and the norm of it, where one launch computes them; otherwise None.

        x (..., inputs), residual (..., outputs) -> two tensors (..., outputs).
        """
        if not fused_linear.is_counting():  # before the weight is read, which restores a prepared one
            return None
        parameters = (norm.weight, norm.bias, norm.eps)
        return fused_linear.add_norm(x, readable(self.weight), self.bias, residual, *parameters)


class BlockLinear(Linear):
    """A linear layer of a transformer block, which can be quantised to 8 bits."""

    def weight_to_quantize(self) -> Tensor | None:
        return self.weight if int8.takes(self.weight) else None

    def quantize_weights(self) -> None:
        if self.weight_to_quantize() is not None:
            weight = self.weight
            replace_weights([weight], lambda: int8.quantize(weight), lossy=True)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, computed by `titok.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        return layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(nn.Embedding):
    """nn.Embedding, which draws no weights on the meta device.

    Models whose weights are loaded are made there first. Drawing normally distributed numbers on it, and arithmetic,
    would import PyTorch's compiler, which takes 0.9 s and 80 MB.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution, whose weight may be prepared together with that of a `Conv3x3`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, O, H, W)"""
        return F.conv2d(x, readable(self.weight), self.bias)


class Conv3x3(nn.Conv2d, PreparableLayer):
    """A 3x3 convolution with padding 1, and a sum with its result that inference fuses into it.

    Args:
        size: height and width of the maps that the layer is prepared for; it convolves maps of any size.
        takes_shortcut: every call of `forward` passes the same `shortcut`. Then the layer is prepared together with
            it, by whoever owns both.
    """

    size: tuple[int, int]
    takes_shortcut: bool

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, size: tuple[int, int], takes_shortcut: bool = False
    ) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)
        self.size, self.takes_shortcut = size, takes_shortcut

    def prepare_weights(self, shortcut: Conv1x1 | None = None) -> None:
        """Prepares the weight, or with `shortcut` both weights as the one of a folded convolution."""
        if self.takes_shortcut and shortcut is None:
            return
        weight = self.weight
        pack = onednn.packs(weight)
        if shortcut is not None:
            folds = (weight, shortcut.weight)

            def fold() -> Tensor:
                folded = fold_shortcut_of_result(weight.detach(), shortcut.weight.detach())
                if cudnn.is_used(folded):
                    return cudnn.lay_out(folded)
                return onednn.pack_conv(folded, self.size) if pack else folded

            replace_weights(folds, fold)
        elif cudnn.is_used(weight):
            outputs = self.out_channels
            replace_weights([weight], lambda: cudnn.lay_out(weight), lambda laid, _: cudnn.restore(laid, outputs))
        elif pack:
            dtype = weight.dtype
            replace_weights(
                [weight],
                lambda: onednn.pack_conv(weight, self.size),
                lambda packed, _: onednn.unpack(packed, dtype),
            )

    def forward(self, x: Tensor, add: Tensor | None = None, shortcut: Conv1x1 | None = None) -> Tensor:
        """y = conv(x); returns y + add, or y + shortcut(y), or y.

        Args:
            x: (B, C, H, W).
            add: (B, O, H, W), only without `shortcut`.
            shortcut: a 1x1 convolution from O to O channels, only for a convolution without bias, and without bias
                itself: then inference folds both into one 3x3 convolution. See `titok.checkpoints.quirks`.

        Returns:
            (B, O, H, W).
        """
        prepared = prepared_form(self.weight, x)
        if prepared is not None and self.is_prepared_with(shortcut):
            if not cudnn.is_used(x):
                return onednn.conv(x, prepared, self.bias, add)
            y = cudnn.conv(x, prepared, self.bias, self.out_channels)
            return y if add is None else y + add
        y = conv3x3(x, readable(self.weight), self.bias)
        if shortcut is not None:
            return shortcut_of_result(y, shortcut)
        return y if add is None else y + add

    def is_prepared_with(self, shortcut: Conv1x1 | None) -> bool:
        """Whether the prepared weight is that of a folded convolution with `shortcut`; None always fits."""
        return shortcut is None or prepared_with(shortcut.weight) is prepared_with(self.weight)


class UpsampleConv(nn.Conv2d, PreparableLayer):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution with padding 1.

    Inference computes both as four 2x2 convolutions of the small map: `titok.inference.folded_upsample`.

    Args:
        size: height and width of the small maps that the layer is prepared for; it takes maps of any size.
    """

    def __init__(self, channels: int, *, size: tuple[int, int]) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.size = size

    def prepare_weights(self) -> None:
        weight = self.weight

        def fold() -> FoldedUpsampleConv:
            folded = fold_upsample_conv(weight.detach())
            if cudnn.is_used(weight):
                laid_out = [row.contiguous(memory_format=torch.channels_last) for row in folded.weight]
                return folded._replace(weight=tuple(laid_out))
            if not onednn.packs(weight):
                return folded
            return folded._replace(weight=tuple(onednn.pack_conv(row, self.size) for row in folded.weight))

        replace_weights([weight], fold)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)"""
        folded = prepared_form(self.weight, x)
        if folded is not None:
            return upsample_conv(x, folded._replace(bias=self.bias))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return conv3x3(x, readable(self.weight), self.bias)
