"""One decode step of a masked or uniform-state generator: draw, confidence, choice of what is accepted, in one pass.

The step is defined in float32 and integers, operation by operation, so that every back end, number of threads and batch
size gives the same bits (titok/ops/masked_decode_plain.py, csrc/masked_decode/):

1. Candidates of a row: its undecided positions inside its window; with `block_length` those of the first block of the
   window that has one. Logits are read at candidates (and at decided positions where editing is on), nowhere else.
2. Guided logit g = u + w (c - u), or g = c where w = 1 or no unconditional pass is given; y = g / softmax_temperature,
   NaN and -inf raised to the lowest finite float32, +inf lowered to the highest.
3. Draw. temperature T = 0: the first largest y. T > 0: from softmax(y / T), by the inverse CDF on the integer weights
   W_v = round(exp((y_v - max y) / T) * 2^30) with one 64-bit uniform. `top_k` keeps the codes whose y is at least the
   k-th largest; then `top_p` keeps a code while the weight of all larger y is at most top_p of the weight that is left.
   Equal logits are kept or dropped together.
4. Log-probability and entropy, of the law that was drawn from (T = 0: of softmax(y)) or, with probabilities="model",
   of softmax(y). Entropy: log S + sum(W_v * (max y - y_v) / T) / S, the products rounded to integers.
5. Confidence: a score plus noise_temperature * Gumbel noise.
6. The policy accepts candidates. Accepted positions take their code; others keep their token, or with `renoise` take a
   uniformly drawn code, floor(word * V / 2^32), whose probability is off 1 / V by less than 2^-32.

Random numbers are Philox4x32-10 of (position, step, sample) under the row's seed (titok/ops/philox.py); the fourth word
serves `renoise`. A row's result depends on nothing else of the batch.

`maskgit_decode_step` is policy "count" with confidence "logit" (its rule "titok", temperature = noise_temperature) or
"log_probability" (its rule "maskgit", temperature = 1), bit for bit.

titok/ops/masked_decode_split.py says how the codes are split over blocks of a GPU, titok/ops/masked_decode_partial.py
offers the same split to tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.checks import check_bool, check_tensor
from titok.ops.core.available import extension, why_no_cpp, why_no_cuda, why_no_triton
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Kernel
from titok.ops.masked_decode_plain import CONFIDENCES, LAWS, POLICIES, Inputs, Logits, decode_plain
from titok.ops.masked_decode_rows import (
    RowNumbers,
    check_choice,
    check_logits,
    check_row_values,
    contiguous_but_logits,
    pack_rows,
)
from titok.ops.masked_decode_split import COLUMNS, DIGIT_BITS, stages_of, what_is_wanted


class DecodeStep(NamedTuple):
    """Results of `masked_decode_step`.

    Attributes:
        tokens: (B, N) int64.
        confidences: (B, N) float32, +inf where nothing was drawn.
        log_probabilities: (B, N) float32 of the drawn codes, accepted or not; 0 where nothing was drawn. None unless
            asked for.
        step_map: (B, N) int32, None unless one was given.
    """

    tokens: Tensor
    confidences: Tensor
    log_probabilities: Tensor | None
    step_map: Tensor | None


def masked_decode_step(
    tokens: Tensor,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = None,
    *,
    policy: str,
    mask_token: int | None = None,
    undecided: Tensor | None = None,
    count: int | Tensor = 1,
    threshold: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    window: tuple[int, int] | Tensor | None = None,
    block_length: int | None = None,
    step: int | Tensor = 0,
    seed: int | Tensor = 0,
    sample: int | Tensor = 0,
    guidance: float | Tensor = 1.0,
    softmax_temperature: float | Tensor = 1.0,
    temperature: float | Tensor = 0.0,
    noise_temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    confidence: str = "log_probability",
    probabilities: str = "drawn",
    renoise: bool = False,
    edit_threshold: float | Tensor | None = None,
    editable: Tensor | None = None,
    step_map: Tensor | None = None,
    rows: Tensor | None = None,
    uncond_rows: Tensor | None = None,
    return_log_probabilities: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> DecodeStep:
    """Draws codes at the undecided positions of `tokens` and accepts some of them; the definition heads this file.

    Every argument that may be a tensor takes (B,), one value for each row: int64 for integers, float32 or float64 for
    floats, on the device of the tokens.

    Args:
        tokens: (B, N) int64, N <= 4,096.
        cond_logits: (B, N, V), float32, bfloat16 or float16, any strides with unit stride along V, V <= 262,144;
            with `rows`: (R, V).
        uncond_logits: the same of the unconditional pass, or None: no guidance, `guidance` is ignored.
        policy: which candidates are accepted.
            "count": all but the `count` least confident; of equal ones the earlier position stays undecided.
            "top_k": the `count` most confident; of equal ones the earlier position is accepted.
            "threshold": those whose probability exceeds `threshold`, and the `count` most confident.
            "entropy": by ascending entropy while the entropies of those before sum to at most `entropy_bound` (Ben-Hamu
            et al. 2025), and at least `count`. `confidence` does not matter.
            "factor": by descending probability of the drawn code, p_1 >= p_2 >= ..., the n-th while
            (n + 1) (1 - p_n) < `factor` (Fast-dLLM, Wu et al. 2025), and at least `count`. `confidence` does not
            matter.
            "leftmost": the first `count` positions.
        mask_token: id of the mask token: positions that hold it are undecided. It may lie in [0, V); it can then be
            drawn as any other code, so set its logit to -inf unless that is wanted.
        undecided: (B, N) bool, in place of `mask_token`; exactly one of the two is given.
        count: >= 0. With the default of 1, at least one candidate of each row is accepted by the policies "top_k",
            "threshold", "entropy", "factor" and "leftmost".
        threshold: probability in [0, 1], for policy "threshold".
        entropy_bound: >= 0, in nats, for policy "entropy".
        factor: >= 0, for policy "factor".
        window: the positions [start, end) that may change, (start, end) for all rows or int64 (B, 2); None: all.
        block_length: blocks are counted from the start of the window; a row works on its first block that has an
            undecided position. None: no blocks.
        step: in [0, 2^31): counts the random numbers, and is what `step_map` records.
        seed: in [0, 2^64); in a tensor the same 64 bits, read as a signed integer.
        sample: number of the first row's sample, >= 0, and row b is sample + b; or the number of each row's.
        guidance: weight w of `w * cond + (1 - w) * uncond`; 1 leaves the unconditional logits unread.
        softmax_temperature: > 0, divides the guided logits before all else.
        temperature: >= 0, of the draw alone; 0 draws greedily and without truncation.
        noise_temperature: >= 0, scale of the Gumbel noise of the confidence.
        top_k: how many of the largest logits may be drawn; 0: all.
        top_p: in (0, 1], the nucleus; 1: all.
        confidence: "logit": y of the drawn code; "log_probability", "probability": of the drawn code;
            "negative_entropy"; "margin": the probability of the likeliest code less that of the second likeliest;
            "random": 0, which orders at random with `noise_temperature` > 0.
        probabilities: "drawn" or "model": the law that probabilities, entropies and thresholds refer to.
        renoise: candidates that are not accepted take uniformly drawn codes.
        edit_threshold: probability in [0, 1]. Decided positions in the window are drawn again, and take a code that
            differs and whose probability exceeds this. None: no editing.
        editable: (B, N) bool, the decided positions that may be edited; None: all.
        step_map: (B, N) int32. The result has `step` where a token was accepted or edited, elsewhere the same values.
        rows, uncond_rows: (B, N) int64 rows of the logits, read where a code is drawn; `uncond_rows` defaults to
            `rows`.
        return_log_probabilities: also return the log-probabilities of the drawn codes.
        in_place: write the new tokens and step map to `tokens` and `step_map`, which are returned.
        backend: "plain", "cpp", "cuda", "triton", or None for the fastest.

    Returns:
        `DecodeStep`. Memory beside the results: O(B * N) in C++; in CUDA and Triton also up to 128 bytes for each
        position and chunk of codes.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    given = RowNumbers(
        mask_token=mask_token, undecided=undecided, count=count, threshold=threshold, entropy_bound=entropy_bound,
        factor=factor, window=window, block_length=block_length, step=step, seed=seed, sample=sample,
        guidance=guidance, softmax_temperature=softmax_temperature, temperature=temperature,
        noise_temperature=noise_temperature, top_k=top_k, top_p=top_p, edit_threshold=edit_threshold,
    )  # fmt: skip
    integers, floats, mask, edits, length_of_blocks, truncates = pack_rows(tokens, policy, given)
    check_bool("return_log_probabilities", return_log_probabilities)
    outputs = (tokens, None, None, step_map) if check_bool("in_place", in_place) else None
    results = _MASKED_DECODE_STEP(
        *(tokens, cond_logits, uncond_logits, rows, rows if uncond_rows is None else uncond_rows),
        *(undecided, editable, step_map, integers, floats, mask),
        *(policy, confidence, probabilities, renoise, edits, length_of_blocks),
        *(return_log_probabilities, truncates),
        out=outputs,
        backend=backend,
    )
    new, confidences, log_probabilities, steps = results
    return DecodeStep(
        new,
        confidences,
        log_probabilities if return_log_probabilities else None,
        None if step_map is None else steps,
    )


