"""Confidence-based iterative decoding (MaskGIT, Chang et al. 2022), with the schedules and rules of TiTok.

All tokens start masked. Each of `steps` forward passes predicts every masked token; the most confident are kept, the
rest stay masked; the last pass keeps all. What a step decides is one op, `titok.ops.maskgit_decode_step`.

Noise comes from a counter-based generator keyed by the seed and counted by (sample, step, position), so the tokens of
sample i depend on the seed and i, not on the batch that it is drawn in. (The logits are as invariant as the matrix
products of the machine: where those round differently for another batch size, two codes or two confidences that tie
within rounding may swap.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from titok._validate import check_labels, check_tokens
from titok.config import MaskSchedule, SamplingConfig
from titok.generator import MaskGIT
from titok.ops import maskgit_decode_step


class Trace(NamedTuple):
    """What `sample_tokens(trace=True)` adds: the tokens that enter each step and the result (steps + 1, B, K), and
    the confidences of each step's draws (steps, B, K), +inf where a token was known."""

    tokens: Tensor
    confidences: Tensor


def mask_ratio(schedule: MaskSchedule, ratio: float) -> float:
    """Share of tokens still masked when `ratio` of the steps is done; falls from 1 at 0 to 0 at 1."""
    match schedule:
        case "arccos":
            return math.acos(ratio) / (math.pi / 2)
        case "cosine":
            return math.cos(ratio * math.pi / 2)
        case "linear":
            return 1.0 - ratio
        case "root":
            return 1.0 - math.sqrt(ratio)
        case "square":
            return 1.0 - ratio * ratio


@dataclass(frozen=True)
class Step:
    """The numbers of one decoding step; everything that depends on the schedule and on nothing else."""

    index: int
    mask_ratio: float  # share of the initially masked tokens that stays masked after the step
    guidance: float  # weight w of w * cond + (1 - w) * uncond; 1 needs no unconditional pass
    softmax_temperature: float
    noise_temperature: float
    final: bool

    def num_masked(self, initially: int, now: int) -> int:
        """Tokens of a sample that stay masked after this step: at least one less than now, and at least one until
        the final step, so that every step has something to decide."""
        if self.final or now == 0:
            return 0
        return max(1, min(now - 1, math.floor(initially * self.mask_ratio)))


def guidance_weight(config: SamplingConfig, step: int) -> float:
    """Weight of the conditional logits in step `step` of `config.steps`."""
    progress = step / config.steps
    match config.guidance_schedule:
        case "constant":
            return 1.0 + config.guidance_scale
        case "linear":
            return 1.0 + config.guidance_scale * progress
        case "power-cosine":
            swing = (1.0 - math.cos(math.pi * progress**config.guidance_power)) / 2.0
            return 1.0 + (config.guidance_scale - 1.0) * swing


def schedule(config: SamplingConfig) -> Iterator[Step]:
    """The steps of `config`, first to last."""
    for index in range(config.steps):
        ratio = (index + 1) / config.steps
        yield Step(
            index=index,
            mask_ratio=mask_ratio(config.mask_schedule, ratio),
            guidance=guidance_weight(config, index),
            softmax_temperature=0.5 + 0.8 * (1.0 - ratio) if config.softmax_annealing else 1.0,
            noise_temperature=config.temperature * (1.0 - ratio),
            final=index == config.steps - 1,
        )


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
    sampling = sampling or generator.config.sampling
    length, mask_token, device = generator.config.num_latent_tokens, generator.mask_token, generator.device
    if not isinstance(labels, Tensor):
        labels = torch.tensor(labels, dtype=torch.int64)
    check_labels(labels, generator.config.num_classes)
    for name, value, bits in (("seed", seed, 64), ("first_sample", first_sample, 63)):
        if not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected an int in [0, 2^{bits}), got {value!r}")
    labels = labels.to(device)
    if init_tokens is None:
        tokens = torch.full((len(labels), length), mask_token, device=device)
        initially = [length] * len(labels)
    else:
        check_tokens(init_tokens, length, mask_token + 1)
        if len(init_tokens) != len(labels):
            raise ValueError(
                f"init_tokens: expected {len(labels)} rows, one for each label, got {len(init_tokens)}"
            )
        tokens = init_tokens.to(device, copy=True)
        initially = (tokens == mask_token).sum(dim=1).tolist()

    was_training = generator.training
    generator.eval()
    try:
        return _decode(generator, labels, sampling, tokens, initially, seed, first_sample, trace)
    finally:
        generator.train(was_training)


