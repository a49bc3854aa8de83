"""What a decoding step does, as numbers: how much stays masked, guidance, temperatures. No tensors here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from titok.config import MaskSchedule, SamplingConfig


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
