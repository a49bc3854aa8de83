"""Launches every kernel of this folder, or records the launch instead of running it.

Triton compiles a kernel once for every combination of argument types, of integers that are 1, of integers and
pointers that are multiples of 16, of compile-time constants, warps and pipeline stages. Within `record` a launcher
yields exactly these, on any device and without a GPU: `titok.kernels.aot` compiles them ahead of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "u1",
}
_RECORDED_MULTIPROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for one launch of one kernel."""

    kernel: Any  # the function under @triton.jit
    signature: dict[str, str]  # run-time argument -> type in Triton's notation, e.g. "*bf16", "i32", "fp32"
    # tl.constexpr argument -> value. Absent tensors (None) and integers that are 1 are compiled in likewise.
    constexprs: dict[str, Any]
    aligned: frozenset[str]  # run-time arguments that are multiples of 16: pointers, in bytes, and integers
    num_warps: int
    num_stages: int
    fp_fusion: bool  # whether the compiler may fuse a multiplication and an addition, which rounds once


_recorded: ContextVar[list[Launch] | None] = ContextVar("titok_kernels_recorded", default=None)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within, `launch` runs nothing and appends to the list that this yields.

    Tensors may then be on the meta device or fake. Holds for the current context (`contextvars`): other threads
    launch as usual.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: torch.Tensor | float | None,
    num_warps: int,
    num_stages: int,
    fp_fusion: bool = True,
    **constexprs: Any,
) -> None:
    """Runs a kernel on the GPU that holds its tensors, or records the launch.

    Args:
        kernel: a function under @triton.jit.
        grid: number of programs along one to three axes.
        args: its run-time arguments in order; at least one is a tensor.
        fp_fusion: whether the compiler may fuse a multiplication and an addition; False rounds each of them.
        constexprs: its tl.constexpr arguments.
    """
    launches = _recorded.get()
    if launches is not None:
        launches.append(describe(kernel, args, constexprs, num_warps, num_stages, fp_fusion))
        return
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device; nothing changes for a CPU tensor
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
        kernel[grid](*args, **options, **constexprs)


def count_multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors: 132 while launches are recorded, 1 for a CPU (Triton's interpreter)."""
    if _recorded.get() is not None:
        return _RECORDED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def describe(
    kernel: Any,
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    fp_fusion: bool = True,
) -> Launch:
    """What Triton would compile for a launch with these arguments."""
    # Kernels under Triton's interpreter lack the attribute; they are never compiled.
    generic = getattr(kernel, "do_not_specialize", None) or ()
    signature: dict[str, str] = {}
    constants = dict(constexprs)
    aligned = set()
    for name, value in zip(kernel.arg_names, args, strict=False):  # the other names are the constexprs
        specialised = name not in generic
        if value is None or (specialised and isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        signature[name] = _type_of(name, value)
        if specialised and _is_multiple_of_16(value):
            aligned.add(name)
    return Launch(kernel, signature, constants, frozenset(aligned), num_warps, num_stages, fp_fusion)


def _type_of(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"{name}: expected a tensor, an int, a float or None, got {type(value).__name__}")


def _is_multiple_of_16(value: torch.Tensor | float) -> bool:
    if isinstance(value, torch.Tensor):  # its storage starts at a multiple of 16: PyTorch's allocators align to 64
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
