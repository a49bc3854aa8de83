"""Linear, norm and convolution layers with the parameters of PyTorch's own, computed faster in inference.

Where `titok.inference.prepared.uses_prepared_weights` is true, they compute from weights that were laid out or
folded once. Everywhere else (training, plain mode, torch.compile, autocast) they compute what PyTorch's layers
compute. docs/performance.md says what that gains.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints.quirks import fold_shortcut_of_result, shortcut_of_result
from titok.inference import onednn
from titok.inference.folded_upsample import FoldedUpsampleConv, fold_upsample_conv, upsample_conv
from titok.inference.prepared import PreparedWeight, uses_prepared_weights
from titok.ops import layer_norm

# Number of values in a weight below which calling oneDNN's op costs more than the packed layout saves.
_MIN_PACKED_SIZE = 1 << 17


class Linear(nn.Linear):
    """nn.Linear, optionally followed by the exact (erf) GELU."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self._packed: PreparedWeight[Tensor] = PreparedWeight()

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x (..., inputs) -> (..., outputs), with the GELU of it when `gelu` is set."""
        if (
            self.weight.numel() >= _MIN_PACKED_SIZE
            and uses_prepared_weights()
            and x.dtype == self.weight.dtype
            and onednn.available(x)
        ):
            packed = self._packed.get(lambda: onednn.pack_linear(self.weight), self.weight)
            return onednn.packed_linear(x, packed, self.bias, gelu)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, computed by `titok.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        return layer_norm(x, self.weight, self.bias, self.eps)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1, and a sum with its result that inference fuses into it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)
        self._prepared: PreparedWeight[Tensor] = PreparedWeight()

    def forward(self, x: Tensor, add: Tensor | None = None, shortcut: nn.Conv2d | None = None) -> Tensor:
        """y = conv(x); returns y + add, or y + shortcut(y), or y.

        Args:
            x: (B, C, H, W).
            add: (B, O, H, W), only without `shortcut`.
            shortcut: a 1x1 convolution from O to O channels, only for a convolution without bias, and without bias
                itself: then inference folds both into one 3x3 convolution. See `titok.checkpoints.quirks`.

        Returns:
            (B, O, H, W).
        """
        prepared = uses_prepared_weights()
        pack = prepared and x.dtype == self.weight.dtype and onednn.available(x)
        if not pack and not (prepared and shortcut is not None):
            y = super().forward(x)
            if shortcut is not None:
                return shortcut_of_result(y, shortcut)
            return y if add is None else y + add

        def prepare() -> Tensor:
            weight = self.weight.detach()
            if shortcut is not None:
                weight = fold_shortcut_of_result(weight, shortcut.weight.detach())
            return onednn.pack_conv(weight, x) if pack else weight

        sources = (self.weight, None if shortcut is None else shortcut.weight)
        return onednn.conv(x, self._prepared.get(prepare, *sources, key=pack), self.bias, add)


class UpsampleConv(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution with padding 1.

    Inference computes both as four 2x2 convolutions of the small map: `titok.inference.folded_upsample`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self._folded: PreparedWeight[FoldedUpsampleConv] = PreparedWeight()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)"""
        if not uses_prepared_weights():
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        pack = x.dtype == self.weight.dtype and onednn.available(x)

        def prepare() -> FoldedUpsampleConv:
            folded = fold_upsample_conv(self.weight.detach(), self.bias)
            if not pack:
                return folded
            return folded._replace(weight=tuple(onednn.pack_conv(w, x) for w in folded.weight))

        return upsample_conv(x, self._folded.get(prepare, self.weight, self.bias, key=pack))
