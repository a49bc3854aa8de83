"""One step of MaskGIT's iterative decoding: from a step's logits to the next step's tokens, in one pass.

The decision of every still-masked position is defined in float32 and integers, operation by operation, so that
plain PyTorch, C++, CUDA and Triton give the same bits for the same logits (titok/ops/maskgit_decode_plain.py,
csrc/maskgit_decode/, kernels/maskgit_decode_step.py).

It is policy "count" of `masked_decode_step`, whose file defines the guided logits y and the draw. Below, t is
noise_temperature.

1. Draw. Rule "titok": from softmax(y / t), in law the official argmax of y + t * Gumbel; t = 0 takes the first largest.
   Rule "maskgit": from softmax(y). The drawn law differs from the softmax by less than V * 2^-31 in total variation
   (2^-19 at V = 4,096) beside the 3e-7 relative error of exp; codes 2^31 times less likely than the likeliest are
   never drawn.
2. Confidence. Rule "titok": y_v + t * Gumbel; "maskgit": log softmax(y)_v + t * Gumbel.
3. Selection, per sample: of the positions masked on entry the `num_masked` least confident stay masked (of equal
   ones the earlier position), the others take their code. Known tokens are never touched.

Rule "titok" is the official TiTok sampler's ("An Image is Worth 32 Tokens", 2024), rule "maskgit" the one of
"MaskGIT: Masked Generative Image Transformer" (2022).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from titok.checks import check_bool, check_int, check_tensor
from titok.ops.core.available import extension, why_no_cpp, why_no_cuda, why_no_triton, why_too_old
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Kernel
from titok.ops.masked_decode_plain import Logits
from titok.ops.masked_decode_rows import check_logits, check_row_values, contiguous_but_logits
from titok.ops.maskgit_decode_params import PACKED, StepParams, check_rule, check_step_params
from titok.ops.maskgit_decode_plain import decode_plain, masked_first_order


def maskgit_decode_step(
    tokens: Tensor,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = None,
    *,
    step: int,
    steps: int,
    num_masked: int | Tensor,
    mask_token: int,
    guidance: float = 1.0,
    softmax_temperature: float = 1.0,
    noise_temperature: float = 0.0,
    confidence: str = "titok",
    seed: int = 0,
    first_sample: int = 0,
    final: bool | None = None,
    rows: Tensor | None = None,
    uncond_rows: Tensor | None = None,
    out: Tensor | None = None,
    return_confidence: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
        backend: "plain", "cpp", "cuda", "triton", or None for the fastest.

    Returns:
        The new tokens (B, N) int64, and with `return_confidence` the confidences (B, N) float32, +inf at positions
        that were known on entry.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    step, steps = check_int("step", step), check_int("steps", steps)
    final = step == steps - 1 if final is None else check_bool("final", final)
    if isinstance(num_masked, Tensor):
        check_tensor("num_masked", num_masked, dtypes=(torch.int64,))
        counts, count = num_masked, 0
    else:
        counts, count = None, check_int("num_masked", num_masked)
    if final:
        counts, count = None, 0
    temperatures = (softmax_temperature, noise_temperature)
    numbers = check_step_params(step, steps, count, guidance, *temperatures, confidence, seed, first_sample)
    uncond_rows = rows if uncond_rows is None else uncond_rows
    tensors = (tokens, cond_logits, uncond_logits, rows, uncond_rows, counts, None, None)
    new, scores, _ = _decide(tensors, numbers, mask_token, confidence, False, out, return_confidence, backend)
    return (new, scores) if return_confidence else new


@overload
def maskgit_decode_step_packed(
    tokens: Tensor,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = ...,
    *,
    params: Tensor,
    mask_token: int,
    confidence: str = ...,
    num_masked: Tensor | None = ...,
    rows: Tensor | None = ...,
    uncond_rows: Tensor | None = ...,
    out: Tensor | None = ...,
    workspace: Tensor | None = ...,
    return_confidence: Literal[False] = ...,
    return_order: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def maskgit_decode_step_packed(
    tokens: Tensor,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = ...,
    *,
    params: Tensor,
    mask_token: int,
    confidence: str = ...,
    num_masked: Tensor | None = ...,
    rows: Tensor | None = ...,
    uncond_rows: Tensor | None = ...,
    out: Tensor | None = ...,
    workspace: Tensor | None = ...,
    return_confidence: Literal[True],
    return_order: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def maskgit_decode_step_packed(
    tokens: Tensor,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = ...,
    *,
    params: Tensor,
    mask_token: int,
    confidence: str = ...,
    num_masked: Tensor | None = ...,
    rows: Tensor | None = ...,
    uncond_rows: Tensor | None = ...,
    out: Tensor | None = ...,
    workspace: Tensor | None = ...,
    return_confidence: bool = ...,
    return_order: bool = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, ...]: ...


def maskgit_decode_step_packed(
    tokens: Tensor,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = None,
    *,
    params: Tensor,
    mask_token: int,
    confidence: str = "titok",
    num_masked: Tensor | None = None,
    rows: Tensor | None = None,
    uncond_rows: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    return_confidence: bool = False,
    return_order: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`maskgit_decode_step` with its numbers in a tensor on the tokens' device.

    A CUDA graph that captured it reads seed, first sample, step, guidance, temperatures and count at every replay,
    so one graph serves them all. On a GPU the call is one launch, without a synchronisation.

    Args:
        params: int32 (10,) of `pack_step_params`, made for the same `confidence`.
        num_masked: int64 (B,) counts by sample, or None for the one in `params`.
        workspace: int32 (B,) zeros, which the step leaves zero; used on a GPU, where it spares a captured graph the
            zeroing of its own. Launches that may run side by side must not share one.
        return_order: also return the order of the positions for the next step.
        the others: as of `maskgit_decode_step`.

    Returns:
        The new tokens (B, N) int64, alone or first in a tuple with the confidences (B, N) float32 and with the order
        (2, B, N) int64, as far as these are asked for. `order[0]` holds the positions of each sample, first those that
        are masked after the step, each kind ascending; `order[1]` the place of each position in `order[0]`.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    check_tensor("params", params)
    uncond_rows = rows if uncond_rows is None else uncond_rows
    tensors = (tokens, cond_logits, uncond_logits, rows, uncond_rows, num_masked, params, workspace)
    check_bool("return_order", return_order)
    new, scores, order = _decide(
        tensors, _READ_FROM_PACKED, mask_token, confidence, return_order, out, return_confidence, backend
    )
    asked = [new, *([scores] if return_confidence else [])]
    if return_order and order is not None:
        asked.append(order)
    return tuple(asked) if len(asked) > 1 else new


def _decide(
    tensors: tuple[Tensor | None, ...],
    numbers: StepParams,
    mask_token: int,
    confidence: str,
    with_order: bool,
    out: Tensor | None,
    return_confidence: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Calls the op. `tensors` are those of `Arguments`, in order; with params among them, `numbers` are not read."""
    mask_token = check_int("mask_token", mask_token)
    check_bool("return_confidence", return_confidence)
    seed = numbers.seed - (1 << 64) if numbers.seed >> 63 else numbers.seed
    outputs = None if out is None else (out, None, None)
    new, scores, order = _MASKGIT_DECODE_STEP(
        *tensors, seed, *numbers[1:], mask_token, confidence, with_order, out=outputs, backend=backend
    )
    return new, scores, order


