"""Nearest codebook row of each latent: the look-up of a vector quantizer, without the distance matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import check_tensor
from titok.ops._extension import extension, why_no_cpp, why_no_triton
from titok.ops._registry import choose, register, runs_eagerly
from titok.profiling import ranged

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPP_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum FloatType of csrc/nearest_codebook.h
# Scores that the plain path holds at a time: 16 MiB of float32.
_PLAIN_CHUNK = 1 << 22


@overload
def nearest_codebook(
    latents: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = ...,
    return_quantized: Literal[False] = ...,
    out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def nearest_codebook(
    latents: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = ...,
    return_quantized: Literal[True],
    out: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@ranged("nearest_codebook")
def nearest_codebook(
    latents: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = False,
    return_quantized: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the codebook row with the least squared distance to each latent.

    Distances are compared in float32 whatever the dtypes and the settings for TF32, bfloat16 or autocast, in
    float64 if an argument is float64 (back end `plain` only). Equal distances give the lowest index. The
    (M, V) matrix of distances is never stored.

    A latent whose sum of squares is not finite (it holds a NaN, an infinity, or overflows) gets index 0; a
    codebook row whose sum of squares is not finite is never chosen, unless all are such: then index 0 is.

    Args:
        latents: (..., C), floating point, any strides.
        codebook: (V, C), floating point, V and C at least 1.
        normalize: divide latents and rows by their l2 norms first, norms below 1e-12 counting as 1e-12
            (a NaN is still a NaN: the two rules above are about the values before).
        return_quantized: also return the chosen rows, divided by their norms under `normalize`.
        out: (...) int64, takes the indices.
        backend: `plain`, `cpp` (CPU), `triton` (CUDA), or None for the fastest.

    Returns:
        indices (...) int64, or with `return_quantized` a pair of them and rows (..., C) in float32 (float64 if
        an argument is). The rows carry a gradient to the codebook, the indices none.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: shapes or devices don't fit together, or `backend` is not one of this op.
        RuntimeError: the named back end can't run here.
    """
    _check(latents, codebook)
    if out is not None:
        check_tensor("out", out, shape=latents.shape[:-1], dtypes=(torch.int64,), device=latents.device)
    requested = backend or "auto"
    if runs_eagerly(latents, codebook):
        indices = _run(latents, codebook, normalize, requested, out)
    else:
        indices = _OP(latents, codebook, normalize, requested)
        if out is not None:
            indices = out.copy_(indices)
    return (indices, look_up(indices, codebook, normalize, latents.dtype)) if return_quantized else indices


def look_up(indices: Tensor, codebook: Tensor, normalize: bool, like: torch.dtype | None = None) -> Tensor:
    """The rows (..., C) of a codebook (V, C) at indices (...), in float32 or float64, normalised if asked."""
    rows = F.embedding(indices, codebook.to(compute_dtype(codebook.dtype, like or codebook.dtype)))
    return F.normalize(rows, dim=-1) if normalize else rows


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What quantizers compute in: float32, but float64 where a float64 tensor takes part."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check(latents: Tensor, codebook: Tensor) -> None:
    check_tensor("codebook", codebook, shape=("V", "C"), dtypes=_FLOATS)
    rows, width = codebook.shape
    if rows < 1 or width < 1:
        raise ValueError(f"codebook: expected shape (V, C) with V, C >= 1, got {tuple(codebook.shape)}")
    check_tensor("latents", latents, shape=("...", width), dtypes=_FLOATS, device=codebook.device)


def _registered(latents: Tensor, codebook: Tensor, normalize: bool = False, backend: str = "auto") -> Tensor:
    """What the dispatcher calls, also for those who call `torch.ops.titok.nearest_codebook` without any check."""
    _check(latents, codebook)
    return _run(latents, codebook, normalize, backend, None)


