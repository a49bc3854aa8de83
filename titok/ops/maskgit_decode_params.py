"""The numbers of one step of MaskGIT's decoding: checked, rounded to float32, packed for CUDA graphs."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from titok.checks import check_int, check_integer, check_number
from titok.ops.masked_decode_rows import MAX_TOKENS, nearest_float32

CONFIDENCE_RULES = ("titok", "maskgit")
PACKED = struct.Struct("<QQIiffff")  # StepParams in the memory layout of DecodeParams in csrc/


class StepParams(NamedTuple):
    """The numbers of a step, floats already rounded to float32: `DecodeParams` in csrc/maskgit_decode/."""

    seed: int
    first_sample: int
    step: int
    num_masked: int
    guidance: float
    inverse_temperature: float  # 1 / softmax_temperature
    noise: float  # noise_temperature
    draw_scale: float  # 0 draws greedily


def pack_step_params(
    *,
    step: int,
    steps: int,
    num_masked: int,
    guidance: float = 1.0,
    softmax_temperature: float = 1.0,
    noise_temperature: float = 0.0,
    confidence: str = "titok",
    seed: int = 0,
    first_sample: int = 0,
) -> Tensor:
    """The numbers of a step for `maskgit_decode_step_packed`, int32 (10,) on the CPU.

    Args and errors: as of `maskgit_decode_step`; `num_masked` is 0 in the final step.
    """
    temperatures = (softmax_temperature, noise_temperature)
    numbers = check_step_params(step, steps, num_masked, guidance, *temperatures, confidence, seed, first_sample)
    # The layout of `PACKED`, by operators that torch.compile can trace.
    words = [numbers.seed, numbers.seed >> 32, numbers.first_sample, numbers.first_sample >> 32, *numbers[2:4]]
    signed = [((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for word in words]
    integers = torch.tensor(signed, dtype=torch.int32, device="cpu")
    return torch.cat([integers, torch.tensor(numbers[4:], dtype=torch.float32, device="cpu").view(torch.int32)])


def check_step_params(
    step: int,
    steps: int,
    num_masked: int,
    guidance: float,
    softmax_temperature: float,
    noise_temperature: float,
    confidence: str,
    seed: int,
    first_sample: int,
) -> StepParams:
    """Checks a step's numbers and rounds them to float32."""
    step, steps, num_masked = (
        check_int("step", step),
        check_int("steps", steps),
        check_int("num_masked", num_masked),
    )
    seed, first_sample = check_integer("seed", seed, 64), check_integer("first_sample", first_sample, 63)
    guidance = check_number("guidance", guidance)
    softmax_temperature = check_number("softmax_temperature", softmax_temperature)
    noise_temperature = check_number("noise_temperature", noise_temperature)
    check_rule(confidence)
    if not 0 <= step < steps:
        raise ValueError(f"step: expected 0 <= step < steps = {steps}, got {step}")
    if steps > 1 << 32:
        raise ValueError(f"steps: expected at most 2^32, got {steps}")
    if num_masked < 0:
        raise ValueError(f"num_masked: expected a count >= 0, got {num_masked}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite weight, got {guidance}")
    if not 0 < softmax_temperature < math.inf:
        raise ValueError(f"softmax_temperature: expected a finite value > 0, got {softmax_temperature}")
    if not 0 <= noise_temperature < math.inf:
        raise ValueError(f"noise_temperature: expected a finite value >= 0, got {noise_temperature}")
    noise = nearest_float32(noise_temperature)
    draw_scale = nearest_float32(1.0 / noise) if noise > 0.0 else 0.0
    return StepParams(
        seed=seed,
        first_sample=first_sample,
        step=step,
        num_masked=min(num_masked, MAX_TOKENS),
        guidance=nearest_float32(guidance),
        inverse_temperature=nearest_float32(1.0 / softmax_temperature),
        noise=noise,
        draw_scale=1.0 if confidence == "maskgit" else draw_scale,
    )


def check_rule(confidence: str) -> None:
    if not isinstance(confidence, str) or confidence not in CONFIDENCE_RULES:
        raise ValueError(f"confidence: expected one of {CONFIDENCE_RULES}, got {confidence!r}")
