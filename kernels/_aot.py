"""What a kernel module tells `python -m titok.kernels.aot` to compile: its `aot_variants()` returns these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from titok.kernels._launch import Launch


@dataclass(frozen=True)
class AotVariant(Launch):
    """A recorded launch with its label in the table and what its machine code must contain."""

    label: str  # e.g. "bf16 D=512"
    expects_tensor_cores: bool = False
    expects_wide_loads: bool = True  # at least one load of 16 bytes from global memory
    is_preset: bool = True  # a launch of a preset; False: one of `with_other_integers`


def label_launches(
    launches: Iterable[Launch], label: str, *, expects_tensor_cores: bool = False
) -> list[AotVariant]:
    return [
        AotVariant(**vars(launch), label=label, expects_tensor_cores=expects_tensor_cores) for launch in launches
    ]


def with_other_integers(variants: Iterable[AotVariant]) -> list[AotVariant]:
    """Launches with every integer argument equal to 1, to 16 and to 17, which are not among those given.

    These are the three ways in which Triton compiles an integer: as a constant, as a multiple of 16, and as any number.
    One launch of each kernel and kind of pointers stands for all, because the others differ in tile sizes alone.
    """
    variants = list(variants)
    first: dict[object, AotVariant] = {}
    for variant in variants:
        pointers = tuple(item for item in variant.signature.items() if item[1].startswith("*"))
        first.setdefault((variant.kernel.__name__, pointers), variant)
    known = {_what_is_compiled(variant) for variant in variants}
    others = [_with_integers(variant, value) for variant in first.values() for value in (1, 16, 17)]
    return [variant for variant in others if _what_is_compiled(variant) not in known]


def _with_integers(variant: AotVariant, value: int) -> AotVariant:
    """The launch with every integer equal to `value`, but for those that the kernel does not specialise."""
    generic = getattr(variant.kernel, "do_not_specialize", None) or ()
    annotated = variant.kernel.fn.__annotations__  # the tl.constexpr arguments alone
    types = {**dict.fromkeys(variant.constexprs, "i32"), **variant.signature}
    integers = {
        name
        for name, kind in types.items()
        if kind in ("i32", "i64") and name not in (*generic, *annotated)
        if variant.constexprs.get(name, 1) is not None
    }
    kept = {name: kind for name, kind in variant.signature.items() if name not in integers}
    constants = {name: constant for name, constant in variant.constexprs.items() if name not in integers}
    aligned = variant.aligned - integers
    changes: dict[str, Any] = {
        "signature": kept if value == 1 else kept | dict.fromkeys(integers, "i32"),
        "constexprs": constants | dict.fromkeys(integers, 1) if value == 1 else constants,
        "aligned": aligned | integers if value % 16 == 0 else aligned,
        "label": f"{variant.label}, integers {value}",
        "expects_wide_loads": False,
        "is_preset": False,
    }
    return replace(variant, **changes)


def _what_is_compiled(launch: Launch) -> tuple[object, ...]:
    described = (launch.signature, launch.constexprs)
    sets = [frozenset(values.items()) for values in described]
    return launch.kernel.__name__, *sets, launch.aligned, launch.num_warps, launch.num_stages


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, for a launcher whose launches are recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")


def name_of(dtype: torch.dtype) -> str:
    """The dtype as labels name it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
