"""Residual add and LayerNorm in one pass over the rows, as transformer blocks have them side by side."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.ops import _registry
from titok.ops._extension import extension, why_no_cpp, why_no_triton
from titok.profiling import ranged

_CPP_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # RowType in csrc/add_layer_norm.h
# The gradients of weight and bias are summed by chunks of rows, so that no number of threads changes a bit.
_CHUNK_ROWS, _MOST_CHUNKS = 16, 64


@ranged("add_layer_norm")
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, LayerNorm(x + residual)) over the last axis, differentiable once.

    Pre-norm blocks read the sum as the stream and the normalised rows as the next layer's input; post-norm blocks
    read the normalised rows alone. `layer_norm` is the op where there is nothing to add.

    Args:
        x, residual: (..., D) of one shape, float16, bfloat16, float32 or float64. The dtypes may differ: a float32
            stream stays float32 when a bfloat16 branch is added.
        weight, bias: (D,), any of these dtypes.
        eps: added to the variance.
        out_dtype: dtype of the normalised rows; None: that of the sum. The dtype of the next layer saves a cast.
        out: two contiguous tensors that take the results and are returned, of the dtypes that these would have. The
            first may be x or residual itself, to keep a stream in place; else they overlap nothing.
        backend: "cpp" (CPU, float32 and bfloat16), "triton", "plain", or None for the fastest that can run.

    Returns:
        The sum, in torch's promotion of the two dtypes, rounded to it before it is normalised; and the normalised
        rows. Autocast changes neither dtype. Statistics are float32 (float64 for float64). A row that holds inf or
        NaN is NaN throughout when normalised.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a back end of no such name.
        RuntimeError: the named back end can't run here.
    """
    tensors = (x, residual, weight, bias)
    eager = _registry.runs_eagerly(*tensors)
    watched = not eager and _registry.runs_eagerly(*tensors, gradients=True)
    if backend is None and (eager or (watched and out is None)) and _is_common(*tensors, out_dtype):
        if watched and x.dtype is residual.dtype is weight.dtype is torch.float32 and out_dtype is None:
            _registry.ran("add_layer_norm", "plain")  # PyTorch's own gradient is as fast, and there sooner
            with _registry.no_autocast(x):
                total = x + residual
                return total, F.layer_norm(total, weight.shape, weight, bias, eps)
        if (done := (_common if eager else _Common.apply)(*tensors, eps, out_dtype, out)) is not None:
            return done
    _check(*tensors, out_dtype)
    backend = None if backend == "auto" else backend
    if out is not None:
        _check_out(out, *_fake(*tensors, eps, out_dtype))
    if eager:
        return _forward(*tensors, eps, out_dtype, backend, out)
    results: tuple[torch.Tensor, torch.Tensor]
    if not watched:
        results = _OP(*tensors, eps, out_dtype, backend)
    elif (  # on a CPU PyTorch's own gradient keeps 16-bit statistics for 16-bit rows
        torch.promote_types(x.dtype, residual.dtype).itemsize >= 4
        and _choose(backend, *tensors, out_dtype=out_dtype) == "plain"
    ):
        results = _plain_forward(*tensors, eps, out_dtype)
    else:
        results = _Eager.apply(*tensors, eps, out_dtype, backend)
    return results if out is None else (out[0].copy_(results[0]), out[1].copy_(results[1]))


@ranged("layer_norm")
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm(x) over the last axis: `add_layer_norm` with nothing to add.

    Eager calls on a CPU that want no gradient run in C++; everything else is PyTorch's own op, with the same dtypes.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64.
        weight, bias: (D,), any of these dtypes.
        eps: added to the variance.
        out_dtype: dtype of the result, None for x's.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    if _registry.runs_eagerly(x, weight, bias) and _usual(x, weight, bias) and _is_cpp_type(out_dtype):
        normalised = torch.empty_like(x, dtype=out_dtype)
        _launch_cpp(x, None, weight, bias, eps, None, normalised)
        return normalised
    _check(x, x, weight, bias, out_dtype)
    with _registry.no_autocast(x):
        return _plain_norm(x, weight, bias, eps, out_dtype)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_dtype: torch.dtype | None,
) -> None:
    check_tensor("x", x, shape=("...", "D"), dtypes=FLOAT_DTYPES)
    check_tensor("residual", residual, shape=tuple(x.shape), dtypes=FLOAT_DTYPES, device=x.device)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, shape=(x.shape[-1],), dtypes=FLOAT_DTYPES, device=x.device)
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one channel, got {tuple(x.shape)}")
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected a floating dtype, got {out_dtype}")


