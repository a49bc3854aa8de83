"""What every op shares: registration with PyTorch, choice of a back end, the fast path around the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from titok.ops._extension import interpreting

_LIBRARY = torch.library.Library("titok", "DEF")
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_LAST_BACKEND: dict[str, str] = {}
_only_plain = False
_THROUGH_DISPATCHER: ContextVar[bool] = ContextVar("titok_ops_through_dispatcher", default=False)


def is_plain() -> bool:
    """Whether ops that are asked for no back end by name run their plain PyTorch path now."""
    return _only_plain


@contextmanager
def only_plain(on: bool = True) -> Iterator[None]:
    """Within, an op that is asked for no back end by name runs its plain PyTorch path."""
    global _only_plain
    before, _only_plain = _only_plain, on
    try:
        yield
    finally:
        _only_plain = before


@contextmanager
def through_dispatcher() -> Iterator[None]:
    """Within, every op of this thread or task is called as registered with PyTorch's dispatcher."""
    token = _THROUGH_DISPATCHER.set(True)
    try:
        yield
    finally:
        _THROUGH_DISPATCHER.reset(token)


def register(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Defines `titok::<name>` for CPU and CUDA and returns its overload.

    Args:
        schema: as `torch.library` takes it, e.g. ``"nearest_codebook(Tensor x, Tensor codebook) -> Tensor"``.
        impl: called with real tensors; returns new tensors that alias no input.
        fake: the same on shapes alone, for `torch.compile` and `torch.export`.
        backward, setup_context: as `torch.library.register_autograd` takes them; None where no gradient exists.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, impl, "CPU")
    _LIBRARY.impl(name, impl, "CUDA")
    torch.library.register_fake(f"titok::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"titok::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.titok, name).default


def runs_eagerly(*tensors: torch.Tensor, gradients: bool = False) -> bool:
    """Whether nothing watches these tensors (no tracing, no gradient, no subclass, no mode), so that an op may
    call its implementation directly and save the microseconds of PyTorch's dispatcher.

    Args:
        gradients: accept tensors that want a gradient, for an op with an `autograd.Function` of its own.
    """
    if (
        _THROUGH_DISPATCHER.get()
        or _only_plain  # whose path `choose` finds; what calls a kernel of ours directly must not
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    ):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    grad = torch.is_grad_enabled() and not gradients
    for t in tensors:  # noqa: SIM110 (a generator takes twice the time)
        if type(t) not in _PLAIN_TENSORS or (grad and t.requires_grad):
            return False
    return True


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which PyTorch's ops keep the dtypes they are given; next to free outside autocast."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
        return nullcontext()
    return torch.autocast(device, enabled=False)


def choose(op: str, requested: str | None, candidates: Mapping[str, Callable[[], str | None]]) -> str:
    """The name of the back end that is to run.

    Args:
        requested: a name, which then is used or raises with the cause; None or "auto": the first that can run,
            but never Triton's interpreter, which is there for tests.
        candidates: name -> function that returns None where it can run, else why not; fastest first.

    Raises:
        ValueError: `requested` is no back end of this op.
        RuntimeError: `requested` can't run here, with the cause.
    """
    if requested in (None, "auto") and _only_plain:
        requested = "plain"
    if requested is None or requested == "auto":
        skipped = "triton" if interpreting() else None
        name = next(name for name, why_not in candidates.items() if name != skipped and why_not() is None)
    elif requested not in candidates:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(candidates)} for {op}, got {requested!r}")
    else:
        name = requested
        if (reason := candidates[name]()) is not None:
            raise RuntimeError(f"{op}: backend {name!r} cannot run: {reason}")
    ran(op, name)
    return name


def ran(op: str, backend: str) -> None:
    """Notes for `last_backend` what a call around `choose` ran on."""
    _LAST_BACKEND[op] = backend


def last_backend(op: str) -> str | None:
    """The back end that the latest call of `op` ran on (in this process), or None before the first call."""
    return _LAST_BACKEND.get(op)


def last_backends() -> dict[str, str]:
    """The back end that the latest call of each op ran on, by op."""
    return dict(_LAST_BACKEND)