def why_no_captured_step(device: torch.device) -> str | None:
    """Whether this op cannot be captured in a CUDA graph on a GPU. Plain PyTorch waits for the GPU in every call."""
    if (too_old := why_too_old(device)) is not None:
        return too_old
    reasons = why_no_cuda(), why_no_triton()
    return None if None in reasons else "; ".join(map(str, reasons))


# ---------------------------------------------------------------------------------------------------------------
# Arguments and results

# Stands for the numbers of a step where these are in a tensor.
_READ_FROM_PACKED = StepParams(0, 0, 0, 0, 1.0, 1.0, 0.0, 0.0)


class Arguments(NamedTuple):
    tokens: Tensor
    cond_logits: Tensor
    uncond_logits: Tensor | None
    rows: Tensor | None
    uncond_rows: Tensor | None
    counts: Tensor | None  # positions that stay masked, by sample; None: `num_masked` for all
    params: Tensor | None  # the numbers below, packed; None: those given here
    workspace: Tensor | None
    seed: int  # the unsigned 64 bits, read as a signed integer
    first_sample: int
    step: int
    num_masked: int
    guidance: float
    inverse_temperature: float
    noise: float
    draw_scale: float
    mask_token: int
    confidence: str
    with_order: bool = False

    def numbers(self) -> StepParams:
        return StepParams(self.seed % (1 << 64), *self[9:16])