def _check_out(out: Any, *wanted: torch.Tensor) -> None:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"out: expected a pair of tensors, got {type(out).__name__}")
    for i, (got, like) in enumerate(zip(out, wanted, strict=True)):
        check_tensor(f"out[{i}]", got, shape=like.shape, dtypes=(like.dtype,), device=like.device)
        if not got.is_contiguous():
            raise ValueError(f"out[{i}]: expected a contiguous tensor, got strides {got.stride()}")


# --- C++


def _is_cpp_type(dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype in _CPP_TYPES


def _usual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether these are what the C++ kernel takes as they are, tested with the least Python: `_check` in one look."""
    return (
        x.is_cpu
        and weight.is_cpu
        and bias.is_cpu
        and x.dtype in _CPP_TYPES
        and weight.dtype is bias.dtype
        and weight.dtype in _CPP_TYPES
        and x.numel() > 0
        and weight.shape == bias.shape == x.shape[-1:] != ()
        and x.is_contiguous()
        and weight.is_contiguous()
        and bias.is_contiguous()
        and why_no_cpp() is None
    )


def _is_like(out: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether `out` can take a result of x's shape."""
    return (
        type(out) is torch.Tensor
        and out.is_cpu
        and out.dtype is (dtype or x.dtype)
        and out.shape == x.shape
        and out.is_contiguous()
    )


def _is_common(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_dtype: torch.dtype | None,
) -> bool:
    """Whether this is a usual call on the CPU; all others are looked at one argument at a time."""
    return (
        _usual(x, weight, bias)
        and residual.is_cpu
        and residual.shape == x.shape
        and residual.dtype in _CPP_TYPES
        and residual.is_contiguous()
        and _is_cpp_type(out_dtype)
    )


def _common(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The results of a usual call; None where `out` can't take them."""
    wide = x if x.dtype is torch.float32 else residual  # float32 if one of them is
    if out is None:
        total, normalised = torch.empty_like(wide), torch.empty_like(wide, dtype=out_dtype)
    else:
        total, normalised = out
        if not (_is_like(total, wide, None) and _is_like(normalised, wide, out_dtype)):
            return None
    _launch_cpp(x, residual, weight, bias, eps, total, normalised)
    return total, normalised


def _launch_cpp(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    normalised: torch.Tensor,
) -> None:
    """Contiguous rows of any shape. Positional: names would cost a microsecond."""
    _registry.ran("add_layer_norm", "cpp")
    width = weight.shape[0]
    extension().add_layer_norm(
        x.data_ptr(),
        _CPP_TYPES[x.dtype],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else _CPP_TYPES[residual.dtype],
        0 if total is None else total.data_ptr(),
        normalised.data_ptr(),
        _CPP_TYPES[normalised.dtype],
        weight.data_ptr(),
        bias.data_ptr(),
        _CPP_TYPES[weight.dtype],
        x.numel() // width,
        width,
        eps,
    )


def _choose(backend: str | None, *tensors: torch.Tensor, out_dtype: torch.dtype | None = None) -> str:
    """`tensors`: those whose rows are read and written, then the parameters."""
    dtypes = {out_dtype or torch.float32, *(t.dtype for t in tensors)}

    def cpp() -> str | None:
        if unknown := dtypes.difference(_CPP_TYPES):
            return f"it takes float32 and bfloat16, not {unknown.pop()}"
        return why_no_cpp(*tensors)

    def triton() -> str | None:
        if torch.float64 in dtypes:
            return "it has no float64 kernel"
        if tensors[0].shape[-1] > 8192:
            return f"it holds a row of at most 8192 channels, got {tensors[0].shape[-1]}"
        return why_no_triton(*tensors)

    candidates = {"triton": triton, "plain": lambda: None, "cpp": cpp}
    return _registry.choose(
        "add_layer_norm",
        backend,
        candidates if tensors[0].is_cuda else dict(reversed(candidates.items())),
    )


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    name = _choose(backend, x, residual, weight, bias, out_dtype=out_dtype)
    if name == "plain":
        results = _plain_forward(x, residual, weight, bias, eps, out_dtype)
        return results if out is None else (out[0].copy_(results[0]), out[1].copy_(results[1]))
    total, normalised = out or _fake(x, residual, weight, bias, eps, out_dtype)
    if total.numel():
        x, residual, weight, bias = (t.contiguous() for t in (x, residual, weight, bias))
        if name == "cpp":
            if weight.dtype != bias.dtype:
                weight, bias = weight.float(), bias.float()
            _launch_cpp(x, residual, weight, bias, eps, total, normalised)
        else:
            from titok.kernels import add_layer_norm as kernels

            kernels.forward(x, residual, weight, bias, eps, total, normalised)
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
        return total, _plain_norm(total, weight, bias, eps, out_dtype)


def _plain_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out_dtype: torch.dtype | None
) -> torch.Tensor:
    # torch's own op keeps float32 statistics, but mixes dtypes only on some devices
    mixed = {weight.dtype, bias.dtype, x.dtype, out_dtype or x.dtype} != {x.dtype}
    rows = x.to(_wide(x)) if mixed else x
    normalised = F.layer_norm(rows, rows.shape[-1:], weight.to(rows.dtype), bias.to(rows.dtype), eps)
    return normalised.to(out_dtype or x.dtype)


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
    name = _choose(backend, total, grad_normalised, weight)
    if name == "plain":
        return _plain_backward(grad_total, grad_normalised, total, weight, eps)
    grad, channels = torch.empty_like(total), total.shape[-1]
    if not total.numel():
        return grad, weight.new_zeros((2, channels), dtype=torch.float32)
    if grad_total is not None:
        grad_total = grad_total.to(total.dtype).contiguous()
    grad_normalised, weight = grad_normalised.contiguous(), weight.contiguous()
    if name == "cpp":
        return grad, _cpp_backward(grad_total, grad_normalised, total, weight, eps, grad)
    from titok.kernels import add_layer_norm as kernels

    return grad, kernels.backward(grad_total, grad_normalised, total, weight, eps, grad)


def _cpp_backward(
    grad_total: torch.Tensor | None,
    grad_normalised: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
) -> torch.Tensor:
    """Fills `grad`; returns the gradients of weight and bias (2, D) float32. All contiguous."""
    channels = weight.shape[0]
    rows = total.numel() // channels
    chunk_rows = max(_CHUNK_ROWS, -(-rows // _MOST_CHUNKS))
    partial = total.new_empty((-(-rows // chunk_rows), 2, channels), dtype=torch.float32)
    extension().add_layer_norm_backward(
        0 if grad_total is None else grad_total.data_ptr(),
        grad_normalised.data_ptr(),
        _CPP_TYPES[grad_normalised.dtype],
        total.data_ptr(),
        grad.data_ptr(),
        _CPP_TYPES[total.dtype],
        weight.data_ptr(),
        _CPP_TYPES[weight.dtype],
        partial.data_ptr(),
        rows,
        channels,
        chunk_rows,
        eps,
    )
    return partial.sum(0)


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


def _gradients(
    ctx: Any, backward: Any, grad_total: torch.Tensor | None, grad_normalised: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    grads = (grad_total, grad_total, None, None)
    if grad_normalised is not None:
        grad, parameters = backward(grad_total, grad_normalised, total, weight, ctx.eps, ctx.backend)
        grads = (grad, grad, *parameters)
    wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad[:4], strict=True)
    return (*(g.to(dtype) if g is not None and need else None for g, dtype, need in wanted), None, None, None)


def _autograd(
    ctx: Any, grad_total: torch.Tensor | None, grad_normalised: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, _BACKWARD_OP, grad_total, grad_normalised)


class _Eager(torch.autograd.Function):
    """What `register_autograd` makes of the op, without the dispatcher's cost for an op written in Python."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: torch.Tensor | None, grad_normalised: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, _backward, grad_total, grad_normalised)


class _Common(_Eager):
    """`_Eager` for a usual call on the CPU."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = cast(tuple[torch.Tensor, torch.Tensor], _common(*inputs))  # there is no `out`
        _setup_context(ctx, (*inputs[:6], None), output)
        return output


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
