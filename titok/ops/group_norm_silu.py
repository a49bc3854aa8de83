"""GroupNorm and SiLU in one op, with the residual sum in front of it and the cast behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import check_tensor
from titok.ops import _group_norm_silu_cpp as cpp
from titok.ops._extension import why_no_cpp, why_no_triton
from titok.ops._registry import choose, register, runs_eagerly
from titok.profiling import ranged

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


@ranged("group_norm_silu")
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
            dtypes agree; else they overlap nothing.
        backend: "plain", "cpp", "triton"; None or "auto" for the fastest that can run.

    Returns:
        (B, C, H, W) in `out_dtype`; with `residual` the sum, in x's dtype, comes first.

    Raises:
        TypeError, ValueError: an argument does not fit, by name.
        RuntimeError: `backend` names one that cannot run here, with the cause.

    Source: Wu and He, "Group Normalization", ECCV 2018, eq. 1-3; the residual block of MaskGIT's VQGAN.
    """
    eager = runs_eagerly(x, weight, bias) if residual is None else runs_eagerly(x, residual, weight, bias)
    if eager and backend is None:
        usual = cpp.usual_call(x, num_groups, weight, bias, eps, residual, out_dtype, out)
        if usual is not None:
            return usual
    _check(x, num_groups, weight, bias, eps, residual, out_dtype)
    if out is not None:
        _check_out(out, x, residual, out_dtype)
    if residual is None:
        op = _forward if eager else _OP
        normalised: Tensor = op(x, num_groups, weight, bias, eps, out_dtype, backend)[0]
        return normalised if out is None else cast(Tensor, out).copy_(normalised)
    op = _add_forward if eager else _ADD_OP
    total, normalised, _, _ = op(x, residual, num_groups, weight, bias, eps, out_dtype, backend)
    return (total, normalised) if out is None else (out[0].copy_(total), out[1].copy_(normalised))


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    check_tensor("x", x, shape=("B", "C", "H", "W"), dtypes=_DTYPES)
    channels = x.shape[1]
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of x's {channels} channels, got {num_groups}")
    affine = (torch.float32, x.dtype) if x.dtype != torch.float64 else (torch.float64,)
    check_tensor("weight", weight, shape=(channels,), dtypes=affine, device=x.device)
    check_tensor("bias", bias, shape=(channels,), dtypes=(weight.dtype,), device=x.device)
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    if residual is not None:
        check_tensor("residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    if out_dtype is not None and out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype: expected one of the floating dtypes of x, got {out_dtype}")