def _decode(
    generator: MaskGIT,
    labels: Tensor,
    sampling: SamplingConfig,
    tokens: Tensor,
    initially: list[int],
    seed: int,
    first_sample: int,
    trace: bool,
) -> Tensor | tuple[Tensor, Trace]:
    now = list(initially)  # masked tokens of each sample: known on the host without asking the device
    history, confidences = [tokens], []
    for step in schedule(sampling):
        after = [step.num_masked(first, left) for first, left in zip(initially, now, strict=True)]
        if after == now and not trace:
            continue  # with more steps than tokens: it would draw one token and mask it again
        guided = step.guidance != 1.0
        cond, uncond, rows, uncond_rows = _logits(generator, tokens, labels, now, guided)
        uniform = len(set(after)) <= 1
        result = maskgit_decode_step(
            tokens,
            cond,
            uncond,
            step=step.index,
            steps=sampling.steps,
            num_masked=(after[0] if after else 0) if uniform else torch.tensor(after, device=tokens.device),
            mask_token=generator.mask_token,
            guidance=step.guidance,
            softmax_temperature=step.softmax_temperature,
            noise_temperature=step.noise_temperature,
            confidence=sampling.confidence,
            seed=seed,
            first_sample=first_sample,
            final=step.final,
            rows=rows,
            uncond_rows=uncond_rows,
            return_confidence=trace,
        )
        if trace:
            tokens, confidence = result
            history.append(tokens)
            confidences.append(confidence)
        else:
            assert isinstance(result, Tensor)
            tokens = result
        now = after
    return (tokens, Trace(torch.stack(history), torch.stack(confidences))) if trace else tokens


def _logits(
    generator: MaskGIT, tokens: Tensor, labels: Tensor, now: list[int], guided: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Logits of the masked positions alone, and the rows (B, K) in which the step finds them.

    Exact savings, no approximations: the head runs at masked positions only; both passes are one batch; where all
    is masked (the first step), samples of one class share their logits and all share the unconditional ones.

    Args:
        now: how many positions of each sample are masked.

    Returns:
        cond (R, V), uncond (R', V) or None, rows of cond, rows of uncond or None.
    """
    batch, length = tokens.shape
    most = max(now, default=0)
    # Masked positions first, in order; samples with fewer than `most` are padded with known ones, which no row names.
    order = (tokens != generator.mask_token).to(torch.int8).argsort(dim=1, stable=True)
    positions = order[:, :most]
    slots = order.argsort(dim=1)  # where each position stands in that order

    inputs, classes = tokens, labels
    cond_of = uncond_of = torch.arange(batch, device=tokens.device)  # the forward pass that serves each sample
    if all_masked := min(now, default=0) == length:
        classes, cond_of = labels.unique(return_inverse=True)
        uncond_of = torch.zeros_like(cond_of)
        inputs = tokens[: len(classes)]
    split = len(inputs) * most
    if guided:
        free = inputs[:1] if all_masked else inputs
        inputs = torch.cat([inputs, free])
        classes = torch.cat([classes, classes.new_full((len(free),), generator.no_class)])
        positions = torch.cat([positions[: len(inputs) - len(free)], positions[: len(free)]])
    else:
        positions = positions[: len(inputs)]
    features = generator.features(inputs, classes)
    picked = features.gather(1, positions[:, :, None].expand(-1, -1, features.shape[-1]))
    logits = generator.lm_head(picked).flatten(0, 1)
    rows = cond_of[:, None] * most + slots
    if not guided:
        return logits, None, rows, None
    return logits[:split], logits[split:], rows, uncond_of[:, None] * most + slots
