"""What an op is made of: kernels of our own, compositions of PyTorch's ops, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from titok.ops.core.op import Op

Outputs = tuple[Any, ...]  # tensors, and None for a result that was not asked for


def _can_always_run(arguments: Any) -> None:
    return None


def _as_given(arguments: Any) -> Any:
    return arguments


@dataclass(frozen=True)
class Kernel:
    """A back end of our own, which fills tensors that the op has allocated.

    Attributes:
        launch: called with the op's arguments and each result; where a gradient is wanted, also with each tensor that
            is kept for the backward pass.
        why_not: called with the op's arguments; None where the kernel can take them, else the reason in one line.
        prepare: called with the op's arguments; returns them in the memory layout that `launch` takes.
        checks_itself: whether `launch` checks all it is given before it writes, and raises `TypeError` or `ValueError`
            for what it cannot take, as the C++ kernels do. Eager calls are then offered to it without any check before.
    """

    name: str
    launch: Callable[..., None]
    why_not: Callable[[Any], str | None]
    prepare: Callable[[Any], Any] = _as_given
    checks_itself: bool = False


@dataclass(frozen=True)
class Composite:
    """A back end made of PyTorch's own ops.

    Attributes:
        compute: called with the op's arguments; returns all outputs, new tensors: the results, then what is kept.
        differentiable: whether PyTorch can differentiate `compute`, in reverse and forward mode.
    """

    name: str
    compute: Callable[[Any], Outputs]
    why_not: Callable[[Any], str | None] = _can_always_run
    differentiable: bool = True


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated: by another op.

    Attributes:
        op: the op of the backward pass.
        save: called with the arguments and all outputs; returns the tensors (or None) that the backward pass reads.
            Among them must be every differentiable argument, or a result, that the gradient depends on: by these
            PyTorch notices that somebody differentiates twice.
        arguments: called with the gradients of the results (None where a result has none), the saved tensors, the
            forward pass's arguments, in which `...` stands for each tensor, and whether each tensor argument needs a
            gradient; returns the arguments of `op`, or None where `op` has nothing to do.
        gradients: called with the gradients of the results and what `op` returned (nothing where it had nothing to do);
            returns the gradient of each tensor argument in order, or None.
    """

    op: Op
    save: Callable[[Any, Outputs], tuple[Tensor | None, ...]]
    arguments: Callable[..., tuple[Any, ...] | None]
    gradients: Callable[[Any, Outputs], tuple[Tensor | None, ...]]


def contiguous(arguments: Any) -> Any:
    """The arguments with contiguous tensors."""
    return arguments._make(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)


def aligned(arguments: Any) -> Any:
    """The arguments with a copy of each CPU tensor whose address is no multiple of the bytes of an element.

    `torch.frombuffer` and NumPy arrays make such tensors; C++ must not read them.
    """
    misplaced = {
        name: a.clone()
        for name, a in arguments._asdict().items()
        if isinstance(a, Tensor) and a.is_cpu and a.data_ptr() % a.itemsize
    }
    return arguments._replace(**misplaced) if misplaced else arguments


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within, autocast is off for the device of a tensor."""
    if torch._C._is_any_autocast_enabled():
        device = tensor.device.type
        if torch.amp.is_autocast_available(device):  # the meta device has none
            return torch.autocast(device, enabled=False)
    return nullcontext()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for (..., M, K) and a matrix (K, N), or (..., K, N) with the same leading sizes.

    Where autocast is on while PyTorch differentiates a product of its own, it converts the factors of the gradients to
    16 bits. It does not in this one.
    """
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return a @ b  # what follows takes 90 microseconds more
    if b.ndim == 2:
        rows: Tensor = _Product.apply(a.reshape(-1, a.shape[-1]), b)
        return rows.view(*a.shape[:-1], b.shape[-1])
    stacked: Tensor = _Product.apply(a.flatten(0, -3), b.flatten(0, -3))
    return stacked.unflatten(0, a.shape[:-2])


class _Product(torch.autograd.Function):
    """The product of two matrices, or of each pair of two stacks of matrices, differentiated by this very function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        with without_autocast(grad):
            return (
                _Product.apply(grad, b.mT) if needs_a else None,
                _Product.apply(a.mT, grad) if needs_b else None,
            )

    @staticmethod
    def jvp(ctx: Any, tangent_a: Tensor, tangent_b: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        with without_autocast(a):
            first: Tensor = _Product.apply(tangent_a, b)
            return first + _Product.apply(a, tangent_b)


def vjp(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the inputs, by computing the function once more and letting PyTorch differentiate it."""
    # A kernel that the dispatcher called runs below autograd, which is let in here.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), autograd:
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves)
        gradients: tuple[Tensor, ...] = torch.autograd.grad(result, leaves, grad)
    return gradients
