"""Confidence-based iterative decoding (MaskGIT, Chang et al. 2022), with the schedules and rules of TiTok.

All tokens start masked. Each of `steps` forward passes predicts every masked token; the most confident are kept, the
rest stay masked; the last pass keeps all. What a step decides is one op, `titok.ops.maskgit_decode_step`.

Noise comes from a counter-based generator keyed by the seed and counted by (sample, step, position), so the tokens of
sample i depend on the seed and i, not on the batch that it is drawn in. (The logits are as invariant as the matrix
products of the machine: where those round differently for another batch size, two codes or two confidences that tie
within rounding may swap.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from titok.checks import check_tokens, labels_on_host
from titok.config import SamplingConfig
from titok.generation.decode_loop import Batch, Trace, decode, decode_captured
from titok.inference.memory import memory_that_stays
from titok.inference.prepared import float32_copy, uses_prepared_weights
from titok.models.generator import MaskGIT
from titok.profiling import ranged


@overload
def sample_tokens(
    generator: MaskGIT,
    labels: Tensor | Sequence[int],
    sampling: SamplingConfig | None = ...,
    *,
    seed: int = ...,
    first_sample: int = ...,
    init_tokens: Tensor | None = ...,
    trace: Literal[False] = ...,
) -> Tensor: ...


@overload
def sample_tokens(
    generator: MaskGIT,
    labels: Tensor | Sequence[int],
    sampling: SamplingConfig | None = ...,
    *,
    seed: int = ...,
    first_sample: int = ...,
    init_tokens: Tensor | None = ...,
    trace: Literal[True],
) -> tuple[Tensor, Trace]: ...


@torch.no_grad()
@ranged("sample tokens")
def sample_tokens(
    generator: MaskGIT,
    labels: Tensor | Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    first_sample: int = 0,
    init_tokens: Tensor | None = None,
    trace: bool = False,
) -> Tensor | tuple[Tensor, Trace]:
    """Draws one token sequence for each label.

    Args:
        labels: (B,) int64 classes in [0, num_classes); `generator.no_class` samples without a class.
        sampling: None takes `generator.config.sampling`.
        seed: in [0, 2^64).
        first_sample: index of the first sample, so that a long run can be cut into batches: the samples of
            `first_sample=8` are those at 8, 9, ... of one large batch.
        init_tokens: (B, K) int64 to start from: known codes stay, `generator.mask_token` is filled in.
        trace: also return the tokens and confidences of every step.

    Returns:
        (B, K) int64 tokens on the generator's device, and with `trace` a `Trace`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, class, id, seed or first sample, naming the argument.
    """
    labels = as_labels(generator, labels, seed, first_sample)
    sampling = sampling or generator.config.sampling
    if init_tokens is not None:
        check_tokens(init_tokens, generator.config.num_latent_tokens, generator.mask_token + 1)
        if len(init_tokens) != len(labels):
            raise ValueError(
                f"init_tokens: expected {len(labels)} rows, one for each label, got {len(init_tokens)}"
            )

    with evaluating(generator), memory_that_stays():
        generator = float32_copy(generator)
        if captures(generator, labels) and init_tokens is None and not trace:
            return decode_captured(generator, sampling, labels, seed, first_sample)
        batch = Batch.prepare(generator, sampling, labels, seed, first_sample, init_tokens)
        history: list[tuple[Tensor, Tensor]] | None = [] if trace else None
        tokens = decode(generator, sampling, batch, history)
    if history is None:
        return tokens
    confidences = [confidence for _, confidence in history]
    return tokens, Trace(torch.stack([batch.tokens, *(t for t, _ in history)]), torch.stack(confidences))


def as_labels(generator: MaskGIT, labels: Tensor | Sequence[int], seed: int, first_sample: int) -> Tensor:
    """Labels (B,) on the host, where their distinct values decide the shape of the first step. Checks all three."""
    host = labels_on_host(labels, generator.config.num_classes)
    for name, value, bits in (("seed", seed, 64), ("first_sample", first_sample, 63)):
        if not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected an int in [0, 2^{bits}), got {value!r}")
    return host


def captures(generator: MaskGIT, labels: Tensor) -> bool:
    """Whether samples of these labels are drawn by CUDA graphs."""
    return generator.device.type == "cuda" and len(labels) > 0 and uses_prepared_weights()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode within."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
