"""Models that are prepared for inference: when their weights are prepared, and when they get their values back.

`model.prepare()` lays weights out for the device that they are on: in oneDNN's blocked layout on a CPU, those of
convolutions channels-last on a GPU, with the upsampling or the shortcut of a convolution folded into it on any device.
The prepared form replaces the weight (`titok.inference.prepared_weights`), so that the model is in memory once.

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
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titok.inference.int8 import check_int8
from titok.inference.prepared_weights import (
    PreparedParameter,
    give_back,
    is_lossy,
    is_sole_owner,
    prepared_with,
    raise_lost,
    readable,
    refused,
)
from titok.ops import only_plain

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
        return any(map(is_lossy, self.parameters()))

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
            refused.found, self._prepared = False, None
            self._frozen = self._frozen or set()
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    self._frozen.add(name)
                    parameter.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, PreparableLayer):
                    module.prepare_weights()
            if not refused.found:
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
            if not is_lossy(weight):
                give_back(weight)
        for _, weight in layers:
            if not is_lossy(weight) and not is_sole_owner(weight):
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
                    raise_lost()
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
        if is_lossy(parameter):
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
