"""Weights prepared for inference: what layers compute from in place of a weight, and how a model takes it up.

`model.prepare()` lays weights out for the device that they are on: in oneDNN's blocked layout on a CPU, those of
convolutions channels-last on a GPU, with the upsampling or the shortcut of a convolution folded into it on any device.
The prepared form replaces the weight, so
that the model is in memory once. The weight stays a parameter of its layer, by name, shape, dtype and device, but it
holds no values any more: what reads or writes them raises `PreparedError`. So no change of a weight can be missed.

- `unprepare()`, and whatever needs the values (`train`, `to`, `state_dict`, `load_state_dict`, `copy.deepcopy`,
  pickling), gives the original values back, bit for bit.
- `prepare(int8=True)` quantises the linear layers of transformers to 8 bits (`titok.inference.int8`). Their original
  values are gone then, and what needs them raises `PreparedError`.
- A weight whose memory somebody else holds too (a view, a numpy array, another process) is not prepared, because it
  could be changed from there. Its layer computes from the weight itself. Of memory on a GPU, PyTorch does not say
  whether another process holds it.

In plain mode (`with plain():`) models compute as in training and without the kernels of `titok.ops`. It is there to
check the fast path against.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titok.inference.int8 import check_int8
from titok.ops import is_ordinary, is_plain, only_plain

M = TypeVar("M", bound="PreparableModel")


def plain(on: bool = True) -> contextlib.AbstractContextManager[None]:
    """A context in which models compute as in training and every op of `titok.ops` runs its plain PyTorch path.

    Args:
        on: False switches plain mode off within an outer context that switched it on.
    """
    return only_plain(on)


def select(engine: str) -> contextlib.AbstractContextManager[None]:
    """The context of an engine: plain mode for "plain"; for "fast", the mode that is already set.

    Raises:
        ValueError: any other name.
    """
    if engine not in ("fast", "plain"):
        raise ValueError(f"engine: expected 'fast' or 'plain', got {engine!r}")
    return plain() if engine == "plain" else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------
# One weight


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
    if not all(map(_is_sole_owner, weights)):
        if not all(_preparation(weight) is not None for weight in weights):
            _refused.found = True
        return
    with torch.no_grad(), torch.inference_mode(False):  # what is prepared in inference mode is used outside it too
        form = prepare()
    for i, weight in enumerate(weights):
        values: Callable[[], Tensor] = _raise_lost
        if not lossy:
            values = functools.partial(original, form, i) if original is not None else weight.detach().clone
        described = torch.empty_like(weight, device="meta")
        # A thread that reads the weight meanwhile meets either the values, whose memory `readable` keeps alive, or
        # the complete `PreparedParameter`.
        weight.preparation = _Preparation(form, values, described, lossy)  # type: ignore[attr-defined]
        weight.__class__ = PreparedParameter
        with torch._C.DisableTorchFunctionSubclass():
            weight.data = weight.data.new_empty(0)


def _raise_lost() -> Tensor:
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


def _is_lossy(weight: Tensor) -> bool:
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


def _is_sole_owner(weight: Tensor) -> bool:
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


# ---------------------------------------------------------------------------------------------------------------
# A model


class PreparableLayer(nn.Module):
    """A layer that can compute from a prepared form of its weights.

    Attributes:
        prepared_alone: whether `prepare_weights` needs no other layer, and so may be called while a model is loaded.
    """

    prepared_alone = False

    def prepare_weights(self) -> None:
        """Prepares the weights that are not prepared yet, as far as that makes the layer faster where they are."""
        raise NotImplementedError

    def weight_to_quantize(self) -> Tensor | None:
        """The weight that `quantize_weights` quantises to 8 bits; None for a layer that is not quantised."""
        return None

    def quantize_weights(self) -> None:
        """Quantises that weight, unless it is quantised."""


# Held while a model is prepared or given its weights back. Computing takes no lock.
_PREPARING = threading.RLock()


class _Refused(threading.local):
    """Whether a weight that this thread wanted to prepare could not be, because somebody else holds its memory."""

    found = False


_refused = _Refused()


class _Known:
    """What was found out about a model, and the parts that it had then. A copy of it, or of its owner, knows nothing.

    Attributes:
        parts: modules, parameters and what was prepared from them, as `_parts_of` lists them.
        weights: what `weights_of` returns as long as the model has these parts.
    """

    def __init__(self) -> None:
        self.parts: list[object] = []
        self.weights: list[Tensor] = []

    def is_of(self, parts: list[object]) -> bool:
        """Whether these are the same objects as those that the model had."""
        return bool(parts) and len(parts) == len(self.parts) and all(map(operator.is_, parts, self.parts))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Known:
        return _Known()

    def __reduce__(self) -> Any:
        return _Known, ()


def _parts_of(model: nn.Module) -> list[object]:
    """The modules below a model, all parameters, and what was prepared from each or whether it requires a gradient.

    The model itself is left out, so that it can keep the list and is freed with its last user all the same.
    """
    parts: list[object] = []
    parameters: list[Any] = [*model._parameters.values()]
    modules = [*model._modules.values()]
    while modules:
        module = modules.pop()
        if module is not None:
            parts.append(module)
            parameters += module._parameters.values()
            modules += module._modules.values()
    parts += parameters
    # A prepared parameter requires no gradient, and would answer slowly.
    parts += [
        p.preparation if type(p) is PreparedParameter else p is not None and p.requires_grad for p in parameters
    ]
    return parts


class PreparableModel(nn.Module):
    """A model that can be prepared for inference. See the top of this file."""

    _frozen: set[str] | None = None  # the names of the parameters that require gradients when it is not prepared
    _prepared: _Known | None = None  # its parts after the last time that all of its weights could be prepared
    _listed: _Known | None = None  # its weights

    @property
    def prepared(self) -> bool:
        """Whether the model is prepared for inference."""
        return self._frozen is not None

    @property
    def quantized(self) -> bool:
        """Whether layers of the model were quantised to 8 bits."""
        return any(map(_is_lossy, self.parameters()))

    def prepare(self: M, *, int8: bool = False) -> M:
        """Prepares the model for inference and returns it.

        No parameter requires a gradient until the model is given back its weights, by `unprepare` or by anything
        that needs their values. A prepared model can be prepared again: then weights are prepared that could not be
        before, because somebody held their memory.

        Args:
            int8: quantise the linear layers of the transformers to 8 bits. The original weights are lost.

        Raises:
            RuntimeError: the model is in training mode, or with `int8` somebody else holds the memory of a weight.
            ValueError: `int8` on a CPU without AVX-512 VNNI or on a GPU, or for a model in another dtype than float32
                and bfloat16 or without transformers.
        """
        if self.training:
            raise RuntimeError(
                "prepare: expected a model in eval mode, got one in training mode: call eval() first"
            )
        if int8:
            with _PREPARING:
                self._quantize()
        known = self._prepared  # another thread may give the weights back, and this attribute with them
        if known is not None and known.is_of(_parts_of(self)):
            return self
        with _PREPARING:
            _refused.found, self._prepared = False, None
            self._frozen = self._frozen or set()
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    self._frozen.add(name)
                    parameter.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, PreparableLayer):
                    module.prepare_weights()
            if not _refused.found:
                self._prepared = _Known()
                self._prepared.parts = _parts_of(self)
        return self

    def _quantize(self) -> None:
        """Quantises every layer that can be and is not yet, or raises before it changes the values of one."""
        check_int8(next(self.parameters()).device)
        layers = [
            (module, weight)
            for module in self.modules()
            if isinstance(module, PreparableLayer) and (weight := module.weight_to_quantize()) is not None
        ]
        if not layers:
            raise ValueError("prepare: expected layers in float32 or bfloat16, which 8 bits can replace, got none")
        for _, weight in layers:
            if not _is_lossy(weight):
                give_back(weight)
        for _, weight in layers:
            if not _is_lossy(weight) and not _is_sole_owner(weight):
                raise RuntimeError(
                    "prepare: expected weights whose memory nobody else holds, because 8 bits replace them; got one "
                    f"of shape {tuple(weight.shape)} that a view, a state dict or another model holds too"
                )
        for layer, _ in layers:
            layer.quantize_weights()

    def unprepare(self: M) -> M:
        """Gives the model its original weights back, bit for bit, and returns it.

        Raises:
            PreparedError: the weights were quantised to 8 bits.
        """
        with _PREPARING:
            if self._frozen is not None:
                if self.quantized:
                    _raise_lost()
                for parameter in self.parameters():
                    give_back(parameter)
                self._thaw()
        return self

    def _thaw(self) -> None:
        for name, parameter in self.named_parameters():
            if self._frozen is not None and name in self._frozen:
                parameter.requires_grad_(True)
        self._frozen = self._prepared = self._listed = None

    # -----------------------------------------------------------------------------------------------------------
    # What needs the values of the weights, or gradients, gives them back first.

    def train(self: M, mode: bool = True) -> M:
        """As `nn.Module.train`; training mode needs the original weights."""
        if mode:
            self.unprepare()
        super().train(mode)
        return self

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """As `nn.Module.requires_grad_`, on the original weights."""
        self.unprepare()
        super().requires_grad_(requires_grad)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`: tensors that share memory with the original weights."""
        self.unprepare()
        return super().state_dict(*args, **kwargs)

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        self.unprepare()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unprepare()  # before the layers of the model, whose turn comes after this
        super()._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Completes a copied or unpickled model. Its parameters are ordinary ones already."""
        super().__setstate__(state)
        if self._frozen is not None:
            self._thaw()


def stored_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter. One in 8 bits gives the tensors that its layer computes from, numbered."""
    for name, parameter in model.named_parameters():
        if _is_lossy(parameter):
            leaves = (leaf for leaf in tree_leaves(prepared_with(parameter)) if isinstance(leaf, Tensor))
            yield from ((f"{name}.{i}", leaf) for i, leaf in enumerate(leaves))
        else:
            yield name, readable(parameter).detach()


def weights_of(model: nn.Module) -> list[Tensor]:
    """The tensors that a model computes from: its parameters, and the prepared form of those that are prepared.

    A captured CUDA graph has their addresses fixed and reads them when it runs. Weights in oneDNN's layout, which no
    GPU reads, are left out.
    """
    parts = _parts_of(model)
    known: _Known | None = getattr(model, "_listed", None)
    if known is not None and known.is_of(parts):
        return [*known.weights]
    tensors: list[Tensor] = []
    for parameter in model.parameters():
        form = prepared_with(parameter)
        tensors += [parameter] if form is None else tree_leaves(form)
    tensors = [t for t in tensors if isinstance(t, Tensor) and not t.is_mkldnn]
    if isinstance(model, PreparableModel):
        known = _Known()
        known.parts, known.weights = parts, tensors
        model._listed = known
    return [*tensors]
