"""Residual sum and LayerNorm in one pass over the rows, as transformer blocks have them side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_eps, check_tensor
from titok.ops.core.available import extension, why_no_cpp, why_no_triton, why_not_float32_or_bfloat16
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Gradient, Kernel, contiguous, vjp


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + residual, LayerNorm(x + residual)) over the last axis, differentiable once.

    Pre-norm blocks read the sum as the residual stream and the normalised rows as the next layer's input. Post-norm
    blocks read the normalised rows alone. `layer_norm` is the op where there is nothing to add.

    Args:
        x, residual: (..., D) of one shape, float16, bfloat16, float32 or float64. The dtypes may differ: a float32
            stream stays float32 when a bfloat16 branch is added.
        weight, bias: (D,), any of these dtypes.
        eps: added to the variance, above 0.
        out_dtype: dtype of the normalised rows; None: that of the sum. The dtype of the next layer saves a conversion.
        out: two contiguous tensors that take the results and are returned, of the dtypes that these would have. The
            first may be x or residual itself, to keep a stream in place; otherwise they overlap no other tensor.
        backend: "triton", "cpp" (CPU, float32 and bfloat16), "plain", or None for the fastest that can run.

    Returns:
        The sum, in PyTorch's promotion of the two dtypes, rounded to it before it is normalised; and the normalised
        rows. Autocast changes neither dtype. Statistics are float32 (float64 for float64). A row that holds an infinity
        or a NaN is NaN throughout when normalised.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a back end of no such name.
        RuntimeError: the named back end cannot run here.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), equations 3 and 4.
    """
    needs_sum = True
    total, normalised = _ADD_LAYER_NORM(
        x, residual, weight, bias, eps, out_dtype, needs_sum, out=out, backend=backend
    )
    return total, normalised


def layer_norm_of_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x + residual) over the last axis: the second result of `add_layer_norm`, bit for bit.

    For post-norm blocks, which do not read the sum. On a GPU it is not written then, unless gradients are enabled.

    Args, errors and source: as of `add_layer_norm`.
    """
    needs_sum = torch.is_grad_enabled()  # the backward pass reads it
    normalised: Tensor = _ADD_LAYER_NORM(x, residual, weight, bias, eps, out_dtype, needs_sum, backend=backend)[1]
    return normalised


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x) over the last axis: `add_layer_norm` with nothing to add.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64.
        weight, bias: (D,), any of these dtypes.
        eps: added to the variance, above 0.
        out_dtype: dtype of the result, None for x's.
        backend: "cpp" (CPU, float32 and bfloat16), "plain" (PyTorch's own op), or None for the faster one.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a back end of no such name.
        RuntimeError: the named back end cannot run here.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), equations 3 and 4.
    """
    return _LAYER_NORM(x, weight, bias, eps, out_dtype, backend=backend)[0]


# ---------------------------------------------------------------------------------------------------------------
# LayerNorm alone


class LayerNormArguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    out_dtype: torch.dtype | None = None


def _check_norm(a: LayerNormArguments | AddLayerNormArguments) -> None:
    check_tensor("x", a.x, shape=("...", "D"), dtypes=FLOAT_DTYPES)
    if a.x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one channel, got {tuple(a.x.shape)}")
    for name, parameter in (("weight", a.weight), ("bias", a.bias)):
        check_tensor(name, parameter, shape=(a.x.shape[-1],), dtypes=FLOAT_DTYPES, device=a.x.device)
    check_eps(a.eps)
    if a.out_dtype is not None and a.out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected a floating dtype, got {a.out_dtype}")


def _norm_results(a: LayerNormArguments) -> tuple[Tensor]:
    return (torch.empty_like(a.x, dtype=a.out_dtype, memory_format=torch.contiguous_format),)


def _norm_cpp(a: LayerNormArguments, normalised: Tensor) -> None:
    check_eps(a.eps)
    extension().add_layer_norm(a.x, None, a.weight, a.bias, a.eps, None, normalised)


def _norm_plain(a: LayerNormArguments) -> tuple[Tensor]:
    return (_normalised(a.x, a.weight, a.bias, a.eps, a.out_dtype),)


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    # PyTorch's op keeps float32 statistics of 16-bit rows, but mixes dtypes only on some devices, and on a CPU its
    # gradient keeps 16-bit statistics: both cases are computed in float32.
    mixed = not weight.dtype is bias.dtype is x.dtype is (out_dtype or x.dtype)
    if not mixed and (x.dtype.itemsize >= 4 or not torch.is_grad_enabled()):
        return F.layer_norm(x, weight.shape, weight, bias, eps).contiguous()
    rows = x.to(_statistics_dtype(x))
    normalised = F.layer_norm(rows, weight.shape, weight.to(rows.dtype), bias.to(rows.dtype), eps)
    return normalised.to(out_dtype or x.dtype).contiguous()


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# The sum and LayerNorm of it


