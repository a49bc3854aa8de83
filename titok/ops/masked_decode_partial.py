"""`masked_decode_step` for tensor-parallel ranks, each of which holds the logits of a slice of the codes.

Every rank runs the same stages; between a partial result and its reduction the ranks gather their partial results:

    decode = begin_masked_decode(tokens, num_codes, policy="threshold", threshold=0.9, mask_token=mask)
    while not decode.is_complete:
        partial = masked_decode_partial(decode, logits_of_my_codes, first_code=my_first_code, first_chunk=rank)
        decode = masked_decode_reduce(decode, gather(partial, dim=2))  # of all ranks, in the order of their codes
    step = finish_masked_decode(decode)  # the same on every rank

There are 3 stages, 19 with `top_k` or `top_p`; a partial result is 1 to 16 int64 for each position and chunk. Every
split gives the tokens and the bits of `masked_decode_step` (titok/ops/masked_decode_split.py says why).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titok.checks import check_bool, check_int, check_tensor
from titok.ops.core.available import extension, why_no_cpp, why_no_triton
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Kernel
from titok.ops.masked_decode_plain import CONFIDENCES, LAWS, Inputs, Logits
from titok.ops.masked_decode_rows import (
    MAX_CODES,
    MAX_TOKENS,
    RowNumbers,
    check_choice,
    check_logits_at,
    contiguous_but_logits,
    pack_rows,
)
from titok.ops.masked_decode_split import (
    COLUMNS,
    Chunks,
    Stage,
    Wanted,
    accept_plain,
    first_state,
    partial_plain,
    reduce_plain,
    stages_of,
    what_is_wanted,
)
from titok.ops.masked_decode_step import DecodeStep

_STAGES = ("peak", "count", "mass", "sums", "find")


class SplitDecode(NamedTuple):
    """A decode step that is under way; `begin_masked_decode` makes it.

    Attributes:
        state: (B, N, 13) int64, what the stages so far have found at each position.
        stage: number of the next stage.
        the others: the arguments of the step.
    """

    state: Tensor
    stage: int
    inputs: Inputs
    wanted: Wanted
    stages: tuple[Stage, ...]
    returns_log_probabilities: bool

    @property
    def is_complete(self) -> bool:
        """Whether all stages are done, so that `finish_masked_decode` may be called."""
        return self.stage == len(self.stages)


def begin_masked_decode(
    tokens: Tensor,
    num_codes: int,
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
    return_log_probabilities: bool = False,
) -> SplitDecode:
    """Starts a step of `masked_decode_step` whose logits are split over ranks.

    Args:
        tokens: (B, N) int64, the same on every rank.
        num_codes: V over all ranks.
        the others: as of `masked_decode_step`, but for the logits, their rows, `in_place` and `backend`.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    given = RowNumbers(
        mask_token=mask_token, undecided=undecided, count=count, threshold=threshold, entropy_bound=entropy_bound,
        factor=factor, window=window, block_length=block_length, step=step, seed=seed, sample=sample,
        guidance=guidance, softmax_temperature=softmax_temperature, temperature=temperature,
        noise_temperature=noise_temperature, top_k=top_k, top_p=top_p, edit_threshold=edit_threshold,
    )  # fmt: skip
    packed = pack_rows(tokens, policy, given)
    if tokens.shape[1] > MAX_TOKENS:
        raise ValueError(f"tokens: expected at most {MAX_TOKENS} per row, got {tokens.shape[1]}")
    if not 1 <= check_int("num_codes", num_codes) <= MAX_CODES:
        raise ValueError(f"num_codes: expected 1 <= V <= {MAX_CODES}, got {num_codes}")
    check_choice("confidence", confidence, CONFIDENCES)
    check_choice("probabilities", probabilities, LAWS)
    check_bool("renoise", renoise)
    check_bool("return_log_probabilities", return_log_probabilities)
    for name, tensor, dtype in (("editable", editable, torch.bool), ("step_map", step_map, torch.int32)):
        if tensor is not None:
            check_tensor(name, tensor, shape=tokens.shape, dtypes=(dtype,), device=tokens.device)
    inputs = Inputs(
        tokens,
        tokens == packed.mask_token if undecided is None else undecided,
        editable,
        step_map,
        packed.integers,
        packed.floats,
        policy,
        confidence,
        probabilities,
        renoise,
        packed.edits,
        packed.block_length,
    )
    wanted = what_is_wanted(num_codes, policy, confidence, probabilities, packed.edits, return_log_probabilities)
    stages = stages_of(packed.truncates)
    return SplitDecode(first_state(inputs), 0, inputs, wanted, stages, return_log_probabilities)


