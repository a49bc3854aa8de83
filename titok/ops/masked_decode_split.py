"""`masked_decode_step` with its codes split over chunks: over blocks of a GPU, or over tensor-parallel ranks.

The state of a position is 13 integers. A stage computes a partial result of each chunk of the codes, int64, and reduces
those of all chunks into the state. Both are maxima and sums of integers, so that any split gives the same bits:

| stage | partial result of a chunk | what the reduction finds |
| --- | --- | --- |
| "peak" | its largest logit with the lowest code that has it; its second largest logit | those of all codes |
| "count", 8 times, "mass", 8 times | number, or sum of the weights, of the logits with each digit | the truncation |
| "sums" | sums of the weights and of the products for the entropy | their totals, and the chunk of the drawn code |
| "find" | the drawn code and its logit, or 0 | the drawn code and its logit |

Stages "count" and "mass" exist where `top_k` or `top_p` is given. They search the smallest logit that is kept, by
digits of four bits of its sortable integer: first that of the top k, then that of the top p of what is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.ops.fixed_math import exp_weight
from titok.ops.masked_decode_plain import (
    CHUNK_LOGITS,
    DRAW_SCALE,
    NOISE,
    TOP_K,
    TOP_P,
    TOP_P_ONE,
    Evaluations,
    Inputs,
    Law,
    Logits,
    add_noise,
    apply_policy,
    entropy_products,
    evaluate,
    find_candidates,
    pick_logits,
    random_words,
    scale_fraction,
    second_largest,
)

COLUMNS = 13
KIND, TOP, TOP_CODE, SECOND, FOUND, LEFT, LOWEST, OWNER, DRAWN_SUM, LAW_SUM, PRODUCTS, CODE, LOGIT = range(COLUMNS)
NONE, CANDIDATE, EDITABLE = 0, 1, 2  # values of KIND; TOP, SECOND, LOWEST and LOGIT hold sortable integers
CODE_BITS = 18  # of keys that hold a sortable integer and a code
_MOST_CODES = 1 << CODE_BITS
_FLOAT_MAX = torch.finfo(torch.float32).max
DIGIT_BITS = 4


class Stage(NamedTuple):
    name: str
    shift: int  # of the digit, in "count" and "mass"
    width: int  # integers of a partial result


def stages_of(truncates: bool) -> tuple[Stage, ...]:
    digits = [
        Stage(name, shift, 1 << DIGIT_BITS)
        for name in ("count", "mass")
        for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS)
    ]
    return Stage("peak", 0, 2), *(digits if truncates else ()), Stage("sums", 0, 3), Stage("find", 0, 1)


class Wanted(NamedTuple):
    """What stages must compute beside the drawn codes."""

    codes: int  # over all chunks
    model_law: bool
    law: bool  # whether a probability or an entropy is read
    products: bool  # whether an entropy is read
    second: bool  # whether the second largest logit is read


def what_is_wanted(
    codes: int, policy: str, confidence: str, probabilities: str, edits: bool, returns_log_probabilities: bool
) -> Wanted:
    products = policy == "entropy" or confidence == "negative_entropy"
    by_probability = confidence in ("log_probability", "probability", "margin") or policy in (
        "threshold",
        "factor",
    )
    law = products or by_probability or edits or returns_log_probabilities
    return Wanted(codes, probabilities == "model", law, products, confidence == "margin")


def sortable(x: Tensor) -> Tensor:
    """Integers in [0, 2^32), int64, that sort like the float32 values."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits, bits + (1 << 31)) & 0xFFFFFFFF


def from_sortable(integers: Tensor) -> Tensor:
    bits = torch.where(integers >= 1 << 31, integers - (1 << 31), -1 - integers)
    return bits.to(torch.int32).view(torch.float32)


def first_state(a: Inputs) -> Tensor:
    """(B, N, 13) int64: the kind of each position, zeros elsewhere."""
    candidates, editable = find_candidates(a)
    state = torch.zeros((*a.tokens.shape, COLUMNS), dtype=torch.int64, device=a.tokens.device)
    state[..., KIND] = candidates * CANDIDATE + editable * EDITABLE
    return state


def _draw_scales(floats: Tensor) -> Tensor:
    """(B,) float32: the factors of the logits before the draw; 0, also for a wrong one, draws greedily."""
    scale = floats[:, DRAW_SCALE]
    return torch.where((scale >= 0.0) & (scale <= _FLOAT_MAX), scale, 0.0)


