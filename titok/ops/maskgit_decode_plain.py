"""`maskgit_decode_step` in plain PyTorch, operation for operation as csrc/maskgit_decode/maskgit_decode.h has it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from titok.ops.fixed_math import WEIGHT_BITS, exp_weight, gumbel, log_fixed
from titok.ops.philox import decode_words

_FLOAT_MAX = torch.finfo(torch.float32).max
_LOG_UNIT = WEIGHT_BITS * math.log(2)
_CHUNK = 1 << 22  # logits held in float32 at a time


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


class StepTensors(NamedTuple):
    """The tensors of a step, checked; `maskgit_decode_step` documents them."""

    tokens: Tensor
    cond: Tensor
    uncond: Tensor | None
    rows: Tensor | None
    uncond_rows: Tensor | None
    keep: Tensor | None  # positions that stay masked, by sample; None: StepParams.num_masked for all


def decode_plain(inputs: StepTensors, mask_token: int, maskgit: bool, params: StepParams) -> tuple[Tensor, Tensor]:
    """New tokens and confidences."""
    tokens = inputs.tokens
    masked = tokens == mask_token
    sample, position = masked.nonzero(as_tuple=True)
    codes, scores = torch.empty_like(sample), torch.empty(len(sample), device=tokens.device)
    uncond = None if params.guidance == 1.0 else inputs.uncond
    chunk = max(1, _CHUNK // inputs.cond.shape[-1])
    for start in range(0, len(sample), chunk):
        part = slice(start, start + chunk)
        s, p = sample[part], position[part]
        guided = _pick(inputs.cond, inputs.rows, s, p)
        if uncond is not None:
            base = _pick(uncond, inputs.uncond_rows, s, p)
            guided = base + (guided - base) * params.guidance
        words = decode_words(s + params.first_sample, params.step, p, params.seed)
        codes[part], scores[part] = _decide(guided * params.inverse_temperature, words, maskgit, params)

    confidence = torch.full(tokens.shape, math.inf, device=tokens.device)
    confidence[sample, position] = scores
    new = tokens.clone()
    new[sample, position] = codes
    count = masked.sum(-1)
    keep = count.new_full(count.shape, params.num_masked) if inputs.keep is None else inputs.keep
    again = _rank(confidence, masked) < torch.minimum(keep.clamp_min(0), count)[:, None]
    return new.masked_fill_(again, mask_token), confidence


def masked_first_order(tokens: Tensor, mask_token: int) -> Tensor:
    """The positions of each sample, the masked ones first, and each kind in ascending order.

    Args:
        tokens: (B, N) int64, codes or `mask_token`.

    Returns:
        (2, B, N) int64: [0] the positions in that order; [1] the place of each position in it.
    """
    positions = (tokens != mask_token).to(torch.int8).argsort(dim=1, stable=True)
    return torch.stack([positions, positions.argsort(dim=1)])


def _pick(logits: Tensor, rows: Tensor | None, sample: Tensor, position: Tensor) -> Tensor:
    picked = logits[sample, position] if rows is None else logits[rows[sample, position]]
    return picked.to(torch.float32)


def _rank(confidence: Tensor, masked: Tensor) -> Tensor:
    """Place of each position in its sample: masked ones first, by confidence, then by position."""
    order = confidence.argsort(dim=-1, stable=True)
    known = (~masked).gather(-1, order).to(torch.int8)  # apart from a confidence that overflowed to inf
    return order.gather(-1, known.argsort(dim=-1, stable=True)).argsort(dim=-1)


def _decide(y: Tensor, words: tuple[Tensor, ...], maskgit: bool, params: StepParams) -> tuple[Tensor, Tensor]:
    """Code and confidence of each row of logits y (rows, V)."""
    y = y.nan_to_num(nan=-_FLOAT_MAX, posinf=_FLOAT_MAX, neginf=-_FLOAT_MAX)
    top = y.amax(-1, keepdim=True)
    if params.draw_scale == 0.0:
        # argmax promises no order among equal ones, a minimum over indices does
        codes = torch.where(y == top, torch.arange(y.shape[-1], device=y.device), y.shape[-1]).amin(-1)
        score = top[:, 0]
    else:
        x = (y - top) * params.draw_scale
        cumulative = exp_weight(x).cumsum(-1)
        total = cumulative[:, -1]
        found = torch.searchsorted(cumulative, _scale_uniform(words[0], words[1], total)[:, None], right=True)
        score = (x if maskgit else y).gather(-1, found)[:, 0]
        if maskgit:
            score = score - (log_fixed(total.to(torch.float32)) - _LOG_UNIT)
        codes = found[:, 0]
    return codes, (score + gumbel(words[2]) * params.noise) + 0.0  # + 0.0: no negative zero


def _scale_uniform(high: Tensor, low: Tensor, total: Tensor) -> Tensor:
    """floor((high * 2^32 + low) * total / 2^64) exactly: bytewise, so that int64 never overflows."""
    carry = torch.zeros_like(total)
    for word in (low, high):
        for shift in (0, 8, 16, 24):
            carry = (((word >> shift) & 0xFF) * total + carry) >> 8
    return carry
