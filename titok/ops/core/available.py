"""Which back ends this machine has: the compiled extension, Triton, flash-attn. Each is imported once.

A `why_no_...` function returns None where the back end can take the given tensors, else the reason in one line.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
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
        "group_norm_silu_backward",
        "int8_linear",
        "masked_attention",
        "masked_attention_backward",
        "masked_decode_partial",
        "masked_decode_step",
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
        reason = f"{name} does not import here ({type(error).__name__}: {error})".splitlines()[0]
        found = [line for line in left_out() if line.startswith(f"{name}: ")]
        return f"{reason}; it was left out of the build: {found[0].removeprefix(f'{name}: ')}" if found else reason
    if name == "titok._C" and (missing := sorted(EXTENSION_FUNCTIONS.difference(dir(module)))):
        return f"titok._C is older than this source, it lacks {', '.join(missing)}: rebuild it (pip install -e .)"
    return module


def left_out() -> list[str]:
    """What the build of `titok._C` left out, each with the reason in one line; setup.py writes the file."""
    try:
        return (Path(__file__).parents[2] / "_C.left_out.txt").read_text().splitlines()
    except OSError:
        return []


@functools.cache
def _warn_of_failed_build() -> None:
    """Warns once in a process that the build lost the C++ kernels, unless it was told to leave them out."""
    found = [line for line in left_out() if line.startswith("titok._C: ") and "TITOK_BUILD=" not in line]
    if found:
        warnings.warn(f"ops run in plain PyTorch, because the build left out {found[0]}", stacklevel=2)


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
        if tensors:  # an op would run here
            _warn_of_failed_build()
        return module
    on_cpu = all(t is None or t.device.type == "cpu" for t in tensors)
    return None if on_cpu else "the C++ kernels take CPU tensors"


def why_not_float32_or_bfloat16(*dtypes: torch.dtype | None) -> str | None:
    """Whether these are the dtypes that most C++ kernels take; None stands for a dtype that follows the others."""
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, None):
            return f"the C++ kernel takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


# The oldest GPUs that Triton supports and that csrc/ is compiled for: those of the Ampere generation.
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def why_too_old(device: torch.device) -> str | None:
    """Whether a GPU is too old for the kernels."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    needed, actual = (".".join(map(str, numbers)) for numbers in (OLDEST_CAPABILITY, capability))
    return f"the kernels take GPUs of compute capability {needed} or above, and {device} has {actual}"


def why_no_gpu() -> str | None:
    """Whether no GPU of this machine can run the kernels."""
    reasons = [why_too_old(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return None if None in reasons else next(iter(reasons), "no CUDA device")


def _why_no_gpu_of(tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    """Whether the GPU of these CUDA tensors is too old; without tensors, whether every GPU is."""
    given = [t for t in tensors if t is not None]
    return why_too_old(given[0].device) if given else why_no_gpu()


def why_no_cuda(*tensors: torch.Tensor | None) -> str | None:
    """Whether the CUDA kernels of the extension can take these tensors."""
    module = _load("titok._C")
    if isinstance(module, str):
        return module
    if not module.with_cuda:
        cause = next((line for line in left_out() if line.startswith("the CUDA half of titok._C: ")), "")
        return f"titok._C was built without nvcc{cause.removeprefix('the CUDA half of titok._C')}"
    if not all(t is None or t.is_cuda for t in tensors):
        return "the CUDA kernels take CUDA tensors"
    return _why_no_gpu_of(tensors)


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
    return None if interpreting() else _why_no_gpu_of(tensors)


def why_no_flash_attn(*tensors: torch.Tensor | None) -> str | None:
    """Whether the package flash-attn can take these tensors."""
    module = _load("flash_attn")
    if isinstance(module, str):
        return module
    if not all(t is None or t.is_cuda for t in tensors):
        return "flash-attn takes CUDA tensors"
    return _why_no_gpu_of(tensors)


def backends() -> dict[str, str]:
    """Which back ends can run on this machine: name -> "available", or in one line why not.

    `plain` and `sdpa` are PyTorch's own ops; `cpp` and `cuda` are the two halves of the extension `titok._C`.
    """
    reasons = {
        "plain": None,
        "cpp": why_no_cpp(),
        "cuda": why_no_cuda(),
        "triton": why_no_triton(),
        "sdpa": None,
        "flash-attn": why_no_flash_attn(),
    }
    return {name: reason or "available" for name, reason in reasons.items()}
