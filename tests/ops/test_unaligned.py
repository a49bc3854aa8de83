"""Tensors whose address is no multiple of the bytes of an element: C++ refuses them, and the ops read copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from cpp_cases import CASES, TENSORS
from op_calls import CALLS
from titok import ops
from titok.ops.core.available import why_no_cpp

OPS = [name for name in CALLS if hasattr(torch.ops.titok, name) or name == "maskgit_decode_step_packed"]


def unaligned(x: Tensor) -> Tensor:
    """A copy with the same strides, one byte behind a multiple of the bytes of an element."""
    flat = torch.frombuffer(bytearray((x.numel() + 1) * x.itemsize), dtype=x.dtype, count=x.numel(), offset=1)
    copy = flat.as_strided(x.shape, x.stride()).copy_(x.detach())
    assert x.itemsize == 1 or copy.data_ptr() % x.itemsize == 1
    return copy.requires_grad_(x.requires_grad)


@pytest.mark.skipif(why_no_cpp() is not None, reason=str(why_no_cpp()))
@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_cpp_refuses_them(case: str, name: str) -> None:
    import titok._C as cpp

    arguments = CASES[case]()
    if arguments[name].itemsize == 1:
        return
    arguments[name] = unaligned(arguments[name])
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    message = (
        rf"^{name}: expected an address that is a multiple of the [248] bytes of an element, got one that is 1 "
    )
    with pytest.raises(ValueError, match=message):
        getattr(cpp, case.split(":")[0])(*arguments.values())
    assert all(torch.equal(arguments[key], value) for key, value in before.items())


@pytest.mark.skipif(why_no_cpp() is not None, reason=str(why_no_cpp()))
@pytest.mark.parametrize("through_attributes", [False, True])
def test_both_readers_see_it(through_attributes: bool) -> None:
    import titok._C as cpp

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64):
        with pytest.raises(ValueError, match=r"^tensor: expected an address"):
            cpp._describe_tensor(unaligned(torch.zeros(3, dtype=dtype)), through_attributes)
    for dtype in (torch.bool, torch.uint8, torch.int8):
        cpp._describe_tensor(unaligned(torch.zeros(3, dtype=dtype)), through_attributes)
    cpp._describe_tensor(unaligned(torch.zeros(3))[:0], through_attributes)


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "eager": nullcontext,
    "through the dispatcher": ops.through_dispatcher,
    "plain": ops.only_plain,
}


def tensors_of(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


def changed(value: Any) -> Any:
    if isinstance(value, tuple):
        values = map(changed, value)
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    return unaligned(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPS)
def test_results_are_those_of_aligned_tensors(name: str, way: str, dtype: torch.dtype) -> None:
    call = getattr(ops, name)
    right = CALLS[name]()
    for key, value in right.items():
        if isinstance(value, Tensor) and value.is_floating_point() and key != "out":
            right[key] = value.to(dtype)
    with WAYS[way]():
        expected = [t.clone() for t in tensors_of(call(**{**right, "out": None} if "out" in right else right))]
        outs = tuple(torch.zeros_like(t) for t in expected)
        for key in (*right, "all"):
            given = {k: changed(v) if k in (key, "all") or key == "all" else v for k, v in right.items()}
            if "out" in right:
                out = outs if name != "nearest_codebook" and "decode" not in name else outs[0]
                given["out"] = changed(out) if key in ("out", "all") else out
            torch.testing.assert_close(tensors_of(call(**given)), expected, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in OPS if "decode" not in name])
def test_gradients_are_those_of_aligned_tensors(name: str, way: str) -> None:
    def gradients(change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        given = {
            key: change(value.clone().requires_grad_(value.is_floating_point()))
            if isinstance(value, Tensor)
            else value
            for key, value in right.items()
        }
        results = [t for t in tensors_of(getattr(ops, name)(**given)) if t.requires_grad]
        leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
        grads = [change(torch.ones_like(t)) for t in results]
        return list(torch.autograd.grad(results, leaves, grads, allow_unused=True))

    right = {key: value for key, value in CALLS[name]().items() if key != "out"}
    with WAYS[way]():
        torch.testing.assert_close(gradients(unaligned), gradients(lambda t: t), equal_nan=True)
