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
from op_calls import CALLS
from titok import ops

WRONG: list[Any] = ["text", None, [1.0], [1], 1.5, True, 1j, np.zeros(3), object(), torch.int64, torch.zeros(3)]
WRONG_DTYPES = (torch.complex64, torch.float8_e4m3fn, torch.bool, torch.float32, torch.int16)


def enter(name: str) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        with getattr(ops, name)(**arguments):
            pass

    return call


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
    functions = {
        n
        for n in ops.__all__
        if inspect.isfunction(getattr(ops, n)) and inspect.signature(getattr(ops, n)).parameters
    }
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
    leaves = {
        k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    return {**arguments, **leaves, **({"out": None} if "out" in arguments else {})}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_named(name: str, way: str, tiny_generator: Callable[..., Any]) -> None:
    call = enter(name) if name in CONTEXTS else function(name)
    hints = typing.get_type_hints(function(name))
    generator = tiny_generator() if name == "sample_tokens" else None

    def arguments() -> dict[str, Any]:
        given = CALLS[name]()
        if generator is not None:
            given["generator"] = generator
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
