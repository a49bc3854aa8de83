"""Which back ends this machine has: the compiled extension, Triton, flash-attn. Each is imported once.

A `why_no_...` function returns None where the back end can take the given tensors, else the reason in one line.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

# What the ops call in `titok._C`; an extension that lacks one of them was built from another source.
EXTENSION_FUNCTIONS = frozenset(
    {
        "add_layer_norm",
        "add_layer_norm_backward",
        "add_layer_norm_chunks",
        "group_norm_silu",
        "masked_attention",
        "masked_attention_backward",
        "maskgit_decode_step",
        "nearest_codebook",
    }
)


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The module, or in one line why it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything; it must disable one back end only
        return f"{name} does not import here ({type(error).__name__}: {error})".splitlines()[0]
    if name == "titok._C" and (missing := sorted(EXTENSION_FUNCTIONS.difference(dir(module)))):
        return f"titok._C is older than this source, it lacks {', '.join(missing)}: rebuild it (pip install -e .)"
    return module


def extension() -> Any:
    """The module `titok._C`.

    torch is imported before it on purpose: the extension then shares torch's OpenMP runtime, which has the same soname.

    Raises:
        RuntimeError: it is not built here, with the cause.
    """
    module = _load("titok._C")
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def why_no_cpp(*tensors: torch.Tensor | None) -> str | None:
    """Whether the C++ kernels can take these tensors."""
    module = _load("titok._C")
    if isinstance(module, str):
        return module
    on_cpu = all(t is None or t.device.type == "cpu" for t in tensors)
    return None if on_cpu else "the C++ kernels take CPU tensors"


def why_not_float32_or_bfloat16(*dtypes: torch.dtype | None) -> str | None:
    """Whether these are the dtypes that most C++ kernels take; None stands for a dtype that follows the others."""
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, None):
            return f"the C++ kernel takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def why_no_cuda(*tensors: torch.Tensor | None) -> str | None:
    """Whether the CUDA kernels of the extension can take these tensors."""
    module = _load("titok._C")
    if isinstance(module, str):
        return module
    if not module.with_cuda:
        return "titok._C was built without nvcc"
    return None if all(t is None or t.is_cuda for t in tensors) else "the CUDA kernels take CUDA tensors"


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_no_triton(*tensors: torch.Tensor | None) -> str | None:
    """Whether the Triton kernels can take these tensors. The interpreter takes CPU tensors."""
    on_gpu = all(t is None or t.is_cuda for t in tensors)
    if not on_gpu and not interpreting():
        return "Triton kernels take CUDA tensors (or set TRITON_INTERPRET=1)"
    module = _load("triton")
    if isinstance(module, str):
        return module
    return None if interpreting() or torch.cuda.is_available() else "no CUDA device"


def why_no_flash_attn(*tensors: torch.Tensor | None) -> str | None:
    """Whether the package flash-attn can take these tensors."""
    module = _load("flash_attn")
    if isinstance(module, str):
        return module
    return None if all(t is None or t.is_cuda for t in tensors) else "flash-attn takes CUDA tensors"


def backends() -> dict[str, str]:
    """Which back ends can run on this machine: name -> "available", or in one line why not.

    `plain` and `sdpa` are PyTorch's own ops; `cpp` and `cuda` are the two halves of the extension `titok._C`.
    """
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    reasons = {
        "plain": None,
        "cpp": why_no_cpp(),
        "cuda": why_no_cuda() or no_gpu,
        "triton": why_no_triton(),
        "sdpa": None,
        "flash-attn": why_no_flash_attn() or no_gpu,
    }
    return {name: reason or "available" for name, reason in reasons.items()}
