"""What a decoding step does, as numbers: how many tokens stay masked, guidance, temperatures. No tensors here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from titok.config import MaskSchedule, SamplingConfig


def mask_ratio(schedule: MaskSchedule, progress: float) -> float:
    """The share of tokens that is still masked when the share `progress` of the steps is done (Chang et al. 2022).

    It falls from 1 at progress 0 to 0 at progress 1.
    """
    match schedule:
        case "arccos":
            return math.acos(progress) / (math.pi / 2)
        case "cosine":
            return math.cos(progress * math.pi / 2)
        case "linear":
            return 1.0 - progress
        case "root":
            return 1.0 - math.sqrt(progress)
        case "square":
            return 1.0 - progress * progress


@dataclass(frozen=True)
class Step:
    """One decoding step: everything about it that follows from the configuration alone.

    Attributes:
        index: 0 for the first step.
        mask_ratio: share of the tokens masked at the start that stays masked after this step.
        guidance: weight w of the logits w * cond + (1 - w) * uncond. A weight of 1 needs no unconditional pass.
        softmax_temperature: divides the logits.
        noise_temperature: scale of the Gumbel noise.
        final: no token stays masked.
    """

    index: int
    mask_ratio: float
    guidance: float
    softmax_temperature: float
    noise_temperature: float
    final: bool

    def num_masked(self, at_start: int, before: int) -> int:
        """How many tokens of a sample stay masked after this step.

        It is floor(at_start * mask_ratio), except that every step decides at least one token and that every step
        before the final one leaves at least one masked.

        Args:
            at_start: tokens that were masked before the first step.
            before: tokens that are masked before this step.
        """
        if self.final or before == 0:
            return 0
        return max(1, min(before - 1, math.floor(at_start * self.mask_ratio)))


def guidance_weight(config: SamplingConfig, step: int) -> float:
    """The weight w of the logits w * cond + (1 - w) * uncond in step `step` (from 0); see `SamplingConfig`."""
    progress = step / config.steps
    match config.guidance_schedule:
        case "constant":
            return 1.0 + config.guidance_scale
        case "linear":
            return 1.0 + config.guidance_scale * progress
        case "power-cosine":
            rise = (1.0 - math.cos(math.pi * progress**config.guidance_power)) / 2.0
            return 1.0 + (config.guidance_scale - 1.0) * rise


def schedule(config: SamplingConfig) -> Iterator[Step]:
    """The steps of `config`, first to last."""
    for index in range(config.steps):
        progress = (index + 1) / config.steps
        yield Step(
            index=index,
            mask_ratio=mask_ratio(config.mask_schedule, progress),
            guidance=guidance_weight(config, index),
            softmax_temperature=0.5 + 0.8 * (1.0 - progress) if config.softmax_annealing else 1.0,
            noise_temperature=config.temperature * (1.0 - progress),
            final=index == config.steps - 1,
        )


def masked_counts(config: SamplingConfig, at_start: int) -> list[int]:
    """How many tokens of a sample are masked at the start and after each step: steps + 1 counts."""
    counts = [at_start]
    for step in schedule(config):
        counts.append(step.num_masked(at_start, counts[-1]))
    return counts
