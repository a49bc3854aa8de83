"""One weight that is prepared for inference: what a layer computes from stands in place of its values.

The weight stays a parameter of its layer, by name, shape, dtype and device, but it holds no values any more: what reads
or writes them raises `PreparedError`. So no change of a weight can be missed. `titok.inference.prepared` says which
weights are prepared, and when they get their values back.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titok.ops import is_ordinary, is_plain


class PreparedError(RuntimeError):
    """The values of a prepared weight were read or written."""


class _Preparation(NamedTuple):
    """What a prepared parameter has in place of its values."""

    form: Any  # what the layer computes from; weights that were prepared together share it
    original: Callable[[], Tensor]  # computes the original values, in memory of their own
    described: Tensor  # on the meta device, with the shape and dtype of the weight
    lossy: bool = False  # `original` raises, because the values cannot be computed


class PreparedParameter(nn.Parameter):
    """What the parameter of a layer becomes while it is prepared: it has everything of a parameter but the values.

    A parameter becomes one by `replace_weights`, and an ordinary one again by `give_back`. It stays the same object,
    so that optimizers keep their reference.
    """

    # None where another thread has given the values back since this one looked at the type.
    preparation: _Preparation | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        freezes = func in _GRADIENT_SWITCHES and not (
            args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        )
        if freezes or func in _OF_THE_PARAMETER:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DESCRIBING:
            described = (arg.preparation.described if _preparation(arg) is not None else arg for arg in args)
            return func(*described, **kwargs)
        raise PreparedError(
            "this weight is prepared for inference, so its values cannot be read or written and it has no gradient: "
            "call unprepare() of its model first, or train()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(readable(self), self.requires_grad)
        result: nn.Parameter = memo[id(self)]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(readable(self), self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PreparedParameter(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _properties(*names: str, access: str = "__get__") -> set[Any]:
    return {getattr(getattr(torch.Tensor, name), access) for name in names}


# What a prepared parameter still answers: itself, as it has a device and a gradient, or by its description.
_OF_THE_PARAMETER = (
    _properties("device", "is_cuda", "is_cpu", "is_meta", "is_leaf", "grad", "grad_fn", "requires_grad")
    | _properties("grad", access="__set__")
    | _properties("grad", access="__delete__")
    | {torch.Tensor.get_device, torch.Tensor.__hash__}
)
# These may switch gradients off, but not on: none would reach a prepared weight.
_GRADIENT_SWITCHES = _properties("requires_grad", access="__set__") | {torch.Tensor.requires_grad_}
_DESCRIBING = _properties("shape", "dtype", "ndim", "layout", "itemsize", "nbytes") | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.__len__,
}


class _Refused(threading.local):
    """Whether a weight that this thread wanted to prepare could not be, because somebody else holds its memory."""

    found = False


refused = _Refused()  # `replace_weights` sets it; who prepares a model reads it afterwards


def replace_weights(
    weights: Iterable[Tensor],
    prepare: Callable[[], Any],
    original: Callable[[Any, int], Tensor] | None = None,
    *,
    lossy: bool = False,
) -> None:
    """Replaces the values of weights by what is prepared from them.

    Nothing happens where one of the weights is prepared already, or its memory is held by somebody else.

    Args:
        prepare: computes what is prepared from the weights.
        original: computes the values of a weight from what was prepared and the weight's index; None keeps the
            weights beside what was prepared from them.
        lossy: the values cannot be computed and are given up.
    """
    weights = list(weights)
    if not all(map(is_sole_owner, weights)):
        if not all(_preparation(weight) is not None for weight in weights):
            refused.found = True
        return
    with torch.no_grad(), torch.inference_mode(False):  # what is prepared in inference mode is used outside it too
        form = prepare()
    for i, weight in enumerate(weights):
        values: Callable[[], Tensor] = raise_lost
        if not lossy:
            values = functools.partial(original, form, i) if original is not None else weight.detach().clone
        described = torch.empty_like(weight, device="meta")
        # A thread that reads the weight meanwhile meets either the values, whose memory `readable` keeps alive, or
        # the complete `PreparedParameter`.
        weight.preparation = _Preparation(form, values, described, lossy)  # type: ignore[attr-defined]
        weight.__class__ = PreparedParameter
        with torch._C.DisableTorchFunctionSubclass():
            weight.data = weight.data.new_empty(0)


def raise_lost() -> Tensor:
    raise PreparedError(
        "this model was quantized to 8 bits and its original weights are gone: load it again for anything but inference"
    )


def prepared_form(weight: Tensor, x: Tensor) -> Any:
    """What a layer computes x from, if its weight is prepared and x can be computed from that; otherwise None.

    It cannot where a gradient with respect to x is wanted, x is traced, compiled or transformed, plain mode or autocast
    is on, or x is empty or of another dtype than the weight.
    """
    preparation = _preparation(weight)
    if preparation is None or x.dtype != preparation.described.dtype or not x.numel():
        return None
    if not is_ordinary(x) or (x.requires_grad and torch.is_grad_enabled()) or is_plain():
        return None
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return None
    return preparation.form


def prepared_with(weight: Tensor) -> Any:
    """What was prepared from a weight, together with others or alone; None for an ordinary parameter."""
    preparation = _preparation(weight)
    return None if preparation is None else preparation.form


def _preparation(weight: object) -> _Preparation | None:
    # Not by isinstance, which torch.compile cannot trace for a kind of parameter.
    return weight.preparation if type(weight) is PreparedParameter else None


def is_lossy(weight: Tensor) -> bool:
    """Whether a weight was quantised, so that its original values are gone."""
    preparation = _preparation(weight)
    return preparation is not None and preparation.lossy


def give_back(weight: Tensor) -> None:
    """Makes a prepared parameter an ordinary one with its original values; leaves an ordinary one as it is."""
    preparation = _preparation(weight)
    if preparation is not None:
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
            weight.data = preparation.original()
        weight.__class__ = nn.Parameter
        weight.preparation = None  # type: ignore[attr-defined]


def own_memory(weight: nn.Parameter) -> None:
    """Copies the values of a parameter, unless it is prepared and holds none."""
    if _preparation(weight) is None:
        weight.data = weight.data.clone()


def readable(weight: Tensor) -> Tensor:
    """The values of a parameter, prepared or not, for a layer that computes from them.

    Gradients reach an ordinary parameter. Where none is wanted, the result is a view that keeps the memory of the
    weight alive while another thread prepares it.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    while True:  # until no other thread prepares the weight, or gives its values back, between these lines
        preparation = _preparation(weight)
        if preparation is not None:
            return preparation.original()
        with contextlib.suppress(PreparedError):
            values = weight.detach()
            if values.numel() or not weight.numel():
                return values


def is_sole_owner(weight: Tensor) -> bool:
    """Whether a parameter is an ordinary one whose memory nobody else can read or write.

    Somebody else may be a view, a numpy array, a state dict, a graph of autograd, another parameter or a process.
    """
    if type(weight) is not nn.Parameter or weight.device.type == "meta" or weight.is_inference():
        return False
    counts = _reference_counts(weight)
    is_shared = not weight.is_cuda and weight.is_shared()  # PyTorch says so of all memory on a GPU
    return counts is not None and counts == _counts_of_a_sole_owner() and not is_shared


def _reference_counts(weight: Tensor) -> tuple[int, ...] | None:
    """How often a tensor, its storage and the storage's Python object are held. None: this PyTorch does not count."""
    try:
        storage = weight.untyped_storage()
        held: int = torch._C._storage_Use_Count(storage._cdata)
        return weight._use_count(), held, sys.getrefcount(storage)  # type: ignore[attr-defined]
    except AttributeError:
        return None


@functools.cache
def _counts_of_a_sole_owner() -> tuple[int, ...] | None:
    return _reference_counts(nn.Parameter(torch.empty(1)))
