"""What a kernel module tells `python -m titok.kernels.aot` to compile: its `aot_variants()` returns these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from titok.kernels._launch import Launch


@dataclass(frozen=True)
class AotVariant(Launch):
    """A recorded launch with its label in the table and what its machine code must contain."""

    label: str  # e.g. "bf16 D=512"
    expects_tensor_cores: bool = False
    expects_wide_loads: bool = True  # at least one load of 16 bytes from global memory


def label_launches(
    launches: Iterable[Launch], label: str, *, expects_tensor_cores: bool = False
) -> list[AotVariant]:
    return [
        AotVariant(**vars(launch), label=label, expects_tensor_cores=expects_tensor_cores) for launch in launches
    ]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, for a launcher whose launches are recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")


def name_of(dtype: torch.dtype) -> str:
    """The dtype as labels name it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