def _run(latents: Tensor, codebook: Tensor, normalize: bool, backend: str, out: Tensor | None) -> Tensor:
    """The op on real tensors: picks a back end and gives it flat rows and an output."""
    name = choose("nearest_codebook", backend, _candidates(latents, codebook))
    rows = latents.detach().reshape(-1, latents.shape[-1])
    indices = out
    if indices is None or not indices.is_contiguous():
        indices = latents.new_empty(latents.shape[:-1], dtype=torch.int64)
    if rows.shape[0]:
        _LAUNCH[name](rows, codebook.detach(), normalize, indices.view(-1))
    return indices if out is None or indices is out else out.copy_(indices)


def _candidates(latents: Tensor, codebook: Tensor) -> dict[str, Callable[[], str | None]]:
    """Back ends, fastest first."""

    def why_not(missing: Callable[..., str | None]) -> str | None:
        if compute_dtype(latents.dtype, codebook.dtype) == torch.float64:
            return "float64 arguments take the plain path"
        return missing(latents, codebook)

    candidates: dict[str, Callable[[], str | None]] = {
        "cpp": lambda: why_not(why_no_cpp),
        "plain": lambda: None,
        "triton": lambda: why_not(why_no_triton),
    }
    if latents.is_cuda:
        candidates = dict(reversed(candidates.items()))
    return candidates


def _plain(latents: Tensor, codebook: Tensor, normalize: bool, out: Tensor) -> None:
    """Chunks of rows: |e|^2 / 2 - z.e by one matrix product, then its arg min (|z|^2 moves no minimum)."""
    dtype = compute_dtype(latents.dtype, codebook.dtype)
    if dtype == torch.float32 and _products_are_reduced(latents.device.type):
        dtype = torch.float64
    with torch.autocast(latents.device.type, enabled=False):
        codes, usable = _prepared(codebook.to(dtype), normalize)
        half_squares = (codes.square().sum(-1) / 2).masked_fill_(~usable, torch.inf)
        step = max(1, _PLAIN_CHUNK // codebook.shape[0])
        for chunk, indices in zip(latents.split(step), out.split(step), strict=True):
            rows, finite = _prepared(chunk.to(dtype), normalize)
            scores = torch.addmm(half_squares, rows, codes.T, alpha=-1)
            torch.argmin(scores, dim=1, out=indices)
            indices.mul_(finite)


def _prepared(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Rows as they are compared, zero where their float32 sum of squares is not finite, and where it is."""
    finite = x.float().square().sum(-1).isfinite()
    x = x.masked_fill(~finite[:, None], 0)
    return (F.normalize(x, dim=-1) if normalize else x), finite


def _products_are_reduced(device_type: str) -> bool:
    """Whether float32 matrix products are set to TF32 or bfloat16 here. Reading the setting and computing in
    float64 instead keeps the op free of global state."""
    settings = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return settings.matmul.fp32_precision not in ("none", "ieee")


def _cpp(latents: Tensor, codebook: Tensor, normalize: bool, out: Tensor) -> None:
    latents, codebook = _unit_stride(latents), _unit_stride(codebook)
    extension().nearest_codebook(
        latents.data_ptr(),
        _CPP_TYPES[latents.dtype],
        latents.shape[0],
        latents.stride(0),
        codebook.data_ptr(),
        _CPP_TYPES[codebook.dtype],
        codebook.shape[0],
        codebook.stride(0),
        codebook.shape[1],
        normalize,
        out.data_ptr(),
    )


def _triton(latents: Tensor, codebook: Tensor, normalize: bool, out: Tensor) -> None:
    from titok.kernels import nearest_codebook as kernels

    kernels.forward(latents.float().contiguous(), codebook.float().contiguous(), normalize, out)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


_LAUNCH = {"plain": _plain, "cpp": _cpp, "triton": _triton}


def _fake(latents: Tensor, codebook: Tensor, normalize: bool = False, backend: str = "auto") -> Tensor:
    _check(latents, codebook)
    return latents.new_empty(latents.shape[:-1], dtype=torch.int64)


_OP = register(
    "nearest_codebook(Tensor latents, Tensor codebook, bool normalize=False, str backend='auto') -> Tensor",
    _registered,
    _fake,
)
