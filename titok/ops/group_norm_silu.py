"""GroupNorm and SiLU in one op, with a residual sum before it and a conversion behind it."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_eps, check_int, check_tensor
from titok.ops.core.available import extension, why_no_cpp, why_no_triton, why_not_float32_or_bfloat16
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Gradient, Kernel


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor,
    out_dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`silu(group_norm(x))`, or with `residual` the pair `(x + residual, silu(group_norm(x + residual)))`.

    The pair is what a chain of residual blocks needs: the first ends one block and is the skip of the next, the
    second feeds the next convolution. The statistics are those of the sum as stored, rounded to x's dtype.

    Statistics and arithmetic are float32 (float64 for float64 input), stable for a mean far from zero. Outputs
    have x's memory format: channels-last (`torch.channels_last`) is the fast one and the only one that the C++ and
    Triton kernels take; everything else that is not channels-last is treated as contiguous. Gradients reach x,
    residual, weight and bias, once: the backward pass is not itself differentiable.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64; B, H, W may be 0.
        num_groups: divides C.
        weight, bias: (C,), both in float32 or both in x's dtype.
        eps: added to the variance, above 0.
        residual: same shape, dtype and device as x.
        out_dtype: dtype of the normalised output, that of the next convolution; None for x's.
        out: takes the result and is returned, or with `residual` a pair for both; of the dtype that the result would
            have, in x's memory format. The first of a pair may be x or residual itself, and the only one x where
            dtypes agree; otherwise they overlap no other tensor.
        backend: "triton", "cpp" (CPU, float32 and bfloat16), "plain", or None for the fastest that can run.

    Returns:
        (B, C, H, W) in `out_dtype`; with `residual` the sum, in x's dtype, comes first.

    Raises:
        TypeError, ValueError: an argument does not fit, by name.
        RuntimeError: `backend` names one that cannot run here, with the cause.

    Source: Wu and He, "Group Normalization", ECCV 2018, eq. 1-3; the residual block of MaskGIT's VQGAN.
    """
    num_groups = check_int("num_groups", num_groups)
    outputs: Any = out
    if residual is None and out is not None:
        outputs = (None, out)
    total, normalised = _GROUP_NORM_SILU(
        x, num_groups, weight, bias, eps, residual, out_dtype, out=outputs, backend=backend
    )
    return normalised if residual is None else (total, normalised)


# ---------------------------------------------------------------------------------------------------------------
# Forward


class Arguments(NamedTuple):
    x: Tensor
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    residual: Tensor | None = None
    out_dtype: torch.dtype | None = None


def _check(a: Arguments) -> None:
    check_tensor("x", a.x, shape=("B", "C", "H", "W"), dtypes=FLOAT_DTYPES)
    channels = a.x.shape[1]
    if a.num_groups < 1 or channels < 1 or channels % a.num_groups:
        raise ValueError(f"num_groups: expected a divisor of x's {channels} channels, got {a.num_groups}")
    _check_affine(a)
    check_eps(a.eps)
    if a.residual is not None:
        check_tensor("residual", a.residual, shape=a.x.shape, dtypes=(a.x.dtype,), device=a.x.device)
    if a.out_dtype is not None and a.out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected one of the floating dtypes of x, got {a.out_dtype}")


def _check_affine(a: Arguments | BackwardArguments) -> None:
    alone = a.x.dtype in (torch.float64, torch.float32)
    dtypes = (a.x.dtype,) if alone else (torch.float32, a.x.dtype)
    check_tensor("weight", a.weight, shape=(a.x.shape[1],), dtypes=dtypes, device=a.x.device)
    check_tensor("bias", a.bias, shape=(a.x.shape[1],), dtypes=(a.weight.dtype,), device=a.x.device)


def _results(a: Arguments) -> tuple[Tensor | None, Tensor]:
    """The sum, where there is a residual, and the normalised map."""
    memory_format = _memory_format(a.x)
    total = None if a.residual is None else torch.empty_like(a.x, memory_format=memory_format)
    return total, torch.empty_like(a.x, dtype=a.out_dtype, memory_format=memory_format)


