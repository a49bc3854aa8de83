"""What a kernel module tells `python -m titok.kernels.aot` to compile: its `aot_variants()` returns these."""

from __future__ import annotations

from typing import Any, NamedTuple


class AotVariant(NamedTuple):
    """One compiled form of one kernel, as a preset launches it.

    Pointers and the arguments named `stride_*` are taken for multiples of 16, as launches with whole aligned tensors
    specialise on; `unaligned` names the exceptions. Other integers are taken to be anything.
    """

    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # run-time argument -> "*bf16", "*fp32", "*i64", "i32", "i64", "fp32"
    constexprs: dict[str, Any]  # tl.constexpr argument -> value; also a stride that is 1, a pointer that is None
    num_warps: int
    num_stages: int
    label: str  # what the table shows, e.g. "forward bf16 L-32"
    expects_tensor_cores: bool  # whether its dots must become tensor-core instructions
    unaligned: frozenset[str] = frozenset()
    expects_wide_loads: bool = True  # whether it must read global memory 16 bytes at a time
