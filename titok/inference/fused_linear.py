"""Linear layers of a transformer block, with what follows them in one launch (`kernels/linear.py`).

Two tables choose the layers that are computed so: those for which an H200 has shown that these kernels are faster than
PyTorch's products; of the second kind there are none yet. For other layers `gelu` and `add_norm` return None, and their
callers make separate launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops import is_plain
from titok.ops.core.available import why_no_triton
from titok.ops.core.mode import is_ordinary

# Layers (K, N), inputs and outputs, and the most rows with which each is computed so. 768 x 3,072 is in the generators.
LINEAR_GELU_LAYERS: dict[tuple[int, int], int] = {(768, 3072): 192}
LINEAR_ADD_NORM_LAYERS: frozenset[tuple[int, int]] = frozenset()

_COUNTERS = 1 << 16  # blocks of rows: four million rows of 64 to a block

_counters: ContextVar[Tensor | None] = ContextVar("titok_fused_linear_counters", default=None)


def new_counters(device: torch.device) -> Tensor | None:
    """What `add_norm` counts in, for one run at a time; None where no layer is chosen for it."""
    if not LINEAR_ADD_NORM_LAYERS or device.type != "cuda":
        return None
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@contextlib.contextmanager
def counters(zeros: Tensor | None) -> Iterator[None]:
    """Within, `add_norm` counts in `new_counters(...)` of the caller, who runs nothing else with them meanwhile.

    It holds for the current context (`contextvars`), not for other threads.
    """
    token = _counters.set(zeros)
    try:
        yield
    finally:
        _counters.reset(token)


def _current() -> Tensor | None:
    # torch.compile cannot read a ContextVar; compiled models make separate launches.
    return None if torch.compiler.is_compiling() else _counters.get()


def is_counting() -> bool:
    """Whether `counters` gave this context something to count in."""
    return _current() is not None


def gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """gelu(x @ weight^T + bias), the exact GELU, or None where the layer is not chosen or cannot be computed so.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N).
    """
    most = LINEAR_GELU_LAYERS.get((weight.shape[-1], len(weight)), 0)
    if x.numel() > most * x.shape[-1] or not _is_usable(LINEAR_GELU_LAYERS, x, weight, bias):
        return None
    from titok.kernels import linear

    out = x.new_empty(*x.shape[:-1], len(weight))
    linear.gelu_forward(x.flatten(0, -2), weight.detach(), bias, out.flatten(0, -2))
    return out


def gelu_of(x: Tensor) -> Tensor:
    """gelu(x), in the memory of x where a kernel computes it: x must belong to the caller alone."""
    fits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous() and x.numel() > 0
    if not fits or why_no_triton(x) is not None or not is_ordinary_call([x]):
        return F.gelu(x)
    from titok.kernels import linear

    linear.gelu(x)
    return x


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """The sum x @ weight^T + bias + residual and its LayerNorm, or None as for `gelu` and outside of `counters`.

    Args:
        x, weight, bias: as of `gelu`.
        residual: (..., N).
        norm_weight, norm_bias: (N,).

    Returns:
        two tensors (..., N).
    """
    zeros, chosen = _current(), LINEAR_ADD_NORM_LAYERS
    if zeros is None or not _is_usable(chosen, x, weight, bias, residual, norm_weight, norm_bias):
        return None
    from titok.kernels import linear

    if linear.row_blocks(x.numel() // x.shape[-1]) > len(zeros):
        return None
    total, normalised = torch.empty_like(residual), torch.empty_like(residual)
    rows = (t.flatten(0, -2) for t in (residual, total, normalised))
    residual_rows, total_rows, normalised_rows = rows
    linear.add_norm_forward(
        x.flatten(0, -2), weight.detach(), bias, residual_rows, norm_weight, norm_bias, eps,
        total_rows, normalised_rows, zeros,
    )  # fmt: skip
    return total, normalised


def _is_usable(chosen: Container[tuple[int, int]], x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether a layer is chosen, and the kernels can take these tensors: 16 bits, contiguous, without gradients."""
    if (weight.shape[-1], len(weight)) not in chosen:
        return False
    tensors = [t for t in (x, weight, *others) if t is not None]
    return (
        is_ordinary_call(tensors)
        and why_no_triton(*tensors) is None
        and x.numel() > 0
        and weight.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == weight.dtype and t.is_contiguous() for t in tensors)
    )


def is_ordinary_call(tensors: list[Tensor]) -> bool:
    """Whether nothing is traced, transformed, differentiated or computed in plain mode or under autocast."""
    return (
        all(map(is_ordinary, tensors))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not is_plain()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
    )