class Arguments(NamedTuple):
    tokens: Tensor
    cond_logits: Tensor
    uncond_logits: Tensor | None
    rows: Tensor | None
    uncond_rows: Tensor | None
    undecided: Tensor | None  # None: where the mask token is
    editable: Tensor | None
    step_map: Tensor | None
    integers: Tensor  # (B, 8), see `pack_rows`
    floats: Tensor  # (B, 6), see `pack_rows`
    mask_token: int
    policy: str
    confidence: str
    probabilities: str
    renoise: bool
    edits: bool
    block_length: int  # 0: no blocks
    return_log_probabilities: bool
    truncates: bool  # whether some row's top_k or top_p may leave out codes


def _check(a: Arguments) -> None:
    """Shapes, dtypes and devices; nothing that would make the host wait for a GPU."""
    check_logits(a)
    batch, length, device = *a.tokens.shape, a.tokens.device
    optional = (
        *(("undecided", a.undecided, torch.bool), ("editable", a.editable, torch.bool)),
        ("step_map", a.step_map, torch.int32),
    )
    for name, tensor, dtype in optional:
        if tensor is not None:
            check_tensor(name, tensor, shape=(batch, length), dtypes=(dtype,), device=device)
    check_tensor("integers", a.integers, shape=(batch, 8), dtypes=(torch.int64,), device=device)
    check_tensor("floats", a.floats, shape=(batch, 6), dtypes=(torch.float32,), device=device)
    if not -(1 << 63) <= a.mask_token < 1 << 63:
        raise ValueError(f"mask_token: expected an id of 64 bits, got {a.mask_token}")
    _check_choices(a)