def masked_decode_partial(
    decode: SplitDecode,
    cond_logits: Tensor,
    uncond_logits: Tensor | None = None,
    *,
    first_code: int,
    first_chunk: int,
    chunks: int = 1,
    rows: Tensor | None = None,
    uncond_rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The partial result of the next stage of `decode`, over the codes of this rank.

    Args:
        cond_logits: (B, N, v), the logits of v neighbouring codes, dtypes and strides as of `masked_decode_step`; with
            `rows`: (R, v).
        uncond_logits: the same of the unconditional pass, or None.
        first_code: number of the first of these codes.
        first_chunk: number of chunks that the codes before `first_code` are cut into; with one chunk a rank, the rank.
        chunks: how many chunks these codes are cut into, so that few positions fill a GPU.
        rows, uncond_rows: (B, N) int64 rows of the logits; `uncond_rows` defaults to `rows`.
        backend: "plain", "cpp", "triton", or None for the fastest.

    Returns:
        (B, N, chunks, 1 to 16) int64.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range; `decode` is complete.
    """
    _check_decode(decode)
    if decode.is_complete:
        raise ValueError("decode: expected a step with a stage left, got one that is complete")
    name, shift, _ = decode.stages[decode.stage]
    (partials,) = _PARTIAL(
        *(cond_logits, uncond_logits, rows, rows if uncond_rows is None else uncond_rows),
        *(decode.inputs.integers, decode.inputs.floats, decode.state, name, shift),
        *(check_int("first_code", first_code), check_int("first_chunk", first_chunk), check_int("chunks", chunks)),
        *decode.wanted,
        backend=backend,
    )
    return partials


def masked_decode_reduce(decode: SplitDecode, partials: Tensor) -> SplitDecode:
    """The step after its next stage, from the partial results of all ranks.

    PyTorch ops on tensors of (B, N, C) elements; nothing makes the host wait for a GPU.

    Args:
        partials: (B, N, C, 1 to 16) int64, the results of `masked_decode_partial` of all ranks along dimension 2, in
            the order of their codes.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device; `decode` is complete.
    """
    _check_decode(decode)
    if decode.is_complete:
        raise ValueError("decode: expected a step with a stage left, got one that is complete")
    stage = decode.stages[decode.stage]
    batch, length = decode.inputs.tokens.shape
    shape = (batch, length, "C", stage.width)
    check_tensor("partials", partials, shape=shape, dtypes=(torch.int64,), device=decode.state.device)
    numbers = (decode.inputs.integers, decode.inputs.floats)
    state = reduce_plain(stage, *numbers, decode.state, partials, decode.wanted)
    return decode._replace(state=state, stage=decode.stage + 1)


def finish_masked_decode(decode: SplitDecode) -> DecodeStep:
    """The results of the step, new tensors, as of `masked_decode_step`.

    Raises:
        ValueError: a stage is left.
    """
    _check_decode(decode)
    if not decode.is_complete:
        raise ValueError(f"decode: expected {len(decode.stages)} stages done, got {decode.stage}")
    new, confidences, log_probabilities, steps = accept_plain(decode.inputs, decode.state, decode.wanted)
    return DecodeStep(new, confidences, log_probabilities if decode.returns_log_probabilities else None, steps)


def _check_decode(decode: SplitDecode) -> None:
    if not isinstance(decode, SplitDecode):
        raise TypeError(f"decode: expected a SplitDecode, got {type(decode).__name__}")


class Arguments(NamedTuple):
    cond_logits: Tensor
    uncond_logits: Tensor | None
    rows: Tensor | None
    uncond_rows: Tensor | None
    integers: Tensor
    floats: Tensor
    state: Tensor
    stage: str
    shift: int
    first_code: int
    first_chunk: int
    chunks: int
    codes: int  # the fields of `Wanted`
    model_law: bool
    law: bool
    products: bool
    second: bool

    def wanted(self) -> Wanted:
        return Wanted(*self[12:])


def _check(a: Arguments) -> None:
    check_tensor("state", a.state, shape=("B", "N", COLUMNS), dtypes=(torch.int64,))
    batch, length, device = *a.state.shape[:2], a.state.device
    check_logits_at(a, (batch, length), device)
    codes = a.cond_logits.shape[-1]
    if not (a.first_code >= 0 and codes >= 1 and a.first_code + codes <= a.codes):
        raise ValueError(
            f"first_code: expected slices of [0, {a.codes}), got {codes} codes from {a.first_code} on"
        )
    if a.first_chunk < 0:
        raise ValueError(f"first_chunk: expected a number >= 0, got {a.first_chunk}")
    if not 1 <= a.chunks <= codes:
        raise ValueError(f"chunks: expected 1 to {codes}, one for each code, got {a.chunks}")
    check_tensor("integers", a.integers, shape=(batch, 8), dtypes=(torch.int64,), device=device)
    check_tensor("floats", a.floats, shape=(batch, 6), dtypes=(torch.float32,), device=device)
    if a.stage not in _STAGES:
        raise ValueError(f"stage: expected one of {_STAGES}, got {a.stage!r}")


def _results(a: Arguments) -> tuple[Tensor]:
    width = {"peak": 2, "sums": 3, "find": 1}.get(a.stage, 16)
    return (a.state.new_empty((*a.state.shape[:2], a.chunks, width)),)


def _cpp(a: Arguments, partials: Tensor) -> None:
    extension().masked_decode_partial(
        *(*a[:7], _STAGES.index(a.stage), a.shift, a.codes, a.first_code, a.first_chunk),
        *(a.model_law, a.law, a.products, a.second, partials, torch.get_num_threads()),
    )


def _why_no_triton(a: Arguments) -> str | None:
    if not a.cond_logits.numel() or not a.state.numel():
        return "a Triton kernel must have some row of logits to read"
    return why_no_triton(a.state)


def _triton(a: Arguments, partials: Tensor) -> None:
    from titok.kernels import masked_decode_step as kernels

    logits = kernels.Logits(*a[:4], a.first_code, a.first_chunk)
    confidence = "margin" if a.second else ""
    numbers = kernels.Numbers(
        *(a.integers, a.floats, a.codes, "", confidence, a.model_law, False, False, a.law, a.products)
    )
    size = -(-a.cond_logits.shape[-1] // a.chunks)
    kernels.compute_partials(a.stage, a.shift, logits, numbers, a.state, partials, size)


def _plain(a: Arguments) -> tuple[Tensor]:
    stage = Stage(a.stage, a.shift, _results(a)[0].shape[-1])
    chunks = Chunks(a.first_code, a.first_chunk, a.chunks)
    return (partial_plain(stage, Logits(*a[:4]), a.integers, a.floats, a.state, a.wanted(), chunks),)


_PARTIAL = Op(
    "masked_decode_partial",
    Arguments,
    1,
    check=_check,
    results=_results,
    backends=(
        Kernel("triton", _triton, _why_no_triton, contiguous_but_logits),
        Kernel("cpp", _cpp, lambda a: why_no_cpp(a.state), contiguous_but_logits),
        Composite("plain", _plain, differentiable=False),
    ),
)
