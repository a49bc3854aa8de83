"""Linear, norm and convolution layers: PyTorch's own, with the same parameters, that infer from prepared weights.

See `titok.engine` for when, and docs/performance.md for what it gives.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints import official
from titok.inference import onednn
from titok.inference.folded_upsample import FoldedUpsampleConv, fold_upsample_conv, upsample_conv
from titok.inference.prepared import PreparedWeight, uses_prepared_weights
from titok.ops import layer_norm

_SMALL = 1 << 17  # weights; below, oneDNN's op costs more than its layout saves


class Linear(nn.Linear):
    """nn.Linear, with an exact (erf) GELU behind it where `forward` is asked for one."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self._packed: PreparedWeight[Tensor] = PreparedWeight()

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x (..., inputs) -> (..., outputs)"""
        if (
            self.weight.numel() >= _SMALL
            and uses_prepared_weights()
            and x.dtype == self.weight.dtype
            and onednn.available(x)
        ):
            packed = self._packed.get(lambda: onednn.pack_linear(self.weight), self.weight)
            return onednn.packed_linear(x, packed, self.bias, gelu)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by `titok.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by 1, and what is added to its result."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)
        self._prepared: PreparedWeight[Tensor] = PreparedWeight()

    def forward(self, x: Tensor, add: Tensor | None = None, shortcut: nn.Conv2d | None = None) -> Tensor:
        """y = conv(x), then y + add, or y + shortcut(y): x (B, C, H, W), add and the result (B, O, H, W).

        `shortcut` is a 1x1 convolution without bias, which leaves one 3x3 convolution: (1 + shortcut) of its weight.
        """
        pack = uses_prepared_weights() and x.dtype == self.weight.dtype and onednn.available(x)
        if not pack and (shortcut is None or not uses_prepared_weights()):
            y = super().forward(x)
            y = y if shortcut is None else official.shortcut_of_result(y, shortcut)
            return y if add is None else y + add

        def prepare() -> Tensor:
            weight = self.weight.detach()
            if shortcut is not None:
                weight = official.fold_shortcut_of_result(weight, shortcut.weight.detach())
            return onednn.pack_conv(weight, x) if pack else weight

        sources = (self.weight, None if shortcut is None else shortcut.weight)
        return onednn.conv(x, self._prepared.get(prepare, *sources, key=pack), self.bias, add)


class UpsampleConv(nn.Conv2d):
    """Nearest-neighbour x2, then a 3x3 convolution: in inference as four 2x2 convolutions of the small map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self._folded: PreparedWeight[FoldedUpsampleConv] = PreparedWeight()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)"""
        if not uses_prepared_weights():
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        pack = x.dtype == self.weight.dtype and onednn.available(x)

        def prepare() -> FoldedUpsampleConv:
            folded = fold_upsample_conv(self.weight.detach(), self.bias)
            if not pack:
                return folded
            return folded._replace(weight=tuple(onednn.pack_conv(w, x) for w in folded.weight))

        return upsample_conv(x, self._folded.get(prepare, self.weight, self.bias, key=pack))
