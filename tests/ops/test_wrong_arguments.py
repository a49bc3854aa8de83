"""Every public function of `titok.ops`, and `sample_tokens`, names the argument that is of a wrong kind.

Each argument in turn is replaced by values of every other kind. A new function, or a new argument of one, makes this
file fail until `CALLS` has it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import titok
from titok import ops

F32 = torch.float32
WRONG: list[Any] = ["text", None, [1.0], [1], 1.5, True, 1j, np.zeros(3), object(), torch.int64, torch.zeros(3)]
WRONG_DTYPES = (torch.complex64, torch.float8_e4m3fn, torch.bool, torch.float32, torch.int16)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def step(**more: Any) -> dict[str, Any]:
    index = torch.arange(6).view(2, 3)
    arguments = {"tokens": torch.full((2, 3), 5), "cond_logits": normal(6, 5), "uncond_logits": normal(6, 5)}
    options = {"mask_token": 5, "confidence": "titok", "rows": index, "uncond_rows": index, "backend": None}
    return {**arguments, **options, "out": torch.zeros(2, 3).long(), "return_confidence": True, **more}


def numbers(**more: Any) -> dict[str, Any]:
    floats = {"guidance": 2.0, "softmax_temperature": 1.0, "noise_temperature": 1.0}
    return {"step": 0, "steps": 3, "num_masked": 1, **floats, "confidence": "titok", "seed": 1, "first_sample": 2, **more}


def norm(**more: Any) -> dict[str, Any]:
    return {"weight": normal(6), "bias": normal(6), "eps": 1e-5, "out_dtype": F32, "backend": None, **more}


def quantizer(**more: Any) -> dict[str, Any]:
    return {"latents": normal(4, 6), "codebook": normal(7, 6), "normalize": True, "backend": None, **more}


def enter(name: str) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        with getattr(ops, name)(**arguments):
            pass

    return call


# Right arguments, all that there are, of each function that has any.
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "add_layer_norm": lambda: norm(x=normal(3, 6), residual=normal(3, 6), out=(normal(3, 6), normal(3, 6))),
    "layer_norm": lambda: norm(x=normal(3, 6)),
    "group_norm_silu": lambda: norm(
        x=image(2, 6, 3, 5), num_groups=3, residual=image(2, 6, 3, 5), out=(image(2, 6, 3, 5), image(2, 6, 3, 5))
    ),
    "masked_attention": lambda: {
        "qkv": normal(2, 5, 24), "num_heads": 2, "key_mask": torch.ones(2, 5, dtype=torch.bool),
        "query_range": (1, 4), "scale": 0.5, "backend": None,
    },
    "nearest_codebook": lambda: quantizer(return_quantized=True, out=torch.zeros(4).long()),
    "quantize": lambda: quantizer(commitment_cost=0.25),
    "code_mixture": lambda: {"logits": normal(4, 7), "codebook": normal(7, 6), "backend": None},
    "maskgit_decode_step": lambda: step(**numbers(), final=False),
    "maskgit_decode_step_packed": lambda: step(
        params=ops.pack_step_params(**numbers()), num_masked=torch.ones(2).long(), workspace=torch.zeros(2).int()
    ),
    "pack_step_params": numbers,
    "only_plain": lambda: {"on": True},
    "is_ordinary": lambda: {"x": normal(2)},
    "last_backend": lambda: {"op": "quantize"},
    "sample_tokens": lambda: {
        "labels": [0, 2], "sampling": titok.SamplingConfig(steps=2), "seed": 1, "first_sample": 2,
        "init_tokens": torch.full((2, 4), 16), "trace": True,
    },
}  # fmt: skip
CONTEXTS = {"only_plain"}
# Values that a function takes although its annotation does not tell: any name; integers of every dtype.
TAKEN = {("last_backend", "op", "text"), ("sample_tokens", "labels", "[1]")}


def function(name: str) -> Callable[..., Any]:
    return titok.sample_tokens if name == "sample_tokens" else getattr(ops, name)


def takes(annotation: Any, value: Any) -> bool:
    """Whether the annotation allows a value that is no tensor; "text" is no choice of any function."""
    kinds = typing.get_args(annotation) or (annotation,)
    if value is None:
        return type(None) in kinds
    return (type(value) in kinds and value != "text") or (float in kinds and type(value) is int)


def wrong_values(name: str, argument: str, right: Any, annotation: Any) -> Iterator[Any]:
    for value in WRONG:
        if not takes(annotation, value) and (name, argument, f"{value}") not in TAKEN:
            yield value
    tensors = right if isinstance(right, tuple) else (right,)
    integers = not any(t.is_floating_point() or t.dtype == torch.bool for t in tensors if isinstance(t, Tensor))
    if all(isinstance(t, Tensor) for t in tensors) and name != "is_ordinary":
        for dtype in WRONG_DTYPES:
            if dtype != tensors[0].dtype and not (name == "sample_tokens" and integers and dtype == torch.int16):
                changed = tuple(t.to(dtype) for t in tensors)
                yield changed if isinstance(right, tuple) else changed[0]


def test_every_function_and_argument_is_here() -> None:
    functions = {n for n in ops.__all__ if inspect.isfunction(getattr(ops, n)) and inspect.signature(getattr(ops, n)).parameters}
    assert {*functions, "sample_tokens"} == set(CALLS)
    for name, make in CALLS.items():
        given = set(make()) | ({"generator"} if name == "sample_tokens" else set())
        assert given == set(inspect.signature(function(name)).parameters), name


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "eager": nullcontext,
    "with gradients": nullcontext,
    "through the dispatcher": ops.through_dispatcher,
    "plain": ops.only_plain,
}


def wanting_gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**arguments, **leaves, **({"out": None} if "out" in arguments else {})}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_named(name: str, way: str, tiny_generator: Callable[..., Any]) -> None:
    call = enter(name) if name in CONTEXTS else function(name)
    hints = typing.get_type_hints(function(name))

    def arguments() -> dict[str, Any]:
        given = CALLS[name]()
        if name == "sample_tokens":
            given["generator"] = tiny_generator()
        return wanting_gradients(given) if way == "with gradients" else given

    missed = []
    with WAYS[way]():
        call(**arguments())
        for argument, right in arguments().items():
            for value in wrong_values(name, argument, right, hints[argument]):
                shown = f"{value.dtype} tensor" if isinstance(value, Tensor) else f"{value!r:.40}"
                try:
                    call(**{**arguments(), argument: value})
                    missed.append(f"{argument} = {shown}: taken")
                except (TypeError, ValueError) as error:
                    first = str(error).partition(":")[0].partition("[")[0]
                    if first != argument or ": expected " not in str(error) or ", got " not in str(error):
                        missed.append(f"{argument} = {shown}: {error!r}")
                except Exception as error:
                    missed.append(f"{argument} = {shown}: {error!r}")
    assert not missed, "\n".join(missed)
