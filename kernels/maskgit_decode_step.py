"""One step of MaskGIT's decoding (Chang et al. 2022), for GPUs where titok was built without nvcc.

`titok/ops/maskgit_decode_step.py` states the definition, in float32 and integers; csrc/maskgit_decode/ holds it for
CUDA and C++. The kernels here do the same operations in the same order, so that they return the same bits. Triton must
not fuse a multiplication and an addition for that (`fp_fusion=False`).

`draw`: one program for each position. It walks over the codes three times: for the largest logit, for the sum of the
weights, and for the first code whose cumulative weight exceeds the random number. Weights are integers, so their sums
do not depend on the order.

`select`: one program for each sample. Of the positions that were masked, the least confident stay masked. Their keys
(confidence, then position) are distinct integers, and the largest key among those that stay is found bit by bit. It
also writes the order of the positions for the next step: those that stay masked first.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._decode import (
    FLOAT_MAX,
    LOG_UNIT,
    exp_weight,
    finite_logits,
    log_fixed,
    noisy_confidence,
    row_offset,
    smallest_keys,
    sortable,
)
from titok.kernels._launch import launch, record
from titok.kernels._tuning import MASKGIT_DECODE_STEP_DRAW, MASKGIT_DECODE_STEP_SELECT_WARPS

# Words of the packed numbers of a step: DecodeParams in csrc/maskgit_decode/maskgit_decode.h.
_SEED, _FIRST_SAMPLE, _STEP = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)
_NUM_MASKED, _GUIDANCE, _INVERSE_TEMPERATURE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_NOISE, _DRAW_SCALE = tl.constexpr(8), tl.constexpr(9)


# --- Numbers


@triton.jit
def _load_float(params_ptr, word: tl.constexpr):
    return tl.load(params_ptr + word).to(tl.float32, bitcast=True)


@triton.jit
def _load_word(params_ptr, word: tl.constexpr):
    return tl.load(params_ptr + word).to(tl.uint32, bitcast=True)


@triton.jit
def _load_unsigned(params_ptr, word: tl.constexpr):
    """64 bits, the low word first."""
    low, high = _load_word(params_ptr, word).to(tl.uint64), _load_word(params_ptr, word + 1).to(tl.uint64)
    return low | (high << 32)


# --- Kernels


@triton.jit
def maskgit_decode_step_draw(
    tokens_ptr,  # (B, N) int64
    cond_ptr,  # (B, N, V), or with rows (R, V)
    uncond_ptr,  # the same, or None
    rows_ptr,  # (B, N) int64 or None
    uncond_rows_ptr,  # (B, N) int64 or None
    params_ptr,  # (10,) int32
    drawn_ptr,  # (B, N) int32, written: the drawn code, -1 at positions that were known
    confidence_ptr,  # (B, N) float32, written: +inf at positions that were known
    N,
    cond_stride_b,
    cond_stride_n,
    cond_row_count,
    uncond_stride_b,
    uncond_stride_n,
    uncond_row_count,
    mask_token,
    V: tl.constexpr,
    IS_MASKGIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: one position of one sample."""
    position = tl.program_id(0)
    at, b, n = position.to(tl.int64), (position // N).to(tl.int64), position % N
    if tl.load(tokens_ptr + at) != mask_token:
        tl.store(drawn_ptr + at, -1)
        tl.store(confidence_ptr + at, float("inf"))
    else:
        guidance = _load_float(params_ptr, _GUIDANCE)
        inverse_temperature = _load_float(params_ptr, _INVERSE_TEMPERATURE)
        draw_scale = _load_float(params_ptr, _DRAW_SCALE)
        # The numbers come unchecked. With a scale that is not finite, all weights could be 0.
        draw_scale = tl.where((draw_scale >= 0.0) & (draw_scale <= FLOAT_MAX), draw_scale, 0.0)
        cond_ptr += row_offset(rows_ptr, at, b, n, cond_row_count, cond_stride_b, cond_stride_n)
        if uncond_ptr is not None:
            uncond_ptr += row_offset(uncond_rows_ptr, at, b, n, uncond_row_count, uncond_stride_b, uncond_stride_n)
        lanes = tl.arange(0, BLOCK_V)
        tops = tl.full((BLOCK_V,), -float("inf"), tl.float32)
        for start in range(0, V, BLOCK_V):
            y = finite_logits(cond_ptr, uncond_ptr, start + lanes, guidance, inverse_temperature, V)
            tops = tl.maximum(tops, y)
        top = tl.max(tops, 0)

        sample = _load_unsigned(params_ptr, _FIRST_SAMPLE) + b.to(tl.uint64)
        high, low, word, _ = tl.philox(
            _load_unsigned(params_ptr, _SEED),
            n.to(tl.uint32),
            _load_word(params_ptr, _STEP),
            sample.to(tl.uint32),
            (sample >> 32).to(tl.uint32),
        )
        code = tl.full((), V, tl.int32)
        if draw_scale == 0.0:
            for start in range(0, V, BLOCK_V):
                codes = start + lanes
                y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, V)
                code = tl.minimum(code, tl.min(tl.where(y == top, codes, V), 0))
            score = top
        else:
            sums = tl.zeros((BLOCK_V,), tl.int64)
            for start in range(0, V, BLOCK_V):
                y = finite_logits(cond_ptr, uncond_ptr, start + lanes, guidance, inverse_temperature, V)
                sums += exp_weight((y - top) * draw_scale)
            total = tl.sum(sums, 0)
            uniform = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
            left = tl.umulhi(uniform, total.to(tl.uint64)).to(tl.int64)
            for start in range(0, V, BLOCK_V):
                codes = start + lanes
                y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, V)
                weights = exp_weight((y - top) * draw_scale)
                found = tl.where(tl.cumsum(weights, 0) > left, codes, V)
                code = tl.minimum(code, tl.min(found, 0))
                left -= tl.sum(weights, 0)  # below 0 once the code is found: later codes are larger
            score = finite_logits(cond_ptr, uncond_ptr, code, guidance, inverse_temperature, V)
            if IS_MASKGIT:
                x = (score - top) * draw_scale
                score = x - (log_fixed(total.to(tl.float32)) - LOG_UNIT)
        tl.store(drawn_ptr + at, code)
        confidence = noisy_confidence(score, word, _load_float(params_ptr, _NOISE))
        tl.store(confidence_ptr + at, confidence)


