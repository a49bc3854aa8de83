"""TiTok's generation as the official code computes it, written anew: what titok's own way is measured against.

It runs in three ways: float32; native bfloat16 (weights and activations); autocast (float32 weights, bfloat16
products). It uses nothing of `titok` but the numbers of the sampling schedule. Its results are tested against
golden data of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.baselines.published_decoder import PublishedDecoder
from benchmarks.baselines.published_generator import PublishedGenerator
from titok import MaskGIT, TiTok
from titok.config import SamplingConfig


class AsPublished:
    """`AsPublished(tokenizer, generator)(labels)` -> uint8 pictures (B, H, W, 3) on the CPU.

    Noise comes from PyTorch's global generator.

    Args:
        tokenizer, generator: whose weights are used; contiguous weights of the right dtype are shared.
        dtype: of the weights; None keeps that of the models.
        autocast: run float32 weights under `torch.autocast` to bfloat16.
        attention: "math" stores scores and probabilities, as PyTorch did before 2.0.

    Raises:
        ValueError: the official code cannot generate with this configuration.
    """

    def __init__(
        self,
        tokenizer: TiTok,
        generator: MaskGIT,
        *,
        dtype: torch.dtype | None = None,
        autocast: bool = False,
        attention: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        self.decoder = PublishedDecoder.of(tokenizer, dtype)
        self.generator = PublishedGenerator.of(generator, dtype)
        self.device, self.autocast, self.attention = generator.device, autocast, attention

    def __call__(self, labels: Sequence[int]) -> Tensor:
        return self.pictures(self.logits(self.sample(labels)))

    def sample(self, labels: Sequence[int], sampling: SamplingConfig | None = None) -> Tensor:
        """labels (B) -> tokens (B, K) int64; `sampling` None takes the generator's own settings."""
        with self._context():
            return self.generator.sample(torch.tensor(labels, device=self.device), sampling)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) -> logits over the proxy's codes (B, codes, h, w)."""
        with self._context():
            return self.decoder.logits(tokens)

    def pixels(self, logits: Tensor) -> Tensor:
        """logits (B, codes, h, w) -> images (B, 3, H, W), not clamped."""
        with self._context():
            return self.decoder.pixels(logits)

    def pictures(self, logits: Tensor) -> Tensor:
        """logits (B, codes, h, w) -> uint8 (B, H, W, 3) on the CPU, truncated as in the published script."""
        return (255.0 * self.pixels(logits).clamp(0.0, 1.0)).permute(0, 2, 3, 1).to("cpu", torch.uint8)

    def _context(self) -> ExitStack:
        context = ExitStack()
        context.enter_context(torch.no_grad())
        context.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast))
        if self.attention == "math":
            context.enter_context(sdpa_kernel(SDPBackend.MATH))
        return context