class AddLayerNormArguments(NamedTuple):
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    out_dtype: torch.dtype | None = None
    needs_sum: bool = True  # False returns no sum


def _check(a: AddLayerNormArguments) -> None:
    _check_norm(a)
    check_tensor("residual", a.residual, shape=tuple(a.x.shape), dtypes=FLOAT_DTYPES, device=a.x.device)


def _results(a: AddLayerNormArguments) -> tuple[Tensor | None, Tensor]:
    dtype = torch.promote_types(a.x.dtype, a.residual.dtype)
    normalised = torch.empty_like(a.x, dtype=a.out_dtype or dtype, memory_format=torch.contiguous_format)
    return torch.empty_like(normalised, dtype=dtype) if a.needs_sum else None, normalised


def _cpp(a: AddLayerNormArguments, total: Tensor | None, normalised: Tensor) -> None:
    check_eps(a.eps)
    if total is None:  # the kernel writes it in any case
        total = torch.empty_like(normalised, dtype=torch.promote_types(a.x.dtype, a.residual.dtype))
    extension().add_layer_norm(a.x, a.residual, a.weight, a.bias, a.eps, total, normalised)


def _triton(a: AddLayerNormArguments, total: Tensor | None, normalised: Tensor) -> None:
    from titok.kernels import add_layer_norm as kernels

    x, residual, total = _rows(a.x), _rows(a.residual), None if total is None else _rows(total)
    kernels.forward(x, residual, a.weight, a.bias, a.eps, total, _rows(normalised))


def _plain(a: AddLayerNormArguments) -> tuple[Tensor | None, Tensor]:
    total = (a.x + a.residual).contiguous()
    return total if a.needs_sum else None, _normalised(total, a.weight, a.bias, a.eps, a.out_dtype)


def _save(a: AddLayerNormArguments, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0], a.weight) if a.needs_sum else (a.x, a.residual, a.weight)


def _backward_arguments(grads: Any, saved: Any, a: Any, needs: Any) -> tuple[Any, ...] | None:
    grad_total, grad_normalised = grads
    if grad_normalised is None:
        return None
    if a.needs_sum:
        return grad_total, grad_normalised, *saved, a.eps
    x, residual, weight = saved
    return None, grad_normalised, x + residual, weight, a.eps


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


# ---------------------------------------------------------------------------------------------------------------
# The gradient of both


class BackwardArguments(NamedTuple):
    grad_total: Tensor | None
    grad_normalised: Tensor
    total: Tensor
    weight: Tensor
    eps: float


def _check_backward(a: BackwardArguments) -> None:
    check_tensor("total", a.total, shape=("...", "D"), dtypes=FLOAT_DTYPES)
    for name, grad in (("grad_total", a.grad_total), ("grad_normalised", a.grad_normalised)):
        if grad is not None or name == "grad_normalised":
            check_tensor(name, grad, shape=tuple(a.total.shape), dtypes=FLOAT_DTYPES, device=a.total.device)
    check_tensor("weight", a.weight, shape=(a.total.shape[-1],), dtypes=FLOAT_DTYPES, device=a.total.device)
    check_eps(a.eps)


def _backward_results(a: BackwardArguments) -> tuple[Tensor, Tensor]:
    """The gradient of the sum, and those of weight and bias as (2, D), float32 or float64."""
    grad = torch.empty_like(a.total, memory_format=torch.contiguous_format)
    return grad, a.total.new_empty((2, a.total.shape[-1]), dtype=_statistics_dtype(a.total))


