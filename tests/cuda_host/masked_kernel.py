"""Calls the host build of the CUDA kernels of `masked_decode_step`."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_cases import DTYPES
from titok.ops import DecodeStep, masked_decode_step
from titok.ops.masked_decode_plain import CONFIDENCES, POLICIES
from titok.ops.masked_decode_rows import RowNumbers, pack_rows

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(masked_decode_step).parameters.items()
    if name in RowNumbers._fields
}


class StepArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("tokens", "cond", "uncond", "rows", "uncond_rows", "undecided", "editable", "step_map"),
                *("integers", "floats"),
            )
        ),
        *((f"{row}_stride_{axis}", ctypes.c_int64) for row in ("cond", "uncond") for axis in "bn"),
        *((f"{row}_rows_count", ctypes.c_int64) for row in ("cond", "uncond")),
        ("mask_token", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "length", "codes", "block_length")),
        *((name, ctypes.c_int32) for name in ("dtype", "policy", "confidence")),
        *((name, ctypes.c_bool) for name in ("model_law", "renoise", "edits")),
        *((name, ctypes.c_void_p) for name in ("out", "confidences", "log_probabilities", "new_step_map")),
    )


class GpuArgs(ctypes.Structure):
    _fields_ = (
        ("step", StepArgs),
        *((name, ctypes.c_bool) for name in ("needs_law", "needs_entropy", "needs_margin", "truncates")),
        ("chunk", ctypes.c_int32),
        ("chunks", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("state", "partials", "arrivals")),
    )


def load(library: Path) -> Callable[..., DecodeStep]:
    """The kernels as a function of a call of tests/decode_cases.py."""
    function = ctypes.CDLL(str(library)).masked_decode_on_host

    def run(
        tensors: tuple[Tensor, Tensor, Tensor | None],
        arguments: dict[str, Any],
        chunk: int,
        order: int,
        rows: Tensor | None = None,
        in_place: bool = False,
    ) -> DecodeStep:
        """The step.

        Args:
            chunk: codes of a block, a multiple of 256.
            order: in which threads and blocks run: 0 ascending, 1 descending, 2 scrambled.
            rows: of the logits of both passes.
        """
        tokens, cond, uncond = tensors
        given = {name: arguments[name] for name in RowNumbers._fields if name in arguments}
        policy, undecided = arguments["policy"], arguments.get("undecided")
        packed = pack_rows(tokens, policy, RowNumbers(**{**DEFAULTS, **given}))
        editable, step_map = arguments.get("editable"), arguments.get("step_map")
        out = tokens if in_place else torch.full_like(tokens, -7)
        new_map = None if step_map is None else step_map if in_place else torch.full_like(step_map, -7)
        confidences = torch.full(tokens.shape, torch.nan)
        log_probs = torch.full(tokens.shape, torch.nan) if arguments.get("return_log_probabilities") else None
        batch, length = tokens.shape
        codes = cond.shape[-1]
        state = torch.full((batch, length, 13), -1)
        partials = torch.full((batch, length, -(-codes // chunk), 16), -1)
        arrivals = torch.full((batch, length), 7, dtype=torch.int32)

        def at(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        step = StepArgs(
            tokens=at(tokens),
            cond=at(cond),
            uncond=at(uncond),
            rows=at(rows),
            uncond_rows=at(rows),
            undecided=at(undecided),
            editable=at(editable),
            step_map=at(step_map),
            integers=at(packed.integers),
            floats=at(packed.floats),
            cond_stride_b=cond.stride(0),
            cond_stride_n=cond.stride(-2),
            uncond_stride_b=0 if uncond is None else uncond.stride(0),
            uncond_stride_n=0 if uncond is None else uncond.stride(-2),
            cond_rows_count=len(cond),
            uncond_rows_count=0 if uncond is None else len(uncond),
            mask_token=packed.mask_token,
            batch=batch,
            length=length,
            codes=codes,
            block_length=packed.block_length,
            dtype=DTYPES.index(cond.dtype),  # the order of csrc's DType
            policy=POLICIES.index(policy),
            confidence=CONFIDENCES.index(arguments.get("confidence", "log_probability")),
            model_law=arguments.get("probabilities") == "model",
            renoise=arguments.get("renoise", False),
            edits=packed.edits,
            out=at(out),
            confidences=at(confidences),
            log_probabilities=at(log_probs),
            new_step_map=at(new_map),
        )
        args = GpuArgs(
            step=step,
            truncates=packed.truncates,
            chunk=chunk,
            state=at(state),
            partials=at(partials),
            arrivals=at(arrivals),
        )
        function(ctypes.byref(args), order)
        return DecodeStep(out, confidences, log_probs, new_map)

    return run