def _check(a: Arguments) -> None:
    """Shapes, dtypes and devices; nothing that would make the host wait for a GPU."""
    check_logits(a)
    batch, codes, device = len(a.tokens), a.cond_logits.shape[-1], a.tokens.device
    if a.counts is not None:
        check_tensor("num_masked", a.counts, shape=(batch,), dtypes=(torch.int64,), device=device)
    if a.params is not None:
        check_tensor("params", a.params, shape=(PACKED.size // 4,), dtypes=(torch.int32,), device=device)
    _check_workspace(a)
    check_rule(a.confidence)
    if 0 <= a.mask_token < codes or not -(1 << 63) <= a.mask_token < 1 << 63:
        raise ValueError(f"mask_token: expected an id of 64 bits outside [0, {codes}), got {a.mask_token}")


def _check_workspace(a: Arguments) -> None:
    if a.workspace is not None:
        device = a.tokens.device
        check_tensor("workspace", a.workspace, shape=(len(a.tokens),), dtypes=(torch.int32,), device=device)


def _check_values(a: Arguments) -> None:
    """Contents of the index tensors. Only on a CPU can they be read at no cost."""
    codes = a.cond_logits.shape[-1]
    masked = a.tokens == a.mask_token
    known = a.tokens[~masked]
    if known.numel() and (int(known.min()) < 0 or int(known.max()) >= codes):
        raise ValueError(f"tokens: expected codes in [0, {codes}) or mask_token = {a.mask_token}")
    check_row_values(a, masked, "masked")
    if a.counts is not None and a.counts.numel() and int(a.counts.min()) < 0:
        raise ValueError(f"num_masked: expected counts >= 0, got {int(a.counts.min())}")


def _results(a: Arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    """The new tokens and the confidences, (B, N) both, and where it is asked for the order (2, B, N)."""
    new = torch.empty_like(a.tokens, memory_format=torch.contiguous_format)
    order = new.new_empty((2, *new.shape)) if a.with_order else None
    return new, torch.empty_like(new, dtype=torch.float32), order


# ---------------------------------------------------------------------------------------------------------------
# Back ends


def _cpp(a: Arguments, new: Tensor, confidences: Tensor, order: Tensor | None) -> None:
    check_rule(a.confidence)
    _check_workspace(a)  # the kernel needs none
    is_maskgit = a.confidence == "maskgit"
    found_bad_value = extension().maskgit_decode_step(
        *a[:7], a.numbers(), a.mask_token, is_maskgit, new, confidences, torch.get_num_threads()
    )
    if found_bad_value:
        _check_values(a)
    if order is not None:
        order.copy_(masked_first_order(new, a.mask_token))


def _why_no_cuda(a: Arguments) -> str | None:
    if not a.cond_logits.numel():
        return "a CUDA kernel must have some row of logits to read"
    return why_no_cuda(a.tokens)


def _cuda(a: Arguments, new: Tensor, confidences: Tensor, order: Tensor | None) -> None:
    with torch.cuda.device(a.tokens.device):
        drawn = torch.empty_like(a.tokens, dtype=torch.int32)
        workspace = a.workspace
        if workspace is None:
            workspace = torch.zeros(a.tokens.shape[0], dtype=torch.int32, device=a.tokens.device)
        stream = torch.cuda.current_stream().cuda_stream
        is_maskgit = a.confidence == "maskgit"
        extension().maskgit_decode_step_cuda(
            *a[:7], a.numbers(), a.mask_token, is_maskgit, new, confidences, order, drawn, workspace, stream
        )


def _why_no_triton(a: Arguments) -> str | None:
    if not a.cond_logits.numel():
        return "a Triton kernel must have some row of logits to read"
    return why_no_triton(a.tokens)


def _triton(a: Arguments, new: Tensor, confidences: Tensor, order: Tensor | None) -> None:
    from titok.kernels import maskgit_decode_step as kernels

    params = a.params
    if params is None:
        packed = bytearray(PACKED.pack(*a.numbers()))
        params = torch.frombuffer(packed, dtype=torch.int32).to(a.tokens.device)
    kernels.forward(*a[:6], params, a.mask_token, a.confidence == "maskgit", new, confidences, order)


def _plain(a: Arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    if a.tokens.device.type == "cpu":
        _check_values(a)
    numbers = a.numbers()
    if a.params is not None:
        numbers = StepParams(*PACKED.unpack(a.params.cpu().numpy().tobytes()))
    masked = a.tokens == a.mask_token
    logits = Logits(a.cond_logits, a.uncond_logits, a.rows, a.uncond_rows)
    new, confidences = decode_plain(a.tokens, masked, logits, a.counts, a.confidence == "maskgit", numbers)
    return new, confidences, masked_first_order(new, a.mask_token) if a.with_order else None


_MASKGIT_DECODE_STEP = Op(
    "maskgit_decode_step",
    Arguments,
    3,
    check=_check,
    results=_results,
    backends=(
        Kernel("cuda", _cuda, _why_no_cuda, contiguous_but_logits),
        Kernel("triton", _triton, _why_no_triton, contiguous_but_logits),
        Kernel("cpp", _cpp, lambda a: why_no_cpp(a.tokens), contiguous_but_logits, checks_itself=True),
        Composite("plain", _plain, differentiable=False),
    ),
)
