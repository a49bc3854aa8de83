"""`masked_decode_step` in plain PyTorch, operation for operation as csrc/masked_decode/masked_decode.h has it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.ops.fixed_math import WEIGHT_BITS, exp_weight, gumbel, log_fixed
from titok.ops.philox import philox4x32

POLICIES = ("count", "top_k", "threshold", "entropy", "leftmost", "factor")
CONFIDENCES = ("logit", "log_probability", "negative_entropy", "random", "probability", "margin")
LAWS = ("drawn", "model")

# Columns of the packed numbers of a row.
SEED, SAMPLE, STEP, COUNT, TOP_K, TOP_P, START, END = range(8)  # int64
GUIDANCE, INVERSE_TEMPERATURE, DRAW_SCALE, NOISE, LIMIT, EDIT_LIMIT = range(6)  # float32
TOP_P_ONE = 1 << 32  # TOP_P holds the fraction in units of 2^-32
ENTROPY_UNIT = 2.0**24  # entropies are compared as integers, whose sums do not depend on their order

_FLOAT_MAX = torch.finfo(torch.float32).max
_LOG_UNIT = WEIGHT_BITS * math.log(2)
_LOWEST_EXPONENT = -22.0
_UNIT = 2.0**WEIGHT_BITS  # of the weights and of policy "factor"
CHUNK_LOGITS = 1 << 22  # logits held in float32 at a time


class Logits(NamedTuple):
    """The checked logits, (B, N, V) or with rows (R, V); `masked_decode_step` documents them."""

    cond: Tensor
    uncond: Tensor | None
    rows: Tensor | None  # (B, N)
    uncond_rows: Tensor | None  # (B, N)


class Inputs(NamedTuple):
    """The checked arguments beside the logits; `masked_decode_step` documents them."""

    tokens: Tensor
    undecided: Tensor  # (B, N) bool
    editable: Tensor | None  # (B, N) bool
    step_map: Tensor | None
    integers: Tensor  # (B, 8) int64
    floats: Tensor  # (B, 6) float32
    policy: str
    confidence: str
    law: str
    renoise: bool
    edits: bool
    block_length: int


class Evaluations(NamedTuple):
    """What was found at each position, (B, N) each; other values where nothing was drawn do not matter."""

    codes: Tensor
    confidences: Tensor
    log_probabilities: Tensor
    entropies: Tensor
    uniform_codes: Tensor  # for `renoise`


class Law(NamedTuple):
    """A law of codes, one entry for each position or shapes that broadcast: softmax of (y - top) * scale, truncated."""

    top: Tensor
    scale: Tensor
    second: Tensor  # weight of the second likeliest code, int64
    total: Tensor  # sum of the weights, int64
    products: Tensor  # sum of the products for the entropy, int64


class _Drawn(NamedTuple):
    """What was drawn at positions, one entry each."""

    code: Tensor
    confidence: Tensor
    log_probability: Tensor
    entropy: Tensor


def decode_plain(logits: Logits, a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """New tokens, confidences, log-probabilities and, where one is given, the new step map."""
    candidates, editable = find_candidates(a)
    evaluated = candidates | editable
    row, position = evaluated.nonzero(as_tuple=True)
    words = random_words(a.integers, row, position)
    drawn = _draw_everywhere(logits, a, row, position, words)

    def spread(values: Tensor, elsewhere: float) -> Tensor:
        filled = values.new_full(a.tokens.shape, elsewhere)
        filled[row, position] = values
        return filled

    codes, confidences = spread(drawn.code, -1), spread(drawn.confidence, math.inf)
    log_probabilities, entropies = spread(drawn.log_probability, 0.0), spread(drawn.entropy, 0.0)
    uniform = spread((words[3] * logits.cond.shape[-1]) >> 32, 0)
    evaluations = Evaluations(codes, confidences, log_probabilities, entropies, uniform)
    new, step_map = apply_policy(a, candidates, editable, evaluations)
    return new, confidences, log_probabilities, step_map


def apply_policy(
    a: Inputs, candidates: Tensor, editable: Tensor, found: Evaluations
) -> tuple[Tensor, Tensor | None]:
    """New tokens and, where one is given, the new step map."""
    accepted = _accept(a, candidates, found.confidences, found.log_probabilities, found.entropies)
    edit_limit = a.floats[:, EDIT_LIMIT, None]
    accepted |= editable & (found.codes != a.tokens) & (found.log_probabilities > edit_limit)
    new = torch.where(accepted, found.codes, a.tokens)
    if a.renoise:
        new = torch.where(candidates & ~accepted, found.uniform_codes, new)
    step_map = None
    if a.step_map is not None:
        step_map = torch.where(accepted, a.integers[:, STEP, None].to(torch.int32), a.step_map)
    return new, step_map


def find_candidates(a: Inputs) -> tuple[Tensor, Tensor]:
    """(B, N) bool each: the undecided positions of the windows, and the decided ones that may be edited."""
    window = _windows(a)
    candidates = a.undecided & window
    editable = torch.zeros_like(candidates)
    if a.edits:
        editable = ~a.undecided & window
        if a.editable is not None:
            editable &= a.editable
    return candidates, editable


def _windows(a: Inputs) -> Tensor:
    """(B, N) bool: the window of each row, or with a block length its first block that has an undecided position."""
    place = torch.arange(a.tokens.shape[1], device=a.tokens.device)
    start, end = a.integers[:, START, None], a.integers[:, END, None]
    window = (place >= start) & (place < end)
    if a.block_length:
        first = torch.where(a.undecided & window, place, a.tokens.shape[1]).amin(-1, keepdim=True)
        block = (place - start) // a.block_length
        window &= (block == (first - start) // a.block_length) & (first < a.tokens.shape[1])
    return window


def random_words(integers: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """The four random words of positions of rows; `integers` is (B, 8)."""
    sample, seed = integers[row, SAMPLE], integers[row, SEED]
    low, high = 0xFFFFFFFF, 32
    counter = (position, integers[row, STEP], sample & low, (sample >> high) & low)
    key: Any = (seed & low, (seed >> high) & low)  # tensors, one key for each position
    return philox4x32(counter, key)


def _draw_everywhere(
    logits: Logits, a: Inputs, row: Tensor, position: Tensor, words: tuple[Tensor, ...]
) -> _Drawn:
    count, device = len(row), row.device
    result = _Drawn(torch.empty_like(row), *(torch.empty(count, device=device) for _ in range(3)))
    chunk = max(1, CHUNK_LOGITS // logits.cond.shape[-1])
    for begin in range(0, count, chunk):
        part = slice(begin, begin + chunk)
        r, p = row[part], position[part]
        floats = a.floats[r]
        y = pick_logits(logits, floats, r, p)
        drawn = _draw(a, y, a.integers[r], floats[:, DRAW_SCALE, None], words[0][part], words[1][part])
        drawn = drawn._replace(confidence=add_noise(drawn.confidence, words[2][part], floats[:, NOISE]))
        for whole, piece in zip(result, drawn, strict=True):
            whole[part] = piece
    return result


def add_noise(score: Tensor, word: Tensor, noise: Tensor) -> Tensor:
    """The confidence of a score, with the Gumbel noise of a random word."""
    return (score + gumbel(word) * noise) + 0.0  # + 0.0: no negative zero


def pick_logits(logits: Logits, floats: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """y (P, V) of P positions of rows, float32 and finite; `floats` (P, 6) are the numbers of these rows."""
    y = _pick(logits.cond, logits.rows, row, position)
    if logits.uncond is not None:
        weight = floats[:, GUIDANCE, None]
        base = _pick(logits.uncond, logits.uncond_rows, row, position)
        y = torch.where(weight == 1.0, y, base + (y - base) * weight)
    y = y * floats[:, INVERSE_TEMPERATURE, None]
    return y.nan_to_num(nan=-_FLOAT_MAX, posinf=_FLOAT_MAX, neginf=-_FLOAT_MAX)


def _pick(logits: Tensor, rows: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
    picked = logits[row, position] if rows is None else logits[rows[row, position]]
    return picked.to(torch.float32)


def _draw(a: Inputs, y: Tensor, integers: Tensor, draw_scale: Tensor, high: Tensor, low: Tensor) -> _Drawn:
    """Draws a code from each row of finite logits y (rows, V); the confidence is still without its noise."""
    top = y.amax(-1, keepdim=True)
    greedy = draw_scale == 0.0
    # argmax promises no order among equal ones, a minimum over indices does
    largest = torch.where(y == top, torch.arange(y.shape[-1], device=y.device), y.shape[-1]).amin(-1)
    scale = torch.where(greedy, 1.0, draw_scale)
    weights = exp_weight((y - top) * scale)
    lowest = torch.where(greedy, -math.inf, _lowest_kept(y, weights, integers[:, TOP_K], integers[:, TOP_P]))
    weights = torch.where(y >= lowest, weights, 0)
    cumulative = weights.cumsum(-1)
    drawn = torch.searchsorted(cumulative, scale_fraction(high, low, cumulative[:, -1])[:, None], right=True)[:, 0]
    code = torch.where(greedy[:, 0], largest, drawn)

    if a.law == "model":
        scale, lowest = torch.ones_like(scale), torch.full_like(lowest, -math.inf)
        weights = exp_weight(y - top)
    second = torch.zeros_like(code)
    if a.confidence == "margin":
        other = second_largest(y)
        second = torch.where(other >= lowest, exp_weight((other - top) * scale), 0)[:, 0]
    products = entropy_products(weights, (y - top) * scale).sum(-1)
    law = Law(top[:, 0], scale[:, 0], second, weights.sum(-1), products)
    return _Drawn(code, *evaluate(a.confidence, y.gather(-1, code[:, None])[:, 0], law))


def entropy_products(weights: Tensor, x: Tensor) -> Tensor:
    """weight * -x rounded to integers, for the exponents x of the weights."""
    return (weights.to(torch.float32) * -x.clamp_min(_LOWEST_EXPONENT) + 0.5).to(torch.int64)


def evaluate(confidence: str, y: Tensor, law: Law) -> tuple[Tensor, Tensor, Tensor]:
    """The score, which is the confidence without its noise, the log-probability and the entropy of drawn codes."""
    total = law.total.to(torch.float32)
    log_total = log_fixed(total) - _LOG_UNIT
    log_probability = (y - law.top) * law.scale - log_total
    clamped = log_probability.clamp_max(0.0) + 0.0  # rounding may exceed 0; + 0.0: no negative zero
    entropy = (log_total + law.products.to(torch.float32) / total).clamp_min(0.0)
    match confidence:
        case "logit":
            score = y
        case "log_probability":
            score = log_probability
        case "negative_entropy":
            score = -entropy
        case "probability":
            score = exp_weight(clamped).to(torch.float32) / _UNIT
        case "margin":
            score = (int(_UNIT) - law.second).to(torch.float32) / total
        case _:
            score = torch.zeros_like(entropy)
    return score, clamped, entropy


def second_largest(y: Tensor) -> Tensor:
    """(rows, 1): the second largest logit, which equals the largest where two codes have it; -inf where V = 1."""
    return y.topk(2, dim=-1).values[:, 1:] if y.shape[-1] > 1 else torch.full_like(y, -math.inf)


def _lowest_kept(y: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(rows, 1): the smallest logit that truncation keeps, first of the top k, then of the top p of what is left."""
    codes = y.shape[-1]
    top_k = torch.where(top_k <= 0, codes, top_k.clamp_max(codes))[:, None]
    lowest = torch.full_like(y[:, :1], -math.inf)
    if bool((top_k == codes).all() and (top_p >= TOP_P_ONE).all()):
        return lowest
    sorted_y, order = y.sort(dim=-1, descending=True)
    lowest = torch.where(top_k < codes, sorted_y.gather(-1, top_k - 1), lowest)
    mass = torch.where(sorted_y >= lowest, weights.gather(-1, order), 0)
    total = mass.sum(-1)
    limit = scale_fraction(top_p.clamp_max(TOP_P_ONE - 1), torch.zeros_like(top_p), total)[:, None]
    # The mass before a code is that of all larger logits, at the first of equal logits.
    is_kept = mass.cumsum(-1) - mass <= limit
    nucleus = torch.where(is_kept, sorted_y, math.inf).amin(-1, keepdim=True)
    return torch.where(top_p[:, None] < TOP_P_ONE, torch.maximum(lowest, nucleus), lowest)


