"""Nearest codebook row of each latent: the look-up of a vector quantizer, without the distance matrix."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_bool, check_tensor
from titok.ops.core.available import extension, why_no_cpp, why_no_triton
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Kernel

MAX_CODES = (1 << 31) - 1025  # the kernels count codes, and the padding behind the last one, in 32 bits

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


@overload
def nearest_codebook(
    latents: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = ...,
    return_quantized: bool,
    out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
        codebook: (V, C), floating point, V and C at least 1, V at most 2^31 - 1025.
        normalize: divide latents and rows by their l2 norms first, norms below 1e-12 counting as 1e-12
            (a NaN is still a NaN: the two rules above are about the values before).
        return_quantized: also return the chosen rows, divided by their norms under `normalize`.
        out: (...) int64, takes the indices.
        backend: "triton", "cpp" (CPU), "plain", or None for the fastest that can run.

    Returns:
        indices (...) int64, or with `return_quantized` a pair of them and rows (..., C) in float32 (float64 if
        an argument is). The rows carry a gradient to the codebook, the indices none.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: shapes or devices do not fit together, or `backend` is not one of this op.
        RuntimeError: the named back end cannot run here.
    """
    check_bool("return_quantized", return_quantized)
    (indices,) = _NEAREST_CODEBOOK(
        latents, codebook, normalize, out=None if out is None else (out,), backend=backend
    )
    return (indices, look_up(indices, codebook, normalize, latents.dtype)) if return_quantized else indices


def look_up(indices: Tensor, codebook: Tensor, normalize: bool, like: torch.dtype | None = None) -> Tensor:
    """The rows (..., C) of a codebook (V, C) at indices (...), in float32 or float64, normalised if asked."""
    rows = F.embedding(indices, codebook.to(compute_dtype(codebook.dtype, like or codebook.dtype)))
    return F.normalize(rows, dim=-1) if normalize else rows


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What quantizers compute in: float32, but float64 where a float64 tensor takes part."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class Arguments(NamedTuple):
    latents: Tensor
    codebook: Tensor
    normalize: bool = False


def _check(a: Arguments) -> None:
    check_tensor("codebook", a.codebook, shape=("V", "C"), dtypes=FLOAT_DTYPES)
    rows, width = a.codebook.shape
    if rows < 1 or width < 1:
        raise ValueError(f"codebook: expected shape (V, C) with V, C >= 1, got {tuple(a.codebook.shape)}")
    if rows > MAX_CODES:
        raise ValueError(f"codebook: expected at most {MAX_CODES} rows, got {rows}")
    check_tensor("latents", a.latents, shape=("...", width), dtypes=FLOAT_DTYPES, device=a.codebook.device)


def _results(a: Arguments) -> tuple[Tensor]:
    return (torch.empty(a.latents.shape[:-1], dtype=torch.int64, device=a.latents.device),)


# ---------------------------------------------------------------------------------------------------------------
# C++ and Triton


def _cpp(a: Arguments, indices: Tensor) -> None:
    latents = a.latents
    if latents.ndim != 2:
        latents, indices = latents.reshape(-1, latents.shape[-1]), indices.view(-1)
    extension().nearest_codebook(latents, a.codebook, a.normalize, indices)


def _triton(a: Arguments, indices: Tensor) -> None:
    from titok.kernels import nearest_codebook as kernels

    latents = a.latents.reshape(-1, a.latents.shape[-1]).float().contiguous()
    kernels.forward(latents, a.codebook.float().contiguous(), a.normalize, indices.view(-1))


def _with_dense_rows(a: Arguments) -> Arguments:
    latents, codebook = (x if x.stride(-1) == 1 else x.contiguous() for x in (a.latents, a.codebook))
    return a._replace(latents=latents, codebook=codebook)


def _why_no_cpp(a: Arguments) -> str | None:
    return _why_no_float64(a) or why_no_cpp(a.latents, a.codebook)


def _why_no_triton(a: Arguments) -> str | None:
    return _why_no_float64(a) or why_no_triton(a.latents, a.codebook)


def _why_no_float64(a: Arguments) -> str | None:
    wide = compute_dtype(a.latents.dtype, a.codebook.dtype) == torch.float64
    return "float64 arguments take the plain path" if wide else None


# ---------------------------------------------------------------------------------------------------------------
# Plain PyTorch


def _plain(a: Arguments) -> tuple[Tensor]:
    """Chunks of rows: |e|^2 / 2 - z.e by one matrix product, then its arg min (|z|^2 moves no minimum)."""
    indices = _results(a)[0]
    dtype = compute_dtype(a.latents.dtype, a.codebook.dtype)
    if dtype == torch.float32 and _products_are_reduced(a.latents.device.type):
        dtype = torch.float64
    codes, usable = _prepared(a.codebook.detach().to(dtype), a.normalize)
    half_squares = (codes.square().sum(-1) / 2).masked_fill_(~usable, torch.inf)
    step = max(1, _PLAIN_CHUNK // a.codebook.shape[0])
    latents = a.latents.detach().reshape(-1, a.latents.shape[-1])
    for chunk, out in zip(latents.split(step), indices.view(-1).split(step), strict=True):
        rows, finite = _prepared(chunk.to(dtype), a.normalize)
        scores = torch.addmm(half_squares, rows, codes.T, alpha=-1)
        torch.argmin(scores, dim=1, out=out)
        out.mul_(finite)
    # Equal rows get scores that differ by rounding, as the matrix product blocks its columns.
    return (_first_equal_rows(codes)[indices],)


def _first_equal_rows(codes: Tensor) -> Tensor:
    """For each of V rows the index (V,) of the first row equal to it. The host does not wait for a GPU."""
    bits = (codes + 0.0).contiguous()  # one zero instead of two
    bits = bits.view(torch.int64 if bits.dtype == torch.float64 else torch.int32).long()
    factors = torch.arange(1, 2 * codes.shape[1], 2, device=codes.device) * 0x5851F42D4C957F2D
    hashed, order = torch.sort((bits * factors).sum(1), stable=True)
    starts = torch.ones_like(hashed, dtype=torch.bool)
    starts[1:] = hashed[1:] != hashed[:-1]
    places = torch.arange(len(order), device=order.device)
    start_of_group = torch.where(starts, places, 0).cummax(0).values
    first = torch.empty_like(order)
    first[order] = order[start_of_group]
    is_equal = (codes[first] == codes).all(1)  # not so for two rows that merely have one hash
    return torch.where(is_equal, first, places)


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


_NEAREST_CODEBOOK = Op(
    "nearest_codebook",
    Arguments,
    1,
    check=_check,
    results=_results,
    backends=(
        Kernel("triton", _triton, _why_no_triton),
        Kernel("cpp", _cpp, _why_no_cpp, _with_dense_rows, checks_itself=True),
        Composite("plain", _plain, differentiable=False),
    ),
    flops=lambda a: 2 * a.latents.numel() * a.codebook.shape[0],
)
