"""What `titok.ops.core.Op` gives to an op that is written as CONTRIBUTING.md says: a throw-away op shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from titok import ops, profiling
from titok.checks import check_tensor
from titok.ops.core.mode import note_backend
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Gradient, Kernel


class Arguments(NamedTuple):
    x: Tensor
    factor: float = 1.0


class BackwardArguments(NamedTuple):
    grad: Tensor
    x: Tensor
    factor: float


LAUNCHES: list[str] = []


def check(a: Arguments | BackwardArguments) -> None:
    check_tensor("x", a.x, shape=("...", "D"), dtypes=(torch.float32, torch.float64))


def launch(a: Arguments, out: Tensor, doubled: Tensor | None = None) -> None:
    if a.x.dtype != torch.float32:
        raise TypeError("x: expected float32")
    LAUNCHES.append("fast")
    out.copy_(a.factor * a.x * a.x)
    if doubled is not None:
        doubled.copy_(2 * a.x)


def results(a: Arguments) -> tuple[Tensor]:
    return (torch.empty_like(a.x),)


def why_no_fast(a: Arguments) -> str | None:
    return None if a.x.dtype == torch.float32 else "it takes float32"


BACKWARD = Op(
    "test_square_backward",
    BackwardArguments,
    1,
    check=check,
    results=lambda a: (torch.empty_like(a.x),),
    backends=(Composite("plain", lambda a: (2 * a.grad * a.factor * a.x,)),),
)
SQUARE = Op(
    "test_square",
    Arguments,
    1,
    check=check,
    results=results,
    kept=lambda a: (torch.empty_like(a.x),),
    num_kept=1,
    backends=(
        Kernel("fast", launch, why_no_fast, checks_itself=True),
        Kernel("inference", launch, why_no_fast),
        Kernel("absent", launch, lambda a: "it was never built"),
        Composite("plain", lambda a: (a.factor * a.x * a.x, 2 * a.x), differentiable=False),
    ),
    gradient=Gradient(
        BACKWARD,
        save=lambda a, outputs: (a.x,),
        arguments=lambda grads, saved, a, needs: (*grads, *saved, a.factor),
        gradients=lambda grads, returned: returned,
    ),
)


def square(x: Tensor, factor: float = 1.0, **options: Any) -> Tensor:
    return SQUARE(x, factor, **options)[0]


X = torch.tensor([[1.0, -2.0], [3.0, 0.5]])


def test_schema_and_defaults() -> None:
    schema = "titok::test_square(Tensor x, float factor=1., str? backend=None) -> (Tensor, Tensor)"
    assert str(torch.ops.titok.test_square.default._schema) == schema
    assert torch.equal(torch.ops.titok.test_square(X)[0], X * X)


@pytest.mark.parametrize("backend", [None, "auto", "plain"])
def test_opcheck(backend: str | None) -> None:
    torch.library.opcheck(torch.ops.titok.test_square.default, (X.clone().requires_grad_(), 3.0, backend))


def test_choice_and_errors() -> None:
    with torch.no_grad():
        for backend, ran in ((None, "fast"), ("auto", "fast"), ("inference", "inference"), ("plain", "plain")):
            assert torch.equal(square(X, 2.0, backend=backend), 2 * X * X)
            assert ops.last_backend("test_square") == ran
        assert square(X.double()).dtype == torch.float64  # the kernel refuses float64
        assert ops.last_backend("test_square") == "plain"
        with ops.only_plain():
            square(X)
            assert ops.last_backend("test_square") == "plain"
            square(X, backend="inference")
            assert ops.last_backend("test_square") == "inference"
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of \['absent', 'fast', .* got 'metal'"):
        square(X, backend="metal")
    with pytest.raises(RuntimeError, match=r"test_square: backend 'absent' cannot run: it was never built"):
        square(X, backend="absent")
    with pytest.raises(RuntimeError, match="backend 'fast' cannot run: it takes float32"):
        square(X.double(), backend="fast")
    with pytest.raises(
        RuntimeError, match=r"'inference' cannot run: it has no backward pass, which \['plain'\] have"
    ):
        square(X.clone().requires_grad_(), backend="inference")
    with (
        pytest.raises(RuntimeError, match=r"'inference' cannot run: it has no backward"),
        ops.through_dispatcher(),
    ):
        square(X.clone().requires_grad_(), backend="inference").sum().backward()
    with pytest.raises(TypeError, match="x: expected dtype float32 or float64, got int64"):
        square(X.long())
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        square([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got NoneType"):
        square(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("backend", [None, "plain"])
def test_gradients(backend: str | None, dispatched: bool) -> None:
    x = X.clone().requires_grad_()

    def run() -> None:
        (grad,) = torch.autograd.grad(square(x, 3.0, backend=backend).sum(), x, create_graph=True)
        assert torch.equal(grad, 6 * X)
        with pytest.raises(RuntimeError, match="test_square_backward is not differentiable"):
            (x + grad).sum().backward()
        (once,) = torch.autograd.grad(square(x, 3.0, backend=backend).sum(), x)
        assert torch.equal(once, 6 * X)

    if dispatched:
        with ops.through_dispatcher():
            run()
    else:
        run()


def test_out() -> None:
    out = torch.zeros_like(X)
    a = torch.ones_like(X, requires_grad=True)
    product = (a * out).sum()
    with torch.no_grad():
        assert square(X, out=(out,)) is out
    assert torch.equal(out, X * X)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    for wrong, message in ((torch.zeros(3), r"out: expected shape \(2, 2\)"), (X.double(), "out: expected dtype")):
        with pytest.raises((TypeError, ValueError), match=message):
            square(X, backend="plain", out=(wrong,))


WAYS: dict[str, Callable[[], Tensor]] = {
    "compiled": lambda: torch.compile(square, backend="aot_eager", fullgraph=True)(X, 2.0),
    "traced": lambda: torch.jit.trace(lambda x: square(x, 2.0), (torch.ones(2, 2),), check_trace=False)(X),
    "exported": lambda: torch.export.export(Module(), (torch.ones(2, 2),)).module()(X),
    "vmapped": lambda: torch.vmap(lambda x: square(x, 2.0))(X),
    "through func.grad": lambda: torch.func.grad(lambda x: square(x, 2.0).sum())(X) * X / 2,
    "through vmap of func.grad": lambda: torch.vmap(torch.func.grad(lambda x: square(x, 2.0).sum()))(X) * X / 2,
    "through func.grad of vmap": lambda: (
        torch.func.grad(lambda x: torch.vmap(lambda row: square(row, 2.0))(x).sum())(X) * X / 2
    ),
    "through func.hessian": lambda: (
        torch.func.hessian(lambda x: square(x, 2.0).sum())(X).diagonal().diagonal().flatten()[0] * X * X / 2
    ),
    "through func.jvp": lambda: torch.func.jvp(lambda x: square(x, 2.0), (X,), (X,))[1] / 2,
    "lazily negated": lambda: square(torch._neg_view(-X), 2.0),
    "zero without memory": lambda: square(torch._efficientzerotensor(2, 2), 2.0) + 2 * X * X,
}


class Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return square(x, 2.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_every_way_is_right(way: str) -> None:
    assert torch.allclose(WAYS[way](), 2 * X * X)


def test_vmap_over_what_autograd_differentiates() -> None:
    x = X.clone().requires_grad_()
    torch.vmap(lambda row: square(row, 3.0).sum())(x).sum().backward()
    assert torch.allclose(x.grad, 6 * X)  # type: ignore[arg-type]


def test_meta_and_empty() -> None:
    with torch.no_grad():
        assert square(X.to("meta")).device.type == "meta"
        assert square(torch.zeros(0, 3)).shape == (0, 3)


def test_modes_and_records_belong_to_their_thread() -> None:
    seen: dict[str, Any] = {}
    entered, checked = threading.Event(), threading.Event()

    def plain() -> None:
        with ops.only_plain():
            entered.set()
            checked.wait(10)
            seen["inside"] = ops.is_plain()

    thread = threading.Thread(target=plain)
    thread.start()
    entered.wait(10)
    note_backend("test_square", "here")
    seen["outside"] = ops.is_plain()
    other = threading.Thread(target=lambda: seen.update(other=ops.last_backend("test_square")))
    other.start()
    other.join()
    checked.set()
    thread.join()
    assert seen == {"inside": True, "outside": False, "other": None}
    assert ops.last_backend("test_square") == "here"


def test_range() -> None:
    opened: list[str] = []

    class Sink:
        def push(self, name: str) -> None:
            opened.append(name)

        def pop(self) -> None:
            opened.append("end")

    with profiling.enabled(Sink()), torch.no_grad():
        square(X)
    assert opened == ["test_square", "end"]
