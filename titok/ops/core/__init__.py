"""What every op shares: registration, autograd, the choice of a back end, modes, and which back ends there are."""

from titok.ops.core.available import (
    backends,
    extension,
    interpreting,
    why_no_cpp,
    why_no_cuda,
    why_no_flash_attn,
    why_no_triton,
    why_not_float32_or_bfloat16,
)
from titok.ops.core.mode import (
    is_ordinary,
    is_plain,
    last_backend,
    last_backends,
    no_autocast,
    note_backend,
    only_plain,
    through_dispatcher,
)
from titok.ops.core.op import Op, register_composite
from titok.ops.core.parts import Composite, Gradient, Kernel, contiguous, vjp

__all__ = [
    "Composite",
    "Gradient",
    "Kernel",
    "Op",
    "backends",
    "contiguous",
    "extension",
    "interpreting",
    "is_ordinary",
    "is_plain",
    "last_backend",
    "last_backends",
    "no_autocast",
    "note_backend",
    "only_plain",
    "register_composite",
    "through_dispatcher",
    "vjp",
    "why_no_cpp",
    "why_no_cuda",
    "why_no_flash_attn",
    "why_no_triton",
    "why_not_float32_or_bfloat16",
]