def _check_out(out: Any, x: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> None:
    if residual is not None and not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(f"out: expected a pair of tensors beside a residual, got {type(out).__name__}")
    named = {"out": out} if residual is None else {"out[0]": out[0], "out[1]": out[1]}
    for name, tensor in named.items():
        dtype = x.dtype if name == "out[0]" else out_dtype or x.dtype
        check_tensor(name, tensor, shape=x.shape, dtypes=(dtype,), device=x.device)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _why_no_cpp(x: Tensor, out_dtype: torch.dtype) -> str | None:
    if (reason := why_no_cpp(x)) is not None:
        return reason
    for dtype in (x.dtype, out_dtype):
        if dtype not in cpp.DTYPES:
            return f"the C++ kernel takes float32 and bfloat16, not {dtype}"
    return _why_not_channels_last(x)


def _why_not_channels_last(x: Tensor) -> str | None:
    return None if x.is_contiguous(memory_format=torch.channels_last) else "the kernels take channels-last maps"


def _why_no_triton(x: Tensor, out_dtype: torch.dtype) -> str | None:
    if (reason := why_no_triton(x)) is not None:
        return reason
    if torch.float64 in (x.dtype, out_dtype):
        return "the Triton kernels compute in float32, not float64"
    if x.shape[0] > 65535:
        return f"the Triton kernels take 65,535 images at once, not {x.shape[0]}"
    return _why_not_channels_last(x)


def _choose(backend: str | None, x: Tensor, out_dtype: torch.dtype) -> str:
    candidates: dict[str, Callable[[], str | None]] = {
        "cpp": lambda: _why_no_cpp(x, out_dtype),
        "plain": lambda: None,
        "triton": lambda: _why_no_triton(x, out_dtype),
    }
    order = ("triton", "plain", "cpp") if x.is_cuda else ("cpp", "plain", "triton")  # last: the interpreter
    return choose("group_norm_silu", backend, {name: candidates[name] for name in order})


def _allocate(x: Tensor, num_groups: int, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the forward pass: normalised, and mean and rstd (B, G), which the backward pass needs."""
    normalised = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device, memory_format=_memory_format(x))
    mean = x.new_empty((x.shape[0], num_groups), dtype=_statistics_dtype(x))
    return normalised, mean, torch.empty_like(mean)


def _forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean, rstd)"""
    return _add_forward(x, None, num_groups, weight, bias, eps, out_dtype, backend)[1:]


def _add_forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, normalised, mean, rstd); the sum is x itself where there is no residual."""
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    chosen = _choose(backend, x, out_dtype or x.dtype)
    total = x if residual is None else torch.empty_like(x)
    normalised, mean, rstd = _allocate(x, num_groups, out_dtype)
    if x.numel() == 0:
        return total, normalised, mean.zero_(), rstd.zero_()
    if chosen == "cpp":
        weight, bias = weight.contiguous(), bias.contiguous()
        cpp.launch(x, residual, weight, bias, eps, total, normalised, mean, rstd, num_groups)
        return total, normalised, mean, rstd
    if chosen == "triton":
        from titok.kernels import group_norm_silu as kernels

        weight, bias = weight.contiguous(), bias.contiguous()
        kernels.forward(x, residual, num_groups, weight, bias, eps, total, normalised, mean, rstd)
        return total, normalised, mean, rstd
    total = x if residual is None else x + residual
    return (total, *_plain_forward(total, num_groups, weight, bias, eps, out_dtype))


def _plain_forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Not torch.native_group_norm: on channels-last CPU maps it takes the variance as E[x^2] - E[x]^2, in float32.
    grouped = x.to(_statistics_dtype(x)).unflatten(1, (num_groups, -1))
    var, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(var + eps)
    normalised = F.silu(_affine(_standardise(x, mean, rstd), weight, bias)).to(out_dtype or x.dtype)
    return normalised.contiguous(memory_format=_memory_format(x)), mean, rstd


def _standardise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd, (B, C, H, W) in the dtype of the statistics."""
    grouped = x.to(mean.dtype).unflatten(1, (mean.shape[1], -1))
    return ((grouped - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]).flatten(1, 2)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * weight.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (with `grad_sum`, that of the returned sum, added), weight and bias."""
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    grad = grad.contiguous(memory_format=memory_format)
    if x.numel() == 0:
        return x.clone(), torch.zeros_like(weight), torch.zeros_like(bias)
    if backend != "plain" and _why_no_triton(x, grad.dtype) is None and (x.is_cuda or backend == "triton"):
        if grad_sum is not None:
            grad_sum = grad_sum.contiguous(memory_format=memory_format)
        from titok.kernels import group_norm_silu as kernels

        grad_x = torch.empty_like(x)
        parameters = (weight.contiguous(), bias.contiguous())
        grad_weight, grad_bias = kernels.backward(grad, grad_sum, x, *parameters, mean, rstd, grad_x)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
    else:
        grad_x, sums = _plain_backward(grad, grad_sum, x, weight, bias, mean, rstd)
    return grad_x, sums[:, 1].sum(0).to(weight.dtype), sums[:, 0].sum(0).to(bias.dtype)


# With s the standardised x, z = weight * s + bias, g = d/dz: d bias is the sum of g, d weight that of g * s, and
# d x = rstd * (g * weight - mean(g * weight) - s * mean(g * weight * s)), means over a group.


def _group_means(sums: Tensor, weight: Tensor, x: Tensor, num_groups: int) -> Tensor:
    """Sums (B, 2, C) over pixels of g and g * s -> means (B, 2, G) over a group of those times weight."""
    weighted = (sums * weight.to(sums.dtype)).unflatten(2, (num_groups, -1)).sum(3)
    return weighted / (x[0].numel() // num_groups)


def _plain_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    standard = _standardise(x, mean, rstd)
    affine = _affine(standard, weight, bias)
    sigmoid = torch.sigmoid(affine)
    grad_affine = grad.to(mean.dtype) * sigmoid * (1 + affine * (1 - sigmoid))
    sums = torch.stack((grad_affine.sum((2, 3)), (grad_affine * standard).sum((2, 3))), 1)
    groups = (mean.shape[1], -1)
    means = _group_means(sums, weight, x, mean.shape[1])[..., None, None, None]
    scaled = (grad_affine * weight.to(mean.dtype)[:, None, None]).unflatten(1, groups)
    centred = scaled - means[:, 0] - standard.unflatten(1, groups) * means[:, 1]
    grad_x = (centred * rstd[:, :, None, None, None]).flatten(1, 2)
    if grad_sum is not None:
        grad_x = grad_x + grad_sum
    return grad_x.to(x.dtype).contiguous(memory_format=_memory_format(x)), sums


def _fake(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, out_dtype: Any, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(x, num_groups, out_dtype)


def _add_fake(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: Any,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    return (total, *_allocate(x, num_groups, out_dtype))


def _backward_fake(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _, _, backend = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    grad_x, grad_weight, grad_bias = _BACKWARD_OP(grad, None, *ctx.saved_tensors, ctx.backend)
    return grad_x, None, grad_weight, grad_bias, None, None, None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, _, weight, bias, _, _, backend = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, bias, mean, rstd)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _add_autograd(ctx: Any, grad_sum: Tensor | None, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return grad_sum, grad_sum, *(None,) * 6
    grad_x, grad_weight, grad_bias = _BACKWARD_OP(grad, grad_sum, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_x, None, grad_weight, grad_bias, None, None, None


_BACKWARD_OP = register(
    "group_norm_silu_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor rstd, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = register(
    "group_norm_silu(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, ScalarType? out_dtype, "
    "str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    backward=_autograd,
    setup_context=_save,
)
_ADD_OP = register(
    "add_group_norm_silu(Tensor x, Tensor residual, int num_groups, Tensor weight, Tensor bias, float eps, "
    "ScalarType? out_dtype, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _add_fake,
    backward=_add_autograd,
    setup_context=_add_save,
)
