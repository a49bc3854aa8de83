"""What an op is made of: kernels of our own, compositions of PyTorch's ops, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