def _kept(a: Arguments) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation (B, num_groups)."""
    mean = a.x.new_empty((a.x.shape[0], a.num_groups), dtype=_statistics_dtype(a.x))
    return mean, torch.empty_like(mean)


def _cpp(
    a: Arguments,
    total: Tensor | None,
    normalised: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> None:
    check_eps(a.eps)
    extension().group_norm_silu(
        a.x, a.residual, a.num_groups, a.weight, a.bias, a.eps, total, normalised, mean, rstd
    )


def _triton(a: Arguments, total: Tensor | None, normalised: Tensor, *kept: Tensor) -> None:
    from titok.kernels import group_norm_silu as kernels

    mean, rstd = kept or _kept(a)
    total = a.x if total is None else total
    kernels.forward(a.x, a.residual, a.num_groups, a.weight, a.bias, a.eps, total, normalised, mean, rstd)


def _plain(a: Arguments) -> tuple[Tensor | None, ...]:
    memory_format = _memory_format(a.x)
    x = a.x if a.residual is None else (a.x + a.residual).contiguous(memory_format=memory_format)
    if x.numel() == 0:
        mean, rstd = (statistic.zero_() for statistic in _kept(a))
        return (None if a.residual is None else x), _results(a)[1], mean, rstd
    # Not torch.native_group_norm: for channels-last maps on a CPU it takes E[x^2] - E[x]^2 in float32 as the variance.
    grouped = x.to(_statistics_dtype(x)).unflatten(1, (a.num_groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(variance + a.eps)
    normalised = F.silu(_affine(_standardised(x, mean, rstd), a.weight, a.bias)).to(a.out_dtype or x.dtype)
    total = None if a.residual is None else x
    return total, normalised.contiguous(memory_format=memory_format), mean, rstd


def _standardised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd, (B, C, H, W) in the dtype of the statistics."""
    grouped = x.to(mean.dtype).unflatten(1, (mean.shape[1], -1))
    return ((grouped - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]).flatten(1, 2)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * weight.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------
# Backward


class BackwardArguments(NamedTuple):
    grad: Tensor
    grad_total: Tensor | None
    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor


def _check_backward(a: BackwardArguments) -> None:
    check_tensor("x", a.x, shape=("B", "C", "H", "W"), dtypes=FLOAT_DTYPES)
    for name, grad in (("grad", a.grad), ("grad_total", a.grad_total)):
        if grad is not None or name == "grad":
            check_tensor(name, grad, shape=a.x.shape, dtypes=FLOAT_DTYPES, device=a.x.device)
    _check_affine(a)
    batch, channels = a.x.shape[:2]
    dtypes = (_statistics_dtype(a.x),)
    check_tensor("mean", a.mean, shape=(batch, "num_groups"), dtypes=dtypes, device=a.x.device)
    groups = a.mean.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"mean: expected a divisor of x's {channels} channels as its second size, got {groups}")
    check_tensor("rstd", a.rstd, shape=(batch, groups), dtypes=dtypes, device=a.x.device)