@triton.jit
def maskgit_decode_step_select(
    tokens_ptr,  # (B, N) int64
    drawn_ptr,  # (B, N) int32, from maskgit_decode_step_draw
    confidence_ptr,  # (B, N) float32, from maskgit_decode_step_draw
    counts_ptr,  # (B,) int64, positions that stay masked; or None: as the params say
    params_ptr,  # (10,) int32
    out_ptr,  # (B, N) int64, written; may be tokens
    order_ptr,  # (2, B, N) int64, written: the positions, masked ones first, and the place of each; or None
    N,
    mask_token,
    BLOCK_N: tl.constexpr,
):
    """One program: one sample."""
    b = tl.program_id(0).to(tl.int64)
    positions = tl.arange(0, BLOCK_N)
    inside = positions < N
    offsets = b * N + positions
    drawn = tl.load(drawn_ptr + offsets, mask=inside, other=-1).to(tl.int64)
    masked = drawn >= 0
    confidence = tl.load(confidence_ptr + offsets, mask=inside, other=0.0)
    keys = (sortable(confidence) << 12) | positions
    wanted = tl.load(params_ptr + _NUM_MASKED).to(tl.int64)
    if counts_ptr is not None:
        wanted = tl.load(counts_ptr + b)
    keep = tl.maximum(tl.minimum(wanted, tl.sum(masked.to(tl.int64), 0)), 0)
    limit = smallest_keys(keys, masked, keep)
    token = tl.where(masked, drawn, tl.load(tokens_ptr + offsets, mask=inside, other=0))
    stays = masked & (keep > 0) & (keys <= limit)
    tl.store(out_ptr + offsets, tl.where(stays, mask_token, token), mask=inside)
    if order_ptr is not None:
        until = tl.cumsum(stays.to(tl.int32), 0)  # positions up to this one that stay masked
        place = tl.where(stays, until - 1, tl.sum(stays.to(tl.int32), 0) + positions - until)
        tl.store(order_ptr + b * N + place, positions.to(tl.int64), mask=inside)
        tl.store(order_ptr + tl.num_programs(0).to(tl.int64) * N + offsets, place.to(tl.int64), mask=inside)


