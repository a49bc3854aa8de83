"""One step of MaskGIT's iterative decoding: from a step's logits to the next step's tokens, in one pass.

The decision of every still-masked position is defined in float32 and integers, operation by operation, so that
the plain path below, csrc/maskgit_decode.cpp and csrc/maskgit_decode.cu give the same bits for the same logits:

1. Guided logit g = u + w (c - u), or g = c where w = 1 or no unconditional pass is given; y = g / softmax_temperature,
   NaN and -inf raised to the lowest finite float32, +inf lowered to the highest.
2. Draw. One categorical sample costs one 64-bit uniform, by inverse CDF on integers: with m = max y, code v weighs
   W_v = round(exp((y_v - m) * scale) * 2^30); the sum S is exact in any order, hence for any SIMD width, thread
   count or GPU block; r = floor(uniform * S / 2^64), and the code is the first whose inclusive cumulative weight
   exceeds r. A weight is off by at most half a unit, 2^-31 of the likeliest code's, so the drawn law differs from
   the softmax by less than V * 2^-31 in total variation (2^-19 at V = 4,096) beside the 3e-7 relative error of exp;
   codes 2^31 times less likely than the likeliest are never drawn.
   Rule "titok": scale = 1 / t, in law the official argmax of y + t * Gumbel; t = 0 takes the first largest y.
   Rule "maskgit": scale = 1.
3. Confidence, t = noise_temperature. Rule "titok": y_v + t * Gumbel; "maskgit": log softmax(y)_v + t * Gumbel.
4. Selection, per sample: of the positions masked on entry the `num_masked` least confident stay masked (of equal
   ones the earlier position), the others take their code. Known tokens are never touched.

Rule "titok" is the official TiTok sampler's ("An Image is Worth 32 Tokens", 2024), rule "maskgit" the one of
"MaskGIT: Masked Generative Image Transformer" (2022).
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch

from titok.ops._checks import check_tensor
from titok.ops._fixed_math import WEIGHT_BITS, exp_weight, gumbel, log_fixed
from titok.ops._registry import choose
from titok.ops.philox import decode_words

__all__ = ["maskgit_decode_step"]

CONFIDENCE_RULES = ("titok", "maskgit")
MAX_CODES = 262_144  # so that the sum of the weights stays within 2^48
MAX_TOKENS = 4_096

_FLOAT_MAX = torch.finfo(torch.float32).max
_LOG_UNIT = WEIGHT_BITS * math.log(2)
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 22  # logits that the plain path holds in float32 at a time


class StepParams(NamedTuple):
    """The numbers of a step, floats already rounded to float32: what csrc/maskgit_decode.h calls DecodeParams."""

    seed: int
    first_sample: int
    step: int
    num_masked: int
    guidance: float
    inverse_temperature: float  # 1 / softmax_temperature
    noise: float  # noise_temperature
    draw_scale: float  # 0 draws greedily


def maskgit_decode_step(
    tokens: torch.Tensor,
    cond_logits: torch.Tensor,
    uncond_logits: torch.Tensor | None = None,
    *,
    step: int,
    steps: int,
    num_masked: int | torch.Tensor,
    mask_token: int,
    guidance: float = 1.0,
    softmax_temperature: float = 1.0,
    noise_temperature: float = 0.0,
    confidence: str = "titok",
    seed: int = 0,
    first_sample: int = 0,
    final: bool | None = None,
    rows: torch.Tensor | None = None,
    uncond_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_confidence: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Decides the masked positions of `tokens` from one step's logits; the definition heads this file.

    Logits of known positions are not read. They need not exist either: with `rows`, logits are (R, V) and position
    (b, n) reads row `rows[b, n]`. That serves an LM head applied to masked positions only, and samples that share
    logits (the first step, where all is masked: one row set per class, one for the unconditional pass).

    Args:
        tokens: (B, N) int64 codes in [0, V), or `mask_token` where undecided; N <= 4,096.
        cond_logits: (B, N, V), float32, bfloat16 or float16, any strides with unit stride along V, V <= 262,144;
            with `rows`: (R, V).
        uncond_logits: the same of the unconditional pass, or None: no guidance, `guidance` is ignored.
        step: index of the step, in [0, steps); counts the noise.
        num_masked: positions that stay masked after the step, an int or int64 (B,); clipped to those masked before.
        mask_token: id of the mask token, outside [0, V).
        guidance: weight w of `w * cond + (1 - w) * uncond`; 1 leaves the unconditional logits unread.
        softmax_temperature: divisor of the guided logits, > 0.
        noise_temperature: scale t >= 0 of the noise.
        confidence: "titok" or "maskgit", see the head of this file.
        seed: in [0, 2^64).
        first_sample: index of the batch's first sample, >= 0: sample b draws the noise of sample first_sample + b,
            so that its tokens depend on (seed, sample index) alone.
        final: decide everything, whatever `num_masked`; None means `step == steps - 1`.
        rows, uncond_rows: (B, N) int64 rows of the logits, read at masked positions only; `uncond_rows` defaults
            to `rows`.
        out: (B, N) int64 to write the new tokens to; may be `tokens` itself.
        return_confidence: also return the confidences.
        backend: "plain", "cpp", "cuda", or None for the fastest.

    Returns:
        The new tokens (B, N) int64, and with `return_confidence` the confidences (B, N) float32, +inf at positions
        that were known on entry.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    _check_tensors(tokens, cond_logits, uncond_logits, rows, uncond_rows, out)
    params = step_params(
        step=step,
        steps=steps,
        num_masked=num_masked if isinstance(num_masked, int) else 0,
        guidance=guidance,
        softmax_temperature=softmax_temperature,
        noise_temperature=noise_temperature,
        confidence=confidence,
        seed=seed,
        first_sample=first_sample,
        final=final,
    )
    if 0 <= mask_token < cond_logits.shape[-1]:
        raise ValueError(f"mask_token: expected an id outside [0, {cond_logits.shape[-1]}), got {mask_token}")
    keep = None
    if isinstance(num_masked, torch.Tensor):
        check_tensor(
            "num_masked", num_masked, shape=(tokens.shape[0],), dtypes=(torch.int64,), device=tokens.device
        )
        keep = torch.zeros_like(num_masked) if final or (final is None and step == steps - 1) else num_masked
    if tokens.device.type == "cpu":  # reading values on a GPU would wait for it
        _check_values(tokens, cond_logits, uncond_logits, rows, uncond_rows, keep, mask_token)
    choose("maskgit_decode_step", backend, {"plain": lambda: None})
    new, scores = _plain(
        tokens, cond_logits, uncond_logits, rows, uncond_rows, keep, mask_token, confidence == "maskgit", params
    )
    if out is not None:
        new = out.copy_(new)
    return (new, scores) if return_confidence else new


def step_params(
    *,
    step: int,
    steps: int,
    num_masked: int,
    guidance: float,
    softmax_temperature: float,
    noise_temperature: float,
    confidence: str,
    seed: int,
    first_sample: int,
    final: bool | None = None,
) -> StepParams:
    """Checks a step's numbers and rounds them to float32, as `maskgit_decode_step` documents them."""
    if not 0 <= step < steps:
        raise ValueError(f"step: expected 0 <= step < steps = {steps}, got {step}")
    if steps > 1 << 32:
        raise ValueError(f"steps: expected at most 2^32, got {steps}")
    if num_masked < 0:
        raise ValueError(f"num_masked: expected a count >= 0, got {num_masked}")
    if not 0 < softmax_temperature < math.inf:
        raise ValueError(f"softmax_temperature: expected a finite value > 0, got {softmax_temperature}")
    if not 0 <= noise_temperature < math.inf:
        raise ValueError(f"noise_temperature: expected a finite value >= 0, got {noise_temperature}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite weight, got {guidance}")
    if confidence not in CONFIDENCE_RULES:
        raise ValueError(f"confidence: expected one of {CONFIDENCE_RULES}, got {confidence!r}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected an int in [0, 2^64), got {seed}")
    if not 0 <= first_sample < 1 << 63:
        raise ValueError(f"first_sample: expected an int in [0, 2^63), got {first_sample}")
    noise = _float32(noise_temperature)
    draw_scale = _float32(1.0 / noise) if noise > 0.0 else 0.0
    if confidence == "maskgit":
        draw_scale = 1.0
    if final is None:
        final = step == steps - 1
    return StepParams(
        seed=seed,
        first_sample=first_sample,
        step=step,
        num_masked=0 if final else min(num_masked, MAX_TOKENS),
        guidance=_float32(guidance),
        inverse_temperature=_float32(1.0 / softmax_temperature),
        noise=noise,
        draw_scale=draw_scale,
    )


