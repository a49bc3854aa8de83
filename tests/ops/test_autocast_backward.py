"""Gradients that are asked for while autocast is on are those that are found while it is off, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from op_calls import CALLS
from titok import ops

# Of each op the back ends that compute gradients on a CPU, for "triton" in its interpreter.
BACKENDS = {
    "add_layer_norm": (None, "auto", "plain", "cpp", "triton"),
    "layer_norm": (None, "auto", "plain", "cpp"),
    "group_norm_silu": (None, "auto", "plain", "triton"),
    "masked_attention": (None, "auto", "plain", "cpp", "sdpa", "triton"),
    "nearest_codebook": (None, "plain"),
    "quantize": (None, "plain"),
    "code_mixture": (None, "auto", "plain", "triton"),
}
EVERY = [
    pytest.param(name, backend, marks=pytest.mark.slow if backend == "triton" else [])
    for name, backends in BACKENDS.items()
    for backend in backends
]


def loss_and_leaves(name: str, backend: str | None, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    given = {**CALLS[name](), "backend": backend}
    given.pop("out", None)
    for key, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[key] = value.to(dtype).requires_grad_()
    results: Any = getattr(ops, name)(**given)
    floats = [t for t in (results if isinstance(results, tuple) else (results,)) if t.requires_grad]
    weights = [torch.randn_like(t, dtype=torch.float32) for t in floats]
    loss = torch.stack([(t.float() * w).sum() for t, w in zip(floats, weights, strict=True)]).sum()
    return loss, [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


@pytest.mark.usefixtures("device_of_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_gradients(name: str, backend: str | None, dispatched: bool, dtype: torch.dtype) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    with ops.through_dispatcher() if dispatched else nullcontext():
        if backend == "cpp" and ops.backends()["cpp"] != "available":
            pytest.skip(ops.backends()["cpp"])
        found = []
        for inside in (False, True):
            loss, leaves = loss_and_leaves(name, backend, dtype)
            with torch.autocast(loss.device.type, torch.bfloat16, enabled=inside):
                found.append(list(torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert same(*found)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "group_norm_silu"])
def test_plain_mode_and_gradients_of_gradients(name: str) -> None:
    found = []
    for inside in (False, True):
        with ops.only_plain():
            loss, leaves = loss_and_leaves(name, None, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            once = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            again = torch.stack([g.square().sum() for g in once if g is not None]).sum()
            found.append([*once, *torch.autograd.grad(again, leaves, allow_unused=True)])
    assert same(*found)


@pytest.mark.slow
def test_the_gradient_of_plain_attention_is_taken_in_every_way() -> None:
    """What stands for matrix products in the plain path works with transforms and forward mode as these do."""
    qkv = torch.randn(2, 5, 24, dtype=torch.float64)

    def attend(x: Tensor) -> Tensor:
        return ops.masked_attention(x, 2, backend="plain")

    def by_products(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
        return (torch.softmax(q @ k.mT * 0.5, -1) @ v).transpose(-3, -2).flatten(-2)

    ways: list[Callable[[Callable[[Tensor], Tensor]], Any]] = [
        lambda f: torch.func.jvp(f, (qkv,), (qkv.cos(),)),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(qkv),
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x[None]).square().sum()))(qkv),
        lambda f: torch.func.jacfwd(torch.func.grad(lambda x: f(x).square().sum()))(qkv[:1, :2]),
        lambda f: torch.func.hessian(lambda x: f(x).square().sum())(qkv[:1, :2]),
    ]
    for way in ways:
        torch.testing.assert_close(way(attend), way(by_products))