def _check_choices(a: Arguments) -> None:
    check_choice("policy", a.policy, POLICIES)
    check_choice("confidence", a.confidence, CONFIDENCES)
    check_choice("probabilities", a.probabilities, LAWS)


def _results(a: Arguments) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    new = torch.empty_like(a.tokens, memory_format=torch.contiguous_format)
    log_probabilities = torch.empty_like(new, dtype=torch.float32) if a.return_log_probabilities else None
    step_map = None if a.step_map is None else torch.empty_like(new, dtype=torch.int32)
    return new, torch.empty_like(new, dtype=torch.float32), log_probabilities, step_map


def _numbers_of_kernel(a: Arguments) -> tuple[Any, ...]:
    """The arguments of the extension's functions from `policy` on, up to the results."""
    choices = (POLICIES.index(a.policy), CONFIDENCES.index(a.confidence), a.probabilities == "model")
    return (*choices, a.renoise, a.edits, a.block_length)


def _cpp(a: Arguments, new: Tensor, confidences: Tensor, log_probs: Tensor | None, steps: Tensor | None) -> None:
    _check_choices(a)
    results = (new, confidences, log_probs, steps)
    extension().masked_decode_step(*a[:11], *_numbers_of_kernel(a), *results, torch.get_num_threads())


def _why_no_cuda(a: Arguments) -> str | None:
    if not a.cond_logits.numel():
        return "a CUDA kernel must have some row of logits to read"
    return why_no_cuda(a.tokens)