def scale_fraction(high: Tensor, low: Tensor, total: Tensor) -> Tensor:
    """floor((high * 2^32 + low) * total / 2^64) exactly: bytewise, so that int64 never overflows."""
    carry = torch.zeros_like(total)
    for word in (low, high):
        for shift in (0, 8, 16, 24):
            carry = (((word >> shift) & 0xFF) * total + carry) >> 8
    return carry


def _accept(a: Inputs, candidates: Tensor, confidences: Tensor, log_probs: Tensor, entropies: Tensor) -> Tensor:
    """(B, N) bool: the candidates whose codes the policy accepts."""
    number = candidates.sum(-1, keepdim=True)
    count = torch.minimum(a.integers[:, COUNT, None].clamp_min(0), number)
    limit = a.floats[:, LIMIT, None]
    match a.policy:
        case "count":  # the `count` least confident stay, of equal ones the earlier position
            return candidates & (_place(confidences, candidates) >= count)
        case "leftmost":
            return candidates & (candidates.cumsum(-1) <= count)
        case "entropy":
            units = (entropies * ENTROPY_UNIT).to(torch.int64)
            order = _order(units, candidates)
            in_order = torch.where(candidates, units, 0).gather(-1, order)
            before = (in_order.cumsum(-1) - in_order).gather(-1, order.argsort(dim=-1))
            place = order.argsort(dim=-1)
            return candidates & ((place < count) | (before <= (limit * ENTROPY_UNIT).to(torch.int64)))
        case "factor":
            place = _place(-log_probs, candidates)
            doubt = int(_UNIT) - exp_weight(log_probs)
            return candidates & ((place < count) | ((place + 2) * doubt < (limit * _UNIT).to(torch.int64)))
        case "threshold":
            sure = log_probs > limit
            return candidates & (sure | (_place(-confidences, candidates) < count))
        case _:
            return candidates & (_place(-confidences, candidates) < count)


def _order(key: Tensor, candidates: Tensor) -> Tensor:
    """Positions of each row: the candidates first, by key, then by position."""
    order = key.argsort(dim=-1, stable=True)
    others = (~candidates).gather(-1, order).to(torch.int8)
    return order.gather(-1, others.argsort(dim=-1, stable=True))


def _place(key: Tensor, candidates: Tensor) -> Tensor:
    return _order(key, candidates).argsort(dim=-1)
