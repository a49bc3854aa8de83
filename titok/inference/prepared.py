"""What inference computes from weights once and reuses, and the switch that computes without it.

When no gradients are wanted, the layers of `titok.models.layers` compute from prepared weights: in oneDNN's
blocked layout on a CPU, folded convolutions and fused sums on any device. A prepared weight is kept beside the
weight, takes about as much memory again, and is prepared anew when the weight changes.

In plain mode (`with plain():`) models compute from the weights themselves and without the kernels of `titok.ops`.
It is there to check the fast path against.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from titok.ops import is_plain, only_plain

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


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


def uses_prepared_weights() -> bool:
    """True when gradients are off, plain mode is off, and neither torch.compile nor autocast is active."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_plain():
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


class _Kept(NamedTuple):
    """A prepared value, and the weights that it was prepared from, as far as a change can be told."""

    state: list[Any]  # the key, then `weight_state` of each weight
    samples: list[tuple[Any, bytes]]  # a strided numpy view of each weight, and the bytes that it showed
    value: Any


class PreparedWeight(Generic[T]):
    """A value that is computed from weights and kept until they change.

    A weight has changed when its address, dtype or version differs, or one of a few of its values. The values are
    needed because code that averages weights through `.data` leaves address and version as they are.

    The object belongs to a module as a plain attribute. It is in no state dict, and a copied or unpickled module
    starts with an empty one. Threads may call `get` at the same time: each gets a value of the weights and key
    that it passed.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(self, make: Callable[[], T], *weights: Tensor | None, key: object = None) -> T:
        """The value of `make()` for these weights, called only if weights or key differ from those of the last
        call.

        Args:
            make: computes the value from the weights as they are now.
            weights: what the value depends on; None entries are skipped.
            key: whatever else the value depends on.
        """
        given = [weight for weight in weights if weight is not None]
        state = [key, *map(weight_state, given)]
        kept = self._kept  # one read, because another thread may replace it meanwhile
        if kept is None or kept.state != state or any(view.tobytes() != seen for view, seen in kept.samples):
            value = make()
            views = [view for view in map(_strided_view, given) if view is not None]
            kept = self._kept = _Kept(state, [(view, view.tobytes()) for view in views], value)
        result: T = kept.value
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedWeight[T]:
        return PreparedWeight()

    def __reduce__(self) -> Any:
        return PreparedWeight, ()


def weight_state(weight: Tensor) -> tuple[int, torch.dtype, int | None]:
    """Address, dtype and version: what differs after a weight was replaced, moved, recast or written to.

    The version is None for inference tensors, which PyTorch does not count versions of.
    """
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version


_SAMPLES_PER_WEIGHT = 16


def _strided_view(weight: Tensor) -> Any:
    """A numpy view of about 16 values of a weight, or None where reading them is not cheap: another device, or a
    weight that is not contiguous."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return None
    same_size_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    step = max(1, weight.numel() // _SAMPLES_PER_WEIGHT)
    return weight.detach().view(-1).view(same_size_int).numpy()[::step]


# Values of ONEDNN_MAX_CPU_ISA that forbid oneDNN the instructions for bfloat16.
_ISA_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@functools.cache
def bfloat16_is_native() -> bool:
    """Whether this CPU has instructions for bfloat16 products, and `ONEDNN_MAX_CPU_ISA` allows them."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISA_WITHOUT_BFLOAT16:
        return False
    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")
    if (capabilities := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return any(capabilities().get(name, False) for name in names)
    with contextlib.suppress(OSError):  # PyTorch releases without that function
        return not set(names).isdisjoint(Path("/proc/cpuinfo").read_text().split())
    return False


class Float32Copy(Generic[M]):
    """The float32 copy of one bfloat16 model, for CPUs that only emulate bfloat16: faster there, and no less
    exact.

    The model owns it as a plain attribute: it is in no state dict, and a copied or unpickled model starts without
    one.
    """

    def __init__(self) -> None:
        self._copy: PreparedWeight[M] = PreparedWeight()

    def of(self, model: M) -> M:
        """The model to compute with: in inference on a CPU that emulates bfloat16 the copy, else `model`."""
        weight = next(model.parameters())
        if (
            weight.dtype != torch.bfloat16
            or weight.device.type != "cpu"
            or not uses_prepared_weights()
            or bfloat16_is_native()
        ):
            return model
        return self._copy.get(lambda: copy.deepcopy(model).float(), *model.parameters())
