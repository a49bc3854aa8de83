"""The ladder: from the official way of computing to titok's, each rung being the one before with one change.

No rung changes how the process allocates memory. The last one computes its feature maps in a workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.as_published import AsPublished
from benchmarks.baselines.published_decoder import PixelDecoder, Upsample
from benchmarks.baselines.published_generator import sample_steps
from benchmarks.harness import flops
from benchmarks.harness.models import Models, Way
from benchmarks.harness.sides import Side
from titok.config import SamplingConfig
from titok.data.images import to_uint8
from titok.inference.folded_upsample import fold_upsample_conv, upsample_conv


class FoldedUpsample(nn.Module):
    """`Upsample` as four 2x2 convolutions of the small map; the enlarged map is never stored."""

    def __init__(self, plain: Upsample) -> None:
        super().__init__()
        self.folded = fold_upsample_conv(plain.weight, plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.folded)


def channels_last(rival: AsPublished) -> PixelDecoder:
    """Puts the pixel decoder's weights, and so every feature map, into channels-last memory."""
    pixel_decoder = rival.decoder.pixel_decoder
    if pixel_decoder is None:
        raise ValueError("tokenizer: expected one with a pixel decoder")
    return pixel_decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def folded(rival: AsPublished) -> None:
    """Channels-last memory, and upsampling folded into the convolution after it."""
    for level in channels_last(rival).levels:
        if isinstance(level.upsample, Upsample):
            level.upsample = FoldedUpsample(level.upsample)


def fused_ops(name: str, models: Models) -> Side:
    """titok's modules and ops in the official loop: two passes, all logits, noise for every code, a sort."""
    tokenizer, generator = models.tokenizer, models.generator
    t, g = tokenizer.config, generator.config

    def predict(tokens: Tensor, labels: Tensor, drop: float) -> Tensor:
        return generator(tokens, torch.full_like(labels, generator.no_class) if drop else labels)

    @torch.no_grad()
    def sample(
        labels: list[int], seed: int, sampling: SamplingConfig | None = None, start: Tensor | None = None
    ) -> Tensor:
        torch.manual_seed(seed)
        where = torch.tensor(labels, device=generator.device)
        return sample_steps(predict, where, g.num_latent_tokens, generator.mask_token, sampling or g.sampling)[-1]

    @torch.no_grad()
    def decode(tokens: Tensor) -> Tensor:
        return to_uint8(tokenizer.decode(tokens))

    return models.side(
        name,
        Way(
            lambda labels, seed: decode(sample(labels, seed)),
            sample,
            decode,
            torch.no_grad()(tokenizer.decode_logits),
        ),
        flops.generate(g, as_written=True).plus(flops.decoder(t)),
    )


def rungs(preset: str, dtype: torch.dtype, models: Callable[..., Models]) -> dict[str, Callable[[], Side]]:
    """Name -> a function that makes that side, from the first rung up.

    Args:
        models: (preset, dtype) -> its models.
    """

    def published(name: str, dtype: torch.dtype = dtype, **ways: Any) -> Callable[[], Side]:
        return lambda: models(preset, dtype).published(name, **ways)

    table: dict[str, Callable[[], Side]] = {"eager fp32": published("eager fp32", torch.float32, attention="math")}
    if dtype != torch.float32:
        table["bf16"] = published("bf16", attention="math")
    table["SDPA: as published"] = published("SDPA: as published")
    table["channels-last"] = published("channels-last", change=channels_last)
    table["folded upsampling"] = published("folded upsampling", change=folded)

    return table | {
        "fused ops": lambda: fused_ops("fused ops", models(preset, dtype)),
        "fused decode": lambda: models(preset, dtype).ours("fused decode", prepare=False),
        "prepared weights: titok": lambda: models(preset, dtype).ours("prepared weights: titok"),
    }