def _backward_results(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (with `grad_total`, that of the returned sum, added), weight and bias."""
    grad_x = torch.empty_like(a.x, memory_format=_memory_format(a.x))
    return grad_x, torch.empty_like(a.weight), torch.empty_like(a.bias)


def _backward_cpp(a: BackwardArguments, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    sums = [grad_weight, grad_bias]
    if a.weight.dtype != torch.float32:  # the kernel writes float32
        sums = [torch.empty_like(a.weight, dtype=torch.float32) for _ in sums]
    extension().group_norm_silu_backward(
        a.grad, a.grad_total, a.x, a.weight, a.bias, a.mean, a.rstd, grad_x, *sums
    )
    if sums[0] is not grad_weight:
        grad_weight.copy_(sums[0])
        grad_bias.copy_(sums[1])


def _backward_triton(a: BackwardArguments, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    from titok.kernels import group_norm_silu as kernels

    sums = kernels.backward(a.grad, a.grad_total, a.x, a.weight, a.bias, a.mean, a.rstd, grad_x)
    grad_weight.copy_(sums[0])
    grad_bias.copy_(sums[1])


def _backward_plain(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias.

    Let s be the standardised x, z = weight * s + bias, and g the gradient of z. The gradient of bias is the sum of g,
    that of weight is the sum of g * s, and that of x is

        rstd * (g * weight - mean(g * weight) - s * mean(g * weight * s)),

    with means over the pixels and channels of a group.
    """
    a = _like_x(a)  # one memory format, so that sums are taken in one order
    if a.x.numel() == 0:
        return a.x.clone(), torch.zeros_like(a.weight), torch.zeros_like(a.bias)
    groups = (a.mean.shape[1], -1)
    standardised = _standardised(a.x, a.mean, a.rstd)
    affine = _affine(standardised, a.weight, a.bias)
    sigmoid = torch.sigmoid(affine)
    grad_affine = a.grad.to(a.mean.dtype) * sigmoid * (1 + affine * (1 - sigmoid))
    sums = torch.stack((grad_affine.sum((2, 3)), (grad_affine * standardised).sum((2, 3))), 1)  # (B, 2, C)
    weighted = (sums * a.weight.to(sums.dtype)).unflatten(2, groups).sum(3)
    means = (weighted / (a.x[0].numel() // a.mean.shape[1]))[..., None, None, None]
    scaled = (grad_affine * a.weight.to(a.mean.dtype)[:, None, None]).unflatten(1, groups)
    centred = scaled - means[:, 0] - standardised.unflatten(1, groups) * means[:, 1]
    grad_x = (centred * a.rstd[:, :, None, None, None]).flatten(1, 2)
    if a.grad_total is not None:
        grad_x = grad_x + a.grad_total
    grad_x = grad_x.to(a.x.dtype).contiguous(memory_format=_memory_format(a.x))
    return grad_x, sums[:, 1].sum(0).to(a.weight.dtype), sums[:, 0].sum(0).to(a.bias.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Back ends


def _why_not_channels_last(x: Tensor) -> str | None:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    return None if channels_last else "the kernels take channels-last maps"


def _why_no_cpp(a: Arguments | BackwardArguments) -> str | None:
    other = a.grad.dtype if isinstance(a, BackwardArguments) else a.out_dtype
    if isinstance(a, BackwardArguments) and a.grad_total is not None and a.grad_total.dtype != a.x.dtype:
        return "the C++ kernel takes a gradient of the sum in x's dtype"
    reason = why_not_float32_or_bfloat16(a.x.dtype, other) or why_no_cpp(a.x)
    return reason or _why_not_channels_last(a.x)


def _why_no_triton(a: Arguments | BackwardArguments) -> str | None:
    if torch.float64 in (a.x.dtype, a.grad.dtype if isinstance(a, BackwardArguments) else a.out_dtype):
        return "the Triton kernels compute in float32, not float64"
    if a.x.shape[0] > 65535:
        return f"the Triton kernels take 65,535 images at once, not {a.x.shape[0]}"
    return _why_not_channels_last(a.x) or why_no_triton(a.x)


def _like_x(a: Any) -> Any:
    """The arguments with all maps in x's memory format and contiguous vectors."""
    memory_format = _memory_format(a.x)

    def laid_out(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.contiguous(memory_format=memory_format) if value.ndim == 4 else value.contiguous()

    return a._make(map(laid_out, a))


def _save(a: Arguments, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    total, _, mean, rstd = outputs
    return a.x if a.residual is None else total, a.weight, a.bias, mean, rstd


def _backward_arguments(grads: Any, saved: Any, a: Any, needs: Any) -> tuple[Any, ...] | None:
    grad_total, grad = grads
    if a.residual is None:
        grad_total = None  # compiled code hands on an empty tensor
    return None if grad is None else (grad, grad_total, *saved)


def _gradients(grads: Any, returned: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    if not returned:  # only the sum was used
        return grads[0], None, None, grads[0]
    grad_x, grad_weight, grad_bias = returned
    return grad_x, grad_weight, grad_bias, grad_x


_BACKWARD = Op(
    "group_norm_silu_backward",
    BackwardArguments,
    3,
    check=_check_backward,
    results=_backward_results,
    backends=(
        Kernel("triton", _backward_triton, _why_no_triton, _like_x),
        Kernel("cpp", _backward_cpp, _why_no_cpp, _like_x),
        Composite("plain", _backward_plain),
    ),
)

_GROUP_NORM_SILU = Op(
    "group_norm_silu",
    Arguments,
    2,
    check=_check,
    results=_results,
    kept=_kept,
    num_kept=2,
    backends=(
        Kernel("triton", _triton, _why_no_triton, _like_x),
        Kernel("cpp", _cpp, _why_no_cpp, _like_x, checks_itself=True),
        Composite("plain", _plain, differentiable=False),
    ),
    gradient=Gradient(_BACKWARD, save=_save, arguments=_backward_arguments, gradients=_gradients),
)
