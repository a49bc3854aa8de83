"""Weights that inference uses_prepared_weights once, and the switch to compute without them.

Where no gradient is wanted, the layers of `titok.models.layers` compute from what was prepared from their weights:
oneDNN's blocked layout on a CPU, folded convolutions and sums on any device. What is prepared is kept beside the
weights, takes as much memory again, and is made anew when the weights change. `with plain():` computes from the weights
themselves, and without the kernels of `titok.ops`: the path to check the other against.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from titok.ops import is_plain, only_plain

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def plain(on: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within, models compute as they do in training, and every op of `titok.ops` runs its plain PyTorch path."""
    return only_plain(on)


def select(engine: str) -> contextlib.AbstractContextManager[None]:
    """The context that `engine` names: "fast" or "plain"; `ValueError` for any other."""
    if engine not in ("fast", "plain"):
        raise ValueError(f"engine: expected 'fast' or 'plain', got {engine!r}")
    return plain() if engine == "plain" else contextlib.nullcontext()


def uses_prepared_weights() -> bool:
    """True when gradients are off, plain mode is off, and neither torch.compile nor autocast is active."""
    casts = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not (is_plain() or casts or torch.is_grad_enabled() or torch.compiler.is_compiling())


_PROBES = 16


class PreparedWeight(Generic[T]):
    """Something made of parameters, kept until they change.

    A change is seen by address, version, or the values at a few places: loops that average weights through `.data`
    leave no other trace. A copied or unpickled module starts without it.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._probes: list[tuple[Any, bytes]] = []
        self._made: Any = None

    def get(self, make: Callable[[], T], *weights: Tensor | None, key: object = None) -> T:
        """What `make()` gives for these weights as they are now, and for this `key`."""
        given = [w for w in weights if w is not None]
        state = [key, *map(stamp, given)]
        if state != self._state or any(view.tobytes() != seen for view, seen in self._probes):
            self._made = make()
            self._state = state
            self._probes = [(view, view.tobytes()) for view in map(_probe, given) if view is not None]
        made: T = self._made
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedWeight[T]:
        return PreparedWeight()

    def __reduce__(self) -> Any:
        return PreparedWeight, ()


def stamp(weight: Tensor) -> tuple[int, torch.dtype, int | None]:
    """What changes when a weight is replaced, moved, recast or written to (inference tensors count no versions)."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version


def _probe(weight: Tensor) -> Any:
    """A strided numpy view of some values; None where looking would cost more (another device, another layout)."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return None
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().view(-1).view(bits).numpy()[:: max(1, weight.numel() // _PROBES)]


_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@functools.cache
def bfloat16_is_native() -> bool:
    """Whether this CPU multiplies bfloat16 itself, and `ONEDNN_MAX_CPU_ISA` lets it."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BFLOAT16:
        return False
    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")
    if (capabilities := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return any(capabilities().get(name, False) for name in names)
    with contextlib.suppress(OSError):  # a release before that function
        return not set(names).isdisjoint(Path("/proc/cpuinfo").read_text().split())
    return False


_twins: weakref.WeakKeyDictionary[nn.Module, PreparedWeight[Any]] = weakref.WeakKeyDictionary()


def float32_copy(model: M) -> M:
    """A float32 copy of a bfloat16 model on a CPU that only emulates bfloat16 (faster, no less exact); else `model`."""
    weight = next(model.parameters())
    if (
        weight.dtype != torch.bfloat16
        or weight.device.type != "cpu"
        or not uses_prepared_weights()
        or bfloat16_is_native()
    ):
        return model
    twin: PreparedWeight[M] = _twins.setdefault(model, PreparedWeight())
    return twin.get(lambda: copy.deepcopy(model).float(), *model.parameters())