def _works(stage: Stage, wanted: Wanted, integers: Tensor, floats: Tensor) -> Tensor:
    """(B,) bool: the rows that have something to do in a stage."""
    draws = _draw_scales(floats) > 0.0
    match stage.name:
        case "count":
            return draws & (integers[:, TOP_K] > 0) & (integers[:, TOP_K] < wanted.codes)
        case "mass":
            return draws & (integers[:, TOP_P] < TOP_P_ONE)
        case "sums":
            return draws | wanted.law
        case "find":
            return draws
    return torch.ones_like(draws)


def partial_plain(
    stage: Stage, logits: Logits, integers: Tensor, floats: Tensor, state: Tensor, wanted: Wanted, at: Chunks
) -> Tensor:
    """(B, N, C, width) int64, zeros where nothing is evaluated."""
    codes = logits.cond.shape[-1]
    partials = state.new_zeros((*state.shape[:2], at.chunks, stage.width))
    works = (state[..., KIND] > NONE) & _works(stage, wanted, integers, floats)[:, None]
    rows, positions = works.nonzero(as_tuple=True)
    size = -(-codes // at.chunks)
    for begin in range(0, len(rows), max(1, CHUNK_LOGITS // codes)):
        part = slice(begin, begin + max(1, CHUNK_LOGITS // codes))
        b, n = rows[part], positions[part]
        y = pick_logits(logits, floats[b], b, n) + 0.0  # + 0.0: no negative zero, which would sort apart
        scale = _draw_scales(floats)[b, None]
        scale = torch.where(scale > 0.0, scale, 1.0)
        for chunk in range(at.chunks):
            piece = y[:, chunk * size : (chunk + 1) * size]
            if piece.shape[-1]:
                first = at.first_code + chunk * size
                place = at.first_chunk + chunk
                partials[b, n, chunk] = _partial(stage, piece, scale, state[b, n], wanted, first, place)
    return partials


class Chunks(NamedTuple):
    """Where the logits of a call lie: `chunks` chunks, the first of them chunk `first_chunk` of all."""

    first_code: int
    first_chunk: int
    chunks: int


def _partial(
    stage: Stage, y: Tensor, scale: Tensor, state: Tensor, wanted: Wanted, first_code: int, place: int
) -> Tensor:
    """(P, width) of finite logits y (P, v) of one chunk."""
    here = torch.arange(y.shape[-1], device=y.device)
    if stage.name == "peak":
        largest = y.amax(-1, keepdim=True)
        code = torch.where(y == largest, here, y.shape[-1]).amin(-1) + first_code
        key = sortable(largest)[:, 0] << CODE_BITS | (_MOST_CODES - 1 - code)
        return torch.stack([key, sortable(second_largest(y).contiguous())[:, 0]], -1)
    top, lowest = from_sortable(state[:, TOP, None]), from_sortable(state[:, LOWEST, None])
    x = (y - top) * scale
    if stage.name == "count":
        return _by_digit(stage.shift, y, torch.ones_like(y, dtype=torch.int64), state[:, FOUND, None])
    weights = torch.where(y >= lowest, exp_weight(x), 0)
    if stage.name == "mass":
        return _by_digit(stage.shift, y, weights, state[:, FOUND, None])
    if stage.name == "sums":
        law = weights
        if wanted.model_law:
            x = y - top
            law = exp_weight(x)
        return torch.stack([weights.sum(-1), law.sum(-1), entropy_products(law, x).sum(-1)], -1)
    found = (weights.cumsum(-1) <= state[:, LEFT, None]).sum(-1, keepdim=True)
    logit = y.gather(-1, found.clamp_max(y.shape[-1] - 1))
    key = (sortable(logit) << CODE_BITS | (first_code + found)) + 1
    return torch.where(state[:, OWNER, None] == place, key, 0)


def _by_digit(shift: int, y: Tensor, mass: Tensor, found: Tensor) -> Tensor:
    """(P, 16) sums of the masses of the logits that begin with the digits found so far, by their next digit."""
    integers = sortable(y)
    above = shift + DIGIT_BITS
    mass = torch.where(integers >> above == found >> above, mass, 0)
    sums = torch.zeros((len(y), 1 << DIGIT_BITS), dtype=torch.int64, device=y.device)
    return sums.scatter_add(-1, integers >> shift & (1 << DIGIT_BITS) - 1, mass)


def reduce_plain(
    stage: Stage, integers: Tensor, floats: Tensor, state: Tensor, partials: Tensor, wanted: Wanted
) -> Tensor:
    """The next state, from partial results (B, N, C, width) of all chunks, in the order of their codes."""
    works = (state[..., KIND] > NONE) & _works(stage, wanted, integers, floats)[:, None]
    changes = _changes(stage, integers, state, partials)
    columns = list(state.unbind(-1))
    for column, values in changes.items():
        columns[column] = torch.where(works, values, columns[column])
    return torch.stack(columns, -1)


def _changes(stage: Stage, integers: Tensor, state: Tensor, partials: Tensor) -> dict[int, Any]:
    if stage.name == "peak":
        keys = partials[..., 0]
        key = keys.amax(-1)
        others = torch.where(keys == key[..., None], 0, keys >> CODE_BITS).amax(-1)
        top, code = key >> CODE_BITS, _MOST_CODES - 1 - (key & _MOST_CODES - 1)
        return {
            TOP: top,
            TOP_CODE: code,
            SECOND: torch.maximum(others, partials[..., 1].amax(-1)),
            FOUND: torch.zeros_like(key),
            LEFT: integers[:, TOP_K, None] - 1,
            LOWEST: torch.full_like(key, 0x007FFFFF),  # of -inf
            CODE: code,
            LOGIT: top,
        }
    if stage.name in ("count", "mass"):
        return _next_digit(stage, integers, state, partials.sum(2))
    if stage.name == "sums":
        drawn, law, products = partials.unbind(-1)
        batch, length = state.shape[:2]
        row = torch.arange(batch, device=state.device)[:, None].expand(batch, length)
        words = random_words(integers, row, torch.arange(length, device=state.device).expand_as(row))
        total = drawn.sum(-1)
        left = scale_fraction(words[0], words[1], total)
        before = drawn.cumsum(-1) <= left[..., None]
        return {
            OWNER: before.sum(-1),
            LEFT: left - torch.where(before, drawn, 0).sum(-1),
            DRAWN_SUM: total,
            LAW_SUM: law.sum(-1),
            PRODUCTS: products.sum(-1),
        }
    key = partials[..., 0].amax(-1) - 1
    return {CODE: key & _MOST_CODES - 1, LOGIT: key >> CODE_BITS}


def _next_digit(stage: Stage, integers: Tensor, state: Tensor, masses: Tensor) -> dict[int, Any]:
    """One more digit of the smallest logit that is kept: the one in which unit `left` lies, from the largest down."""
    found, left = state[..., FOUND], state[..., LEFT]
    total = masses.sum(-1)
    if stage.name == "mass" and stage.shift == 32 - DIGIT_BITS:
        top_p = integers[:, TOP_P, None].clamp_max(TOP_P_ONE - 1).expand_as(total)
        found, left = torch.zeros_like(found), scale_fraction(top_p, torch.zeros_like(top_p), total)
    above = total[..., None] - masses.cumsum(-1)
    is_digit = (above <= left[..., None]) & (left[..., None] < above + masses)
    values = torch.arange(masses.shape[-1], device=masses.device)
    found = found | torch.where(is_digit, values, 0).sum(-1) << stage.shift
    left = left - torch.where(is_digit, above, 0).sum(-1)
    changes = {FOUND: found, LEFT: left}
    if stage.shift == 0:
        changes[LOWEST] = torch.maximum(state[..., LOWEST], found)
    return changes


def accept_plain(a: Inputs, state: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """New tokens, confidences, log-probabilities and, where one is given, the new step map."""
    kind = state[..., KIND]
    evaluated = kind > NONE
    safe = torch.where(evaluated[..., None], state, 1 << 31)  # where nothing was drawn: logits of 0
    scale = _draw_scales(a.floats)[:, None]
    scale = torch.where((scale > 0.0) & (not wanted.model_law), scale, 1.0)
    top, y, other = (from_sortable(safe[..., column]) for column in (TOP, LOGIT, SECOND))
    second = exp_weight((other - top) * scale)
    if not wanted.model_law:
        second = torch.where(other >= from_sortable(safe[..., LOWEST]), second, 0)
    law = Law(top, scale, second, safe[..., LAW_SUM].clamp_min(1), safe[..., PRODUCTS])
    score, log_probability, entropy = evaluate(a.confidence, y, law)
    batch, length = kind.shape
    row = torch.arange(batch, device=kind.device)[:, None].expand(batch, length)
    words = random_words(a.integers, row, torch.arange(length, device=kind.device).expand_as(row))
    confidence = torch.where(evaluated, add_noise(score, words[2], a.floats[:, NOISE, None]), torch.inf)
    log_probability = torch.where(evaluated, log_probability, 0.0)
    found = Evaluations(state[..., CODE], confidence, log_probability, entropy, words[3] * wanted.codes >> 32)
    new, step_map = apply_policy(a, kind == CANDIDATE, kind == EDITABLE, found)
    return new, confidence, log_probability, step_map
