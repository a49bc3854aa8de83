"""What a kernel module tells `python -m titok.kernels.aot` to compile: its `aot_variants()` returns these."""

from __future__ import annotations

from typing import Any, NamedTuple


class AotVariant(NamedTuple):
    """One compiled form of one kernel, as a preset launches it."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # every run-time argument in order -> "*bf16", "*fp32", "*i64", "i32", "i64", "fp32"
    constexprs: dict[str, Any]  # every tl.constexpr argument -> value; also strides that are 1 at launch
    num_warps: int
    num_stages: int
    label: str  # what the table shows, e.g. "forward bf16 L-32"
    expects_tensor_cores: bool  # whether its dots must become tensor-core instructions
    unaligned: frozenset[str] = (
        frozenset()
    )  # arguments that are no multiple of 16; pointers and `stride_*` else are