def _float32(value: float) -> float:
    value = min(max(value, -_FLOAT_MAX), _FLOAT_MAX)
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _check_tensors(
    tokens: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    rows: torch.Tensor | None,
    uncond_rows: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    check_tensor("tokens", tokens, shape=("B", "N"), dtypes=(torch.int64,))
    batch, length = tokens.shape
    if length > MAX_TOKENS:
        raise ValueError(f"tokens: expected at most {MAX_TOKENS} per sample, got {length}")
    if rows is None and uncond_rows is not None:
        raise ValueError("uncond_rows: expected None without rows, got a tensor")
    leading: tuple[int | str, ...] = (batch, length) if rows is None else ("R",)
    check_tensor("cond_logits", cond, shape=(*leading, "V"), dtypes=_LOGIT_DTYPES, device=tokens.device)
    codes = cond.shape[-1]
    if not 1 <= codes <= MAX_CODES:
        raise ValueError(f"cond_logits: expected 1 <= V <= {MAX_CODES}, got V = {codes}")
    for name, logits in (("cond_logits", cond), ("uncond_logits", uncond)):
        if logits is not None and codes > 1 and logits.numel() and logits.stride(-1) != 1:
            raise ValueError(f"{name}: expected stride 1 along V, got strides {logits.stride()}")
    if uncond is not None:
        check_tensor("uncond_logits", uncond, shape=(*leading, codes), dtypes=(cond.dtype,), device=tokens.device)
    for name, index in (("rows", rows), ("uncond_rows", uncond_rows), ("out", out)):
        if index is not None:
            check_tensor(name, index, shape=(batch, length), dtypes=(torch.int64,), device=tokens.device)


def _check_values(
    tokens: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    rows: torch.Tensor | None,
    uncond_rows: torch.Tensor | None,
    keep: torch.Tensor | None,
    mask_token: int,
) -> None:
    masked = tokens == mask_token
    known = tokens[~masked]
    if known.numel() and (int(known.min()) < 0 or int(known.max()) >= cond.shape[-1]):
        raise ValueError(f"tokens: expected codes in [0, {cond.shape[-1]}) or mask_token = {mask_token}")
    for name, index, logits in (("rows", rows, cond), ("uncond_rows", uncond_rows, uncond)):
        if index is not None and logits is not None:
            used = index[masked]
            if used.numel() and (int(used.min()) < 0 or int(used.max()) >= logits.shape[0]):
                raise ValueError(f"{name}: expected rows in [0, {logits.shape[0]}) at masked positions")
    if keep is not None and keep.numel() and int(keep.min()) < 0:
        raise ValueError(f"num_masked: expected counts >= 0, got {int(keep.min())}")


def _plain(
    tokens: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    rows: torch.Tensor | None,
    uncond_rows: torch.Tensor | None,
    keep: torch.Tensor | None,
    mask_token: int,
    maskgit: bool,
    params: StepParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    masked = tokens == mask_token
    sample, position = masked.nonzero(as_tuple=True)
    codes, scores = torch.empty_like(sample), torch.empty(len(sample), device=tokens.device)
    if params.guidance == 1.0:
        uncond = None
    chunk = max(1, _CHUNK // cond.shape[-1])
    for start in range(0, len(sample), chunk):
        part = slice(start, start + chunk)
        s, p = sample[part], position[part]
        guided = _gather(cond, rows, s, p)
        if uncond is not None:
            base = _gather(uncond, rows if uncond_rows is None else uncond_rows, s, p)
            guided = base + (guided - base) * params.guidance
        words = decode_words(s + params.first_sample, params.step, p, params.seed)
        codes[part], scores[part] = _decide(guided * params.inverse_temperature, words, maskgit, params)

    confidence = torch.full(tokens.shape, math.inf, device=tokens.device)
    confidence[sample, position] = scores
    left = masked.sum(-1)
    stay = torch.minimum(left, left.new_tensor(params.num_masked) if keep is None else keep.clamp_min(0))
    # Known positions are +inf, yet a masked one may be too: order by (known, confidence, position).
    order = confidence.argsort(dim=-1, stable=True)
    order = order.gather(-1, (~masked).gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(tokens.shape[1], device=tokens.device).expand_as(order)
    )
    new = tokens.clone()
    new[sample, position] = codes
    return new.masked_fill_(masked & (rank < stay[:, None]), mask_token), confidence


def _gather(
    logits: torch.Tensor, rows: torch.Tensor | None, sample: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    picked = logits[sample, position] if rows is None else logits[rows[sample, position]]
    return picked.to(torch.float32)


def _decide(
    y: torch.Tensor, words: tuple[torch.Tensor, ...], maskgit: bool, params: StepParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and confidence of each row of y (rows, V)."""
    y = y.nan_to_num(nan=-_FLOAT_MAX, posinf=_FLOAT_MAX, neginf=-_FLOAT_MAX)
    top = y.amax(-1, keepdim=True)
    if params.draw_scale == 0.0:
        # argmax promises no order among equal ones, a minimum over indices does.
        codes = torch.where(y == top, torch.arange(y.shape[-1], device=y.device), y.shape[-1]).amin(-1)
        score = y.gather(-1, codes[:, None])[:, 0]
    else:
        x = (y - top) * params.draw_scale
        cumulative = exp_weight(x).cumsum(-1)
        total = cumulative[:, -1:]
        codes = torch.searchsorted(cumulative, _scaled(words[0], words[1], total[:, 0])[:, None], right=True)
        picked = (x if maskgit else y).gather(-1, codes)[:, 0]
        codes = codes[:, 0]
        score = picked - (log_fixed(total[:, 0].to(torch.float32)) - _LOG_UNIT) if maskgit else picked
    return codes, (score + gumbel(words[2]) * params.noise) + 0.0  # + 0.0: no negative zero


def _scaled(high: torch.Tensor, low: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """floor((high * 2^32 + low) * total / 2^64) exactly: bytewise, so that int64 never overflows."""
    carry = torch.zeros_like(total)
    for word in (low, high):
        for shift in (0, 8, 16, 24):
            carry = (((word >> shift) & 0xFF) * total + carry) >> 8
    return carry