def forward(
    tokens: torch.Tensor,
    cond_logits: torch.Tensor,
    uncond_logits: torch.Tensor | None,
    rows: torch.Tensor | None,
    uncond_rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    params: torch.Tensor,
    mask_token: int,
    is_maskgit: bool,
    out: torch.Tensor,
    confidences: torch.Tensor,
    order: torch.Tensor | None,
) -> None:
    """Fills out (B, N) int64, which may be tokens, confidences (B, N) float32 and, where given, order (2, B, N) int64.

    Args:
        tokens, cond_logits, uncond_logits, rows, uncond_rows, mask_token: as of `titok.ops.maskgit_decode_step`.
            B, N and V are at least 1; indices are contiguous, and so are the codes of a row of logits.
        counts: (B,) int64, positions that stay masked in each sample; None: as the params say.
        params: (10,) int32, the numbers of the step (`titok.ops.pack_step_params`), on the device of the tokens.
    """
    B, N = tokens.shape
    V = cond_logits.shape[-1]
    drawn = torch.empty((B, N), dtype=torch.int32, device=tokens.device)
    uncond = cond_logits if uncond_logits is None else uncond_logits
    tile = MASKGIT_DECODE_STEP_DRAW
    launch(
        maskgit_decode_step_draw,
        (B * N,),
        *(tokens, cond_logits, uncond_logits, rows, None if uncond_logits is None else uncond_rows, params),
        *(drawn, confidences, N),
        *(cond_logits.stride(0), cond_logits.stride(-2), cond_logits.shape[0]),
        *(uncond.stride(0), uncond.stride(-2), uncond.shape[0]),
        mask_token,
        V=V,
        IS_MASKGIT=is_maskgit,
        BLOCK_V=min(triton.next_power_of_2(V), tile.columns),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=False,
    )
    launch(
        maskgit_decode_step_select,
        (B,),
        *(tokens, drawn, confidences, counts, params, out, order, N, mask_token),
        BLOCK_N=triton.next_power_of_2(N),
        num_warps=MASKGIT_DECODE_STEP_SELECT_WARPS,
        num_stages=1,
        fp_fusion=False,
    )


def aot_variants() -> list[AotVariant]:
    """The generators' steps: 32 to 128 tokens of 4,096 or 8,192 codes, rows of logits, guided and not."""
    variants = []
    for dtype, N, V, is_guided in (
        (torch.bfloat16, 32, 4096, True),
        (torch.bfloat16, 64, 4096, False),
        (torch.bfloat16, 128, 8192, True),
        (torch.float32, 32, 4096, True),
    ):
        logits, index = meta(3 * N, V, dtype=dtype), meta(3, N, dtype=torch.int64)
        params, order = meta(10, dtype=torch.int32), meta(2, 3, N, dtype=torch.int64)
        with record() as launches:
            forward(
                *(index, logits, logits if is_guided else None, index, index if is_guided else None, None, params),
                *(V, False, index, meta(3, N), order),
            )
        label = f"{name_of(dtype)} N={N} V={V}{' guided' if is_guided else ''}"
        draw, select = label_launches(launches, label)
        variants += [draw, dataclasses.replace(select, expects_wide_loads=False)]  # it reads a number in a thread
    return variants
