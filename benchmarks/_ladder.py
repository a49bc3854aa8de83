"""The ladder: from the official way of computing to our engine, each rung the one before and one change."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import flops
from benchmarks._sides import Models, Side
from benchmarks.baselines.as_published import AsPublished, Upsample, sample_steps
from titok.config import SamplingConfig
from titok.data.images import to_uint8
from titok.inference import memory, onednn
from titok.inference.folded_upsample import fold_upsample_conv, upsample_conv


class FoldedUpsample(nn.Module):
    """`Upsample` without the enlarged map."""

    def __init__(self, plain: Upsample) -> None:
        super().__init__()
        self.folded = fold_upsample_conv(plain.weight, plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.folded)


def channels_last(rival: AsPublished) -> Any:
    """The pixel decoder's weights, and so every map, in channels-last memory."""
    pixel_decoder = rival.decoder.pixel_decoder
    assert pixel_decoder is not None
    return pixel_decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def folded(rival: AsPublished) -> None:
    """That, and upsampling folded into the convolution behind it."""
    for level in channels_last(rival).levels:
        if isinstance(level.upsample, Upsample):
            level.upsample = FoldedUpsample(level.upsample)


_USUAL_TRIM = 2 * memory._LARGEST_HEAP_BLOCK  # where glibc's own adaptation ends


@contextmanager
def without(*switches: str) -> Iterator[None]:
    """titok without weights in oneDNN's layout and the sums fused there ("layouts"), or giving memory back to the
    system after every use ("memory")."""
    with ExitStack() as patches:
        if "layouts" in switches:
            patches.enter_context(mock.patch.object(onednn, "available", return_value=False))
        if (libc := memory._glibc()) is not None and "memory" in switches:
            patches.enter_context(mock.patch.object(memory, "_glibc", return_value=None))
            libc.mallopt(memory._M_TRIM_THRESHOLD, _USUAL_TRIM)
            libc.malloc_trim(_USUAL_TRIM)
        yield


def held_back(side: Side, *switches: str) -> Side:
    """That side, run without."""

    def wrapped(run: Callable[[int], Callable[[], Any]]) -> Callable[[int], Callable[[], Any]]:
        def prepare(batch: int) -> Callable[[], Any]:
            call = run(batch)

            def limited() -> Any:
                with without(*switches):
                    return call()

            return limited

        return prepare

    parts = {name: dataclasses.replace(part, prepare=wrapped(part.prepare)) for name, part in side.parts.items()}
    return dataclasses.replace(side, parts=parts)


def fused_ops(name: str, models: Models) -> Side:
    """Our modules with their ops, in the official loop: two passes, all logits, whole noise tensors, a sort."""
    tokenizer, generator = models.tokenizer, models.generator
    t, g = tokenizer.config, generator.config

    def predict(tokens: Tensor, labels: Tensor, drop: float) -> Tensor:
        return generator(tokens, torch.full_like(labels, generator.no_class) if drop else labels)

    def sample(labels: list[int], sampling: SamplingConfig | None = None, start: Tensor | None = None) -> Tensor:
        where = torch.tensor(labels, device=generator.device)
        return sample_steps(predict, where, g.num_latent_tokens, generator.mask_token, sampling or g.sampling)[-1]

    def decode(tokens: Tensor) -> Tensor:
        return to_uint8(tokenizer.decode(tokens))

    no_grad = torch.no_grad()
    return models.side(
        name,
        no_grad(lambda labels: decode(sample(labels))),
        no_grad(sample),
        no_grad(decode),
        no_grad(tokenizer.decode_logits),
        flops.generate(g, as_written=True).plus(flops.decoder(t)),
        folded=True,
    )


def rungs(preset: str, dtype: torch.dtype, models: Callable[..., Models]) -> dict[str, Callable[[], Side]]:
    """Name -> how to make that side, from the first rung up.

    Args:
        models: (preset, dtype) -> its models.
    """
    table: dict[str, Callable[[], Side]] = {}

    def published(name: str, dtype: torch.dtype = dtype, **ways: Any) -> None:
        table[name] = lambda: models(preset, dtype).published(name, **ways)

    published("eager fp32", torch.float32, attention="math")
    if dtype != torch.float32:
        published("bf16", attention="math")
    published("SDPA: as published")
    published("channels-last", change=channels_last)
    published("folded upsampling", change=folded)

    @functools.cache
    def apart() -> Models:  # what is prepared of their weights differs
        return copy.deepcopy(models(preset, dtype))

    table["fused ops"] = lambda: held_back(fused_ops("fused ops", apart()), "layouts", "memory")
    table["fused decode"] = lambda: held_back(apart().ours("fused decode"), "layouts", "memory")
    table["weights laid out"] = lambda: held_back(models(preset, dtype).ours("weights laid out"), "memory")
    table["titok"] = lambda: models(preset, dtype).ours("titok")
    return table