def _backward_cpp(a: BackwardArguments, grad: Tensor, grad_parameters: Tensor) -> None:
    check_eps(a.eps)
    chunks = extension().add_layer_norm_chunks(a.total.numel() // a.total.shape[-1])
    # One sum for each chunk of rows, added up here, so that the number of threads changes no bit.
    partial = grad_parameters.new_empty((chunks, *grad_parameters.shape), dtype=torch.float32)
    extension().add_layer_norm_backward(a.grad_total, a.grad_normalised, a.total, a.weight, a.eps, grad, partial)
    torch.sum(partial, 0, out=grad_parameters)


def _backward_triton(a: BackwardArguments, grad: Tensor, grad_parameters: Tensor) -> None:
    from titok.kernels import add_layer_norm as kernels

    grad_total = None if a.grad_total is None else _rows(a.grad_total)
    grad_normalised, total = _rows(a.grad_normalised), _rows(a.total)
    sums = kernels.backward(grad_total, grad_normalised, total, a.weight, a.eps, _rows(grad))
    grad_parameters.copy_(sums)


def _backward_plain(a: BackwardArguments) -> tuple[Tensor, Tensor]:
    wide = _statistics_dtype(a.total)

    def normalised(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, a.eps)

    weight = a.weight.to(wide)
    inputs = (a.total.to(wide), weight, torch.zeros_like(weight))
    grad, *grad_parameters = vjp(normalised, inputs, a.grad_normalised.to(wide))
    if a.grad_total is not None:
        grad = grad + a.grad_total
    return grad.to(a.total.dtype).contiguous(), torch.stack(grad_parameters)


# ---------------------------------------------------------------------------------------------------------------
# Back ends


def _why_no_cpp(a: NamedTuple) -> str | None:
    tensors = [t for t in a if isinstance(t, Tensor)]
    dtypes = [t.dtype for t in tensors]
    return why_not_float32_or_bfloat16(*dtypes, getattr(a, "out_dtype", None)) or why_no_cpp(*tensors)


def _why_no_triton(a: NamedTuple) -> str | None:
    tensors = [t for t in a if isinstance(t, Tensor)]
    if torch.float64 in (*(t.dtype for t in tensors), getattr(a, "out_dtype", None)):
        return "it has no float64 kernel"
    channels = tensors[0].shape[-1]
    if channels > 8192:
        return f"it holds a row of at most 8192 channels, got {channels}"
    return why_no_triton(*tensors)


def _for_cpp(a: Any) -> Any:
    a = contiguous(a)
    return a if a.weight.dtype == a.bias.dtype else a._replace(weight=a.weight.float(), bias=a.bias.float())


def _for_backward(a: BackwardArguments) -> BackwardArguments:
    if a.grad_total is not None:
        a = a._replace(grad_total=a.grad_total.to(a.total.dtype))
    return contiguous(a)


def _is_float32_on_cpu(a: AddLayerNormArguments) -> bool:
    """For contiguous float32 rows PyTorch's own gradient is as fast as ours, and its call costs less."""
    x, residual, weight, bias, eps, out_dtype, _ = a
    if not all(isinstance(t, Tensor) for t in (x, residual, weight, bias)):
        return False
    if not (x.is_cpu and x.dtype is residual.dtype is weight.dtype is torch.float32 and out_dtype is None):
        return False
    check_eps(eps)
    on_cpu = residual.is_cpu and weight.is_cpu and bias.is_cpu and bias.dtype in FLOAT_DTYPES
    fits = x.ndim > 0 and x.shape == residual.shape and weight.shape == bias.shape == x.shape[-1:] != (0,)
    return on_cpu and fits and x.is_contiguous() and residual.is_contiguous()


def _is_right(a: LayerNormArguments) -> bool:
    _LAYER_NORM.check(a)
    return True


_BACKWARD = Op(
    "add_layer_norm_backward",
    BackwardArguments,
    2,
    check=_check_backward,
    results=_backward_results,
    backends=(
        Kernel("triton", _backward_triton, _why_no_triton, _for_backward),
        Kernel("cpp", _backward_cpp, _why_no_cpp, _for_backward, checks_itself=True),
        Composite("plain", _backward_plain),
    ),
)

_ADD_LAYER_NORM = Op(
    "add_layer_norm",
    AddLayerNormArguments,
    2,
    check=_check,
    results=_results,
    backends=(
        Kernel("triton", _triton, _why_no_triton, contiguous),
        Kernel("cpp", _cpp, _why_no_cpp, _for_cpp, checks_itself=True),
        Composite("plain", _plain),
    ),
    gradient=Gradient(
        _BACKWARD,
        save=_save,
        arguments=_backward_arguments,
        gradients=lambda grads, returned: (
            (returned[0], returned[0], *returned[1]) if returned else (grads[0], grads[0], None, None)
        ),
    ),
    plain_gradient=_is_float32_on_cpu,
)

_LAYER_NORM = Op(
    "layer_norm",
    LayerNormArguments,
    1,
    check=_check_norm,
    results=_norm_results,
    backends=(
        Kernel("cpp", _norm_cpp, _why_no_cpp, _for_cpp, checks_itself=True),
        Composite("plain", _norm_plain),
    ),
    gradient=Gradient(
        _BACKWARD,
        save=lambda a, outputs: (a.x, a.weight),
        arguments=lambda grads, saved, a, needs: (None, *grads, *saved, a.eps),
        gradients=lambda grads, returned: (returned[0], *returned[1]),
    ),
    plain_gradient=_is_right,  # PyTorch's own op is as fast
)
