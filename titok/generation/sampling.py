"""Confidence-based iterative decoding of MaskGIT (Chang et al. 2022), with TiTok's schedules (Yu et al. 2024).

All tokens start masked. Each of `steps` forward passes predicts every masked token and keeps the most confident
predictions; the others stay masked. The last pass keeps all. What a step decides is one op,
`titok.ops.maskgit_decode_step`.

The noise comes from a counter-based generator, keyed by the seed and counted by (sample, step, position). So the
tokens of sample i depend on the seed and on i, not on the batch that it is drawn in. This holds as far as the
logits do not depend on the batch either: where the matrix products of a machine round differently for another
batch size, two codes or two confidences that are equal within rounding may change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from titok.checks import check_bool, check_tokens
from titok.config import GeneratorConfig, SamplingConfig
from titok.generation.captured import decode_captured, is_captured
from titok.generation.decode_loop import DecodeBatch, decode, decode_steps
from titok.generation.request import GenerationRequest
from titok.models.generator import MaskGIT
from titok.profiling import ranged


class Trace(NamedTuple):
    """What `sample_tokens(trace=True)` adds to the tokens.

    Attributes:
        tokens: (steps + 1, B, K) int64, the tokens that enter each step, then the result.
        confidences: (steps, B, K) float32 of each step's draws, +inf where the token was decided before.
    """

    tokens: Tensor
    confidences: Tensor


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


@overload
def sample_tokens(
    generator: MaskGIT,
    labels: Tensor | Sequence[int],
    sampling: SamplingConfig | None = ...,
    *,
    seed: int = ...,
    first_sample: int = ...,
    init_tokens: Tensor | None = ...,
    trace: bool,
) -> Tensor | tuple[Tensor, Trace]: ...


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
    """Draws one token sequence for each label. Dropout is off, whether the generator is in training mode or not.

    Args:
        labels: (B,) classes in [0, num_classes), a tensor of any integer dtype or a sequence of integers;
            `generator.no_class` samples without a class.
        sampling: None takes `generator.config.sampling`.
        seed: in [0, 2^64).
        first_sample: index of the first sample, in [0, 2^63), so that a long run can be cut into batches: the
            samples of `first_sample=8` are the samples 8, 9, ... of one large batch.
        init_tokens: (B, K), of any integer dtype, to start from: codes stay, `generator.mask_token` is filled
            in. None masks all. How many tokens a step decides in a sample follows from the number of masked tokens
            that this sample starts with.
        trace: also return the tokens and confidences of every step.

    Returns:
        (B, K) int64 tokens on the generator's device, and with `trace` a `Trace`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value; it is named.
    """
    check_bool("trace", trace)
    request, init_tokens = _checked(generator, labels, sampling, seed, first_sample, init_tokens)
    if init_tokens is None and not trace:
        return draw_tokens(generator, request)
    batch = DecodeBatch.prepare(generator, request, init_tokens)
    if not trace:
        return decode(generator, request.sampling, batch)
    history = list(decode_steps(generator, request.sampling, batch, all_steps=True))
    entering = [batch.tokens, *(result.tokens for result in history)]
    return entering[-1], Trace(torch.stack(entering), torch.stack([result.confidences for result in history]))


def sample_steps(
    generator: MaskGIT,
    labels: Tensor | Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    first_sample: int = 0,
    init_tokens: Tensor | None = None,
) -> Iterator[Tensor]:
    """Draws the tokens of `sample_tokens`, and yields those of each step as soon as the step is done.

    A step runs when its tokens are asked for, so that a caller can show them before the next one.

    Args:
        generator, labels, sampling, seed, first_sample, init_tokens: those of `sample_tokens`.

    Yields:
        (B, K) int64 tokens on the generator's device, `generator.mask_token` where a token is still masked: first
        those that the first step starts from, then those after each of the `sampling.steps` steps. The last ones are
        the result of `sample_tokens`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value; it is named. This is found at the
            call, before any step.
    """
    request, init_tokens = _checked(generator, labels, sampling, seed, first_sample, init_tokens)
    return _steps(generator, request, init_tokens)


@torch.no_grad()
def _steps(generator: MaskGIT, request: GenerationRequest, init_tokens: Tensor | None) -> Iterator[Tensor]:
    batch = DecodeBatch.prepare(generator, request, init_tokens)
    yield batch.tokens
    for result in decode_steps(generator, request.sampling, batch, all_steps=True):
        yield result.tokens


def _checked(
    generator: MaskGIT,
    labels: Tensor | Sequence[int],
    sampling: SamplingConfig | None,
    seed: int,
    first_sample: int,
    init_tokens: Tensor | None,
) -> tuple[GenerationRequest, Tensor | None]:
    """The request, and the tokens (B, K) to start from; None where all of them are masked."""
    config = getattr(generator, "config", None)
    if not isinstance(config, GeneratorConfig):  # what torch.compile makes of a generator has its attributes
        raise TypeError(f"generator: expected a MaskGIT, got {type(generator).__name__}")
    request = GenerationRequest.checked(config, labels, seed=seed, first_sample=first_sample, sampling=sampling)
    if init_tokens is None:
        return request, None
    init_tokens = check_tokens(init_tokens, config.num_latent_tokens, generator.mask_token + 1, name="init_tokens")
    if len(init_tokens) != len(request):
        raise ValueError(f"init_tokens: expected {len(request)} rows, one for each label, got {len(init_tokens)}")
    # With all of them masked, the same samples are computed as without `init_tokens`: on a GPU by a captured graph.
    return request, None if bool((init_tokens == generator.mask_token).all()) else init_tokens


def draw_tokens(generator: MaskGIT, request: GenerationRequest) -> Tensor:
    """The tokens (B, K) int64 of a request, all of them masked at the start."""
    if is_captured(generator, request):
        return decode_captured(generator, request, generator.graphs)
    return decode(generator, request.sampling, DecodeBatch.prepare(generator, request))
