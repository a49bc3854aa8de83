"""Loads what may be missing: the compiled extension, Triton, flash-attn. Each is tried once, its error kept."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

# of `titok._C`, what the ops call on a CPU
FUNCTIONS = frozenset(
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
    """The module, or in one line why it is not to be had."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken install may raise anything; it must disable one back end only
        return f"{name} does not import here ({type(error).__name__}: {error})".splitlines()[0]
    if name == "titok._C" and (missing := sorted(FUNCTIONS.difference(dir(module)))):
        return f"titok._C is older than this source, it lacks {', '.join(missing)}: rebuild it (pip install -e .)"
    return module


def extension() -> Any:
    """`titok._C`; `RuntimeError` with the cause where it is not built. torch is imported first on purpose:
    the extension then shares torch's OpenMP runtime (same soname) instead of bringing a second one."""
    module = _load("titok._C")
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def why_no_cpp(*tensors: torch.Tensor) -> str | None:
    """None where the C++ kernels can take these tensors, else the reason."""
    module = _load("titok._C")
    if isinstance(module, str):
        return module
    return None if all(t.device.type == "cpu" for t in tensors) else "the C++ kernels take CPU tensors"


def why_no_cuda(*tensors: torch.Tensor) -> str | None:
    """None where the extension's CUDA kernels can take these tensors, else the reason."""
    module = _load("titok._C")
    if isinstance(module, str):
        return module
    if not module.with_cuda:
        return "titok._C was built without nvcc"
    return None if all(t.is_cuda for t in tensors) else "the CUDA kernels take CUDA tensors"


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_no_triton(*tensors: torch.Tensor) -> str | None:
    """None where Triton kernels can take these tensors (the interpreter takes CPU ones), else the reason."""
    module = _load("triton")
    if isinstance(module, str):
        return module
    if all(t.is_cuda for t in tensors) and not interpreting():
        return None if torch.cuda.is_available() else "no CUDA device"
    if interpreting():
        return None
    return "Triton kernels take CUDA tensors (or set TRITON_INTERPRET=1)"


def why_no_flash_attn(*tensors: torch.Tensor) -> str | None:
    """None where the flash-attn package can take these tensors, else the reason."""
    module = _load("flash_attn")
    if isinstance(module, str):
        return module
    return None if all(t.is_cuda for t in tensors) else "flash-attn takes CUDA tensors"


def backends() -> dict[str, str]:
    """Which back ends can run on this machine: name -> "available", or in one line why not.

    `plain` is PyTorch's own ops, `cpp` and `cuda` are the two halves of the extension `titok._C`.
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
