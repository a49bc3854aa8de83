"""Residual add and LayerNorm in one pass over the rows, as transformer blocks have them side by side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from titok.ops import _registry
from titok.ops._checks import FLOAT_DTYPES, check_tensor
from titok.ops._extension import why_no_triton
from titok.profiling import ranged


@ranged("add_layer_norm")
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, LayerNorm(x + residual)) over the last axis.

    Pre-norm blocks read the sum as the stream and the normalised rows as the next layer's input; post-norm blocks
    read the normalised rows alone. Where there is nothing to add, `torch.nn.functional.layer_norm` is the op.

    Args:
        x, residual: (..., D) of one shape, float16, bfloat16, float32 or float64. The dtypes may differ: a float32
            stream stays float32 when a bfloat16 branch is added.
        weight, bias: (D,), any of these dtypes.
        eps: added to the variance.
        out_dtype: dtype of the normalised rows; None: that of the sum. The dtype of the next layer saves a cast.
        backend: "triton", "plain", or None for the fastest that can run.

    Returns:
        The sum, in torch's promotion of the two dtypes, rounded to it before it is normalised; and the normalised
        rows. Autocast changes neither dtype. Statistics are float32 (float64 for float64). A row that holds inf or
        NaN is NaN throughout when normalised.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a back end of no such name.
        RuntimeError: the named back end can't run here.
    """
    check_tensor("x", x, shape=("...", "D"), dtypes=FLOAT_DTYPES)
    check_tensor("residual", residual, shape=tuple(x.shape), dtypes=FLOAT_DTYPES, device=x.device)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, shape=(x.shape[-1],), dtypes=FLOAT_DTYPES, device=x.device)
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one channel, got {tuple(x.shape)}")
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected a floating dtype, got {out_dtype}")
    tensors = (x, residual, weight, bias)
    # PyTorch's own gradient costs less than the op's, but on a CPU it keeps 16-bit statistics for 16-bit rows
    own_gradient = torch.promote_types(x.dtype, residual.dtype).itemsize >= 4
    if _registry.runs_eagerly(*tensors, gradients=own_gradient):
        if _choose(backend, *tensors, out_dtype=out_dtype) == "plain":
            return _plain_forward(*tensors, eps, out_dtype)
        if _registry.runs_eagerly(*tensors):
            return _forward(*tensors, eps, out_dtype, backend)
    return _OP(x, residual, weight, bias, eps, out_dtype, backend)


def _choose(backend: str | None, *tensors: torch.Tensor, out_dtype: torch.dtype | None = None) -> str:
    """`tensors`: those whose rows are read and written, then the parameters."""

    def triton() -> str | None:
        if torch.float64 in (out_dtype, *(t.dtype for t in tensors)):
            return "it has no float64 kernel"
        if tensors[0].shape[-1] > 8192:
            return f"it holds a row of at most 8192 channels, got {tensors[0].shape[-1]}"
        return why_no_triton(*tensors)

    return _registry.choose("add_layer_norm", backend, {"triton": triton, "plain": lambda: None})


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if _choose(backend, x, residual, weight, bias, out_dtype=out_dtype) == "plain":
        return _plain_forward(x, residual, weight, bias, eps, out_dtype)
    total, normalised = _fake(x, residual, weight, bias, eps, out_dtype)
    if total.numel():
        from titok.kernels import add_layer_norm as kernels

        rows = [t.contiguous().view(-1, t.shape[-1]) for t in (x, residual, total, normalised)]
        kernels.forward(rows[0], rows[1], weight.contiguous(), bias.contiguous(), eps, rows[2], rows[3])
    return total, normalised


def _plain_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with _registry.no_autocast(x):
        total = (x + residual).contiguous()  # as the fake implementation promises
        # torch's own op keeps float32 statistics, but mixes dtypes only on some devices
        mixed = {weight.dtype, bias.dtype, total.dtype, out_dtype or total.dtype} != {total.dtype}
        rows = total.to(_wide(total)) if mixed else total
        normalised = F.layer_norm(rows, rows.shape[-1:], weight.to(rows.dtype), bias.to(rows.dtype), eps)
        return total, normalised.to(out_dtype or total.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return total, total.new_empty(x.shape, dtype=out_dtype or total.dtype)


def _backward(
    grad_total: torch.Tensor | None,
    grad_normalised: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the sum, and those of weight and bias as (2, D), float32 or wider.

    The statistics are computed again from the sum, which is read anyway.
    """
    if _choose(backend, total, grad_normalised, weight) == "plain":
        return _plain_backward(grad_total, grad_normalised, total, weight, eps)
    grad, channels = torch.empty_like(total), total.shape[-1]
    if not total.numel():
        return grad, weight.new_zeros((2, channels), dtype=torch.float32)
    from titok.kernels import add_layer_norm as kernels

    if grad_total is not None:
        grad_total = grad_total.to(total.dtype).contiguous()
    rows = total.view(-1, channels)
    partial = total.new_empty((2, kernels.programs(rows.shape[0], channels), channels), dtype=torch.float32)
    kernels.backward(grad_total, grad_normalised.contiguous(), rows, weight.contiguous(), eps, grad, partial)
    return grad, partial.sum(1)


def _plain_backward(
    grad_total: torch.Tensor | None,
    grad_normalised: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    with _registry.no_autocast(total):
        wide, shape = _wide(total), [total.shape[-1]]
        rows, scale = total.to(wide), weight.to(wide)
        _, mean, rstd = torch.native_layer_norm(rows, shape, scale, None, eps)
        grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_normalised.to(wide), rows, shape, mean, rstd, scale, scale, [True, True, True]
        )
        if grad_total is not None:
            grad = grad.add_(grad_total)
        return grad.to(total.dtype), torch.stack((grad_weight, grad_bias))


def _backward_fake(
    grad_total: torch.Tensor | None,
    grad_normalised: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return total.new_empty(total.shape), total.new_empty((2, *weight.shape), dtype=_wide(total))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, residual, weight, bias, ctx.eps, _, ctx.backend = inputs
    ctx.dtypes = (x.dtype, residual.dtype, weight.dtype, bias.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight)


def _autograd(
    ctx: Any, grad_total: torch.Tensor | None, grad_normalised: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    grads = (grad_total, grad_total, None, None)
    if grad_normalised is not None:
        grad, parameters = _BACKWARD_OP(grad_total, grad_normalised, total, weight, ctx.eps, ctx.backend)
        grads = (grad, grad, *parameters)
    wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad[:4], strict=True)
    return (*(g.to(dtype) if g is not None and need else None for g, dtype, need in wanted), None, None, None)


_BACKWARD_OP = _registry.register(
    "add_layer_norm_backward(Tensor? grad_total, Tensor grad_normalised, Tensor total, Tensor weight, float eps, "
    "str? backend=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = _registry.register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, ScalarType? out_dtype=None, "
    "str? backend=None) -> (Tensor, Tensor)",
    _forward,
    _fake,
    backward=_autograd,
    setup_context=_setup_context,
)
