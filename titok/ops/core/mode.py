"""How ops run in this thread or task: plain mode, always through the dispatcher, and which back end ran last."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from titok.checks import check_bool

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Mode(NamedTuple):
    """What the context managers below switch.

    Attributes:
        plain: an op that is asked for no back end by name runs plain PyTorch.
        dispatched: every call goes through PyTorch's dispatcher, as in compiled code.
    """

    plain: bool = False
    dispatched: bool = False


DEFAULT = Mode()
_MODE: ContextVar[Mode] = ContextVar("titok_ops_mode", default=DEFAULT)


def current_mode() -> Mode:
    """The mode of this thread or task. Not to be called while compiling: torch.compile cannot trace it."""
    return _MODE.get()


@contextmanager
def _switched(**changes: bool) -> Iterator[None]:
    token = _MODE.set(_MODE.get()._replace(**changes))
    try:
        yield
    finally:
        _MODE.reset(token)


@contextmanager
def only_plain(on: bool = True) -> Iterator[None]:
    """Within, an op that is asked for no back end by name runs plain PyTorch; for this thread or task alone.

    Raises:
        TypeError: `on` is no bool.
    """
    with _switched(plain=check_bool("on", on)):
        yield


@contextmanager
def through_dispatcher() -> Iterator[None]:
    """Within, every op goes through PyTorch's dispatcher, as in compiled code; for this thread or task alone.

    Eager calls go around the dispatcher, which would cost more than small ops themselves. This is the switch to measure
    and test that difference with.
    """
    with _switched(dispatched=True):
        yield


def is_plain() -> bool:
    """Whether plain mode is on in this thread or task; False while torch.compile traces."""
    return not torch.compiler.is_compiling() and _MODE.get().plain


def are_plain(tensors: Sequence[Any]) -> bool:
    """Whether these are tensors that nothing watches: no subclass, no mode, no tracing, no transform of functorch."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:  # noqa: SIM110 (a generator takes twice the time)
        if type(t) not in _PLAIN_TENSORS:
            return False
    return True


def is_ordinary(x: Tensor) -> bool:
    """Whether x has memory that may be read now, and that alone: it is no subclass, nothing compiles, traces or
    transforms it, and no forward-mode derivative is on.

    Raises:
        TypeError: x is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN_TENSORS
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def is_transformed_and_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode differentiation is on, or a transform of `torch.func` differentiates these tensors."""
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    kinds = torch._C._functorch.TransformType
    if any(
        transform.key() in (kinds.Grad, kinds.Jvp) for transform in torch._C._functorch.get_interpreter_stack()
    ):
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


# ---------------------------------------------------------------------------------------------------------------
# What ran last


class _LastBackends(threading.local):
    """One record for each thread, so that no thread reads what another one ran."""

    def __init__(self) -> None:
        self.by_op: dict[str, str] = {}


_LAST = _LastBackends()


def note_backend(op: str, backend: str) -> None:
    """Records for `last_backend` that this thread ran `op` on `backend`."""
    _LAST.by_op[op] = backend


def last_backend(op: str) -> str | None:
    """The back end that the latest call of `op` in this thread ran on; None before the first call.

    Raises:
        TypeError: `op` is no str.
    """
    if not isinstance(op, str):
        raise TypeError(f"op: expected a str, got {type(op).__name__}")
    return _LAST.by_op.get(op)


def last_backends() -> dict[str, str]:
    """The back end that the latest call of each op in this thread ran on, by op."""
    return dict(_LAST.by_op)