def _cuda(a: Arguments, new: Tensor, confidences: Tensor, log_probs: Tensor | None, steps: Tensor | None) -> None:
    with torch.cuda.device(a.tokens.device):
        codes, device = a.cond_logits.shape[-1], a.tokens.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        chunk = cuda_chunk_size(a.tokens.numel(), codes, processors)
        state = torch.empty((*a.tokens.shape, COLUMNS), dtype=torch.int64, device=device)
        partials = state.new_empty((*a.tokens.shape, -(-codes // chunk), 1 << DIGIT_BITS))
        arrivals = torch.empty_like(a.tokens, dtype=torch.int32)
        extension().masked_decode_step_cuda(
            *(*a[:11], *_numbers_of_kernel(a), new, confidences, log_probs, steps, a.truncates),
            *(chunk, state, partials, arrivals, torch.cuda.current_stream().cuda_stream),
        )


def cuda_chunk_size(positions: int, codes: int, multiprocessors: int) -> int:
    """Codes of a block: at most 32,768, and from 4,096 on fewer, so that each multiprocessor has four blocks."""
    chunks = max(-(-4 * multiprocessors // max(positions, 1)), -(-codes // 32_768))
    return max(4096, -(-codes // chunks // 256) * 256)


def _why_no_triton(a: Arguments) -> str | None:
    if not a.cond_logits.numel():
        return "a Triton kernel must have some row of logits to read"
    return why_no_triton(a.tokens)


def _triton(
    a: Arguments, new: Tensor, confidences: Tensor, log_probs: Tensor | None, steps: Tensor | None
) -> None:
    from titok.kernels import masked_decode_step as kernels

    wanted = what_is_wanted(
        a.cond_logits.shape[-1], a.policy, a.confidence, a.probabilities, a.edits, log_probs is not None
    )
    numbers = kernels.Numbers(
        *(a.integers, a.floats, wanted.codes, a.policy, a.confidence, wanted.model_law, a.renoise, a.edits),
        *(wanted.law, wanted.products),
    )
    kernels.forward(
        *(a.tokens, a.undecided, a.editable, a.step_map, kernels.Logits(*a[1:5]), numbers, stages_of(a.truncates)),
        *(a.mask_token, a.block_length, new, confidences, log_probs, steps),
    )


def _plain(a: Arguments) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    undecided = a.tokens == a.mask_token if a.undecided is None else a.undecided
    if a.tokens.device.type == "cpu":
        check_row_values(a, torch.ones_like(undecided) if a.edits else undecided, "undecided")
    inputs = Inputs(a.tokens, undecided, a.editable, a.step_map, a.integers, a.floats, *a[11:17])
    new, confidences, log_probabilities, step_map = decode_plain(Logits(*a[1:5]), inputs)
    return new, confidences, log_probabilities if a.return_log_probabilities else None, step_map


_MASKED_DECODE_STEP = Op(
    "masked_decode_step",
    Arguments,
    4,
    check=_check,
    results=_results,
    backends=(
        Kernel("cuda", _cuda, _why_no_cuda, contiguous_but_logits),
        Kernel("triton", _triton, _why_no_triton, contiguous_but_logits),
        Kernel("cpp", _cpp, lambda a: why_no_cpp(a.tokens), contiguous_but_logits, checks_itself=True),
        Composite("plain", _plain, differentiable=False),
    ),
)
