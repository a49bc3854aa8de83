"""Bidirectional multi-head attention between the two linear layers, without a transposed copy in between.

What is kept for the backward pass is the log-sum-exp to base 2 of each query's scaled scores, (B, H, Nq) in float32
(float64 for float64). The kernels exponentiate with base 2. Every back end keeps the same, so that any backward pass
can follow any forward pass. SDPA on a GPU and flash-attn keep NaN: their backward pass runs the forward pass once more.

This file is longer than 400 lines because it holds five back ends, each in both directions, that share their arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_int, check_number, check_tensor
from titok.ops.core.available import (
    extension,
    why_no_cpp,
    why_no_flash_attn,
    why_no_triton,
    why_not_float32_or_bfloat16,
)
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Gradient, Kernel, product, vjp

_SDPA_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_SDPA_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SCORES_AT_ONCE = 1 << 21  # of the plain path: 8 MiB in float32, so that the passes over them stay in the cache
_LOG2_E = math.log2(math.e)


def masked_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    key_mask: Tensor | None = None,
    query_range: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over all heads (Vaswani et al. 2017, eq. 1), bidirectional, differentiable once.

    Args:
        qkv: (B, N, 3 * H * D) as one linear layer wrote it: for each token all heads of the queries, then of the
            keys, then of the values. float32, bfloat16, float16 or float64, also under autocast; any strides.
        num_heads: H.
        key_mask: (B, N) bool, True where a token is visible as a key. A query that sees no key gives 0 and
            passes no gradient. Hidden tokens must be finite all the same: 0 * inf is NaN (but not in "cpp").
        query_range: (start, stop), a tuple or a list: compute these rows only, 0 <= start <= stop <= N; None: all.
        scale: default D ** -0.5.
        backend: "triton" (D up to 128, no float64), "cpp" (CPU, float32 and bfloat16), "sdpa", "flash-attn" (16
            bits, no key_mask), "plain", or None for the fastest that can run. The backward of "sdpa" on a GPU and of
            "flash-attn" runs their forward once more.

    Returns:
        (B, Nq, H * D), contiguous, in qkv's dtype. A NaN in qkv reaches each row that depends on it, and so does an inf
        in the values.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
        RuntimeError: the back end asked for cannot run here.
    """
    num_heads = check_int("num_heads", num_heads)
    if query_range is None:
        start, stop = 0, qkv.shape[1] if isinstance(qkv, Tensor) and qkv.ndim == 3 else 0
    else:
        start, stop = _checked_range(query_range)
    scale = _default_scale(qkv, num_heads) if scale is None else check_number("scale", scale)
    return _MASKED_ATTENTION(qkv, key_mask, num_heads, start, stop, scale, backend=backend)[0]


def _default_scale(qkv: Any, num_heads: int) -> float:
    """D ** -0.5; 1 for arguments that the op's check is going to refuse."""
    if not isinstance(qkv, Tensor) or num_heads < 1:
        return 1.0
    head_dim = qkv.shape[-1] // (3 * num_heads) if qkv.ndim else 0
    return head_dim**-0.5 if head_dim else 1.0


def _checked_range(query_range: Any) -> tuple[int, int]:
    if not isinstance(query_range, tuple | list) or len(query_range) != 2:
        raise TypeError(f"query_range: expected a pair (start, stop), got {query_range!r:.60}")
    try:
        return check_int("query_range", query_range[0]), check_int("query_range", query_range[1])
    except TypeError:
        raise TypeError(f"query_range: expected two ints, got {query_range!r:.60}") from None


# ---------------------------------------------------------------------------------------------------------------
# Arguments and results of both directions


class Arguments(NamedTuple):
    qkv: Tensor
    key_mask: Tensor | None
    num_heads: int
    start: int | torch.SymInt
    stop: int | torch.SymInt
    scale: float


class BackwardArguments(NamedTuple):
    grad: Tensor
    qkv: Tensor
    key_mask: Tensor | None
    out: Tensor
    lse: Tensor
    num_heads: int
    start: int | torch.SymInt
    stop: int | torch.SymInt
    scale: float


def _check(a: Arguments | BackwardArguments) -> None:
    check_tensor("qkv", a.qkv, shape=("B", "N", "3*H*D"), dtypes=FLOAT_DTYPES)
    batch, tokens, width = a.qkv.shape
    if a.num_heads < 1 or width == 0 or width % (3 * a.num_heads):
        raise ValueError(f"qkv: expected a last dimension of 3 * {a.num_heads} heads * D, got {width}")
    if a.key_mask is not None:
        check_tensor("key_mask", a.key_mask, shape=(batch, tokens), dtypes=(torch.bool,), device=a.qkv.device)
    if not 0 <= a.start <= a.stop <= tokens:
        raise ValueError(f"query_range: expected 0 <= start <= stop <= {tokens}, got ({a.start}, {a.stop})")
    _check_scale(a.scale)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def _check_backward(a: BackwardArguments) -> None:
    _check(a)
    batch, _, width = a.qkv.shape
    device, queries = a.qkv.device, a.stop - a.start
    for name, tensor in (("grad", a.grad), ("out", a.out)):
        shape = (batch, queries, width // 3)
        check_tensor(name, tensor, shape=shape, dtypes=(a.qkv.dtype,), device=device)
    check_tensor("lse", a.lse, shape=(batch, a.num_heads, queries), dtypes=(_wide_dtype(a.qkv),), device=device)


def _results(a: Arguments) -> tuple[Tensor]:
    batch, _, width = a.qkv.shape
    return (a.qkv.new_empty(batch, a.stop - a.start, width // 3),)


def _kept(a: Arguments) -> tuple[Tensor]:
    shape = (a.qkv.shape[0], a.num_heads, a.stop - a.start)
    return (a.qkv.new_empty(shape, dtype=_wide_dtype(a.qkv)),)


def _backward_results(a: BackwardArguments) -> tuple[Tensor]:
    return (torch.empty_like(a.qkv, memory_format=torch.contiguous_format),)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads(qkv: Tensor, a: Arguments | BackwardArguments, *, every_query: bool = False) -> tuple[Tensor, ...]:
    """Views of the packed projection: queries (B, H, Nq, D), keys and values (B, H, N, D)."""
    q, k, v = qkv.unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    whole = every_query or a.stop - a.start == qkv.shape[1]
    return (q if whole else q[:, :, a.start : a.stop]), k, v


def _zero_unused_queries(dqkv: Tensor, a: BackwardArguments) -> None:
    width = dqkv.shape[2] // 3
    if a.start > 0:
        dqkv[:, : a.start, :width] = 0
    if a.stop < dqkv.shape[1]:
        dqkv[:, a.stop :, :width] = 0


def _zero_samples_without_keys(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero for every sample whose keys are all hidden, for which SDPA gives 0 or NaN, depending on its version."""
    return x if key_mask is None else x.masked_fill(~key_mask.any(1)[:, None, None], 0)


# ---------------------------------------------------------------------------------------------------------------
# C++


def _why_no_cpp(a: Arguments | BackwardArguments) -> str | None:
    return why_not_float32_or_bfloat16(a.qkv.dtype) or why_no_cpp(a.qkv)


def _with_dense_rows(a: Any) -> Any:
    """The arguments as the kernels read them: a last stride of 1, all but qkv and its gradient contiguous."""
    changes = {"qkv": _dense(a.qkv), "key_mask": None if a.key_mask is None else a.key_mask.contiguous()}
    if isinstance(a, BackwardArguments):
        changes.update(grad=_dense(a.grad), out=a.out.contiguous(), lse=a.lse.contiguous())
    return a._replace(**changes)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _cpp(a: Arguments, out: Tensor, lse: Tensor | None = None) -> None:
    _check_scale(a.scale)
    extension().masked_attention(a.qkv, a.key_mask, a.num_heads, a.start, a.scale, out, lse)


def _backward_cpp(a: BackwardArguments, dqkv: Tensor) -> None:
    if a.start == a.stop:
        dqkv.zero_()
        return
    _zero_unused_queries(dqkv, a)
    extension().masked_attention_backward(
        a.grad, a.qkv, a.key_mask, a.out, a.lse, a.num_heads, a.start, a.scale, dqkv
    )


# ---------------------------------------------------------------------------------------------------------------
# Triton


def _why_no_triton(a: Arguments | BackwardArguments) -> str | None:
    head_dim = a.qkv.shape[2] // (3 * a.num_heads)
    if a.qkv.dtype == torch.float64:
        return "it has no float64 kernel"
    if head_dim > 128:
        return f"its heads have at most 128 channels, got {head_dim}"
    if a.qkv.shape[1] * a.qkv.shape[2] >= 2**31:
        return f"its samples have fewer than 2^31 values, got {a.qkv.shape[1]} tokens of {a.qkv.shape[2]}"
    return why_no_triton(a.qkv)


def _for_triton(a: Any) -> Any:
    """qkv as it is where its rows are dense and its offsets within a sample fit 32 bits.

    Those of a contiguous qkv do: `_why_no_triton` refuses longer samples.
    """
    a = _with_dense_rows(a)
    fits = 0 <= a.qkv.stride(1) * a.qkv.shape[1] < 2**31 and a.qkv.stride(0) >= 0
    a = a if fits else a._replace(qkv=a.qkv.contiguous())
    return a._replace(grad=a.grad.contiguous()) if isinstance(a, BackwardArguments) else a


def _triton(a: Arguments, out: Tensor, lse: Tensor | None = None) -> None:
    from titok.kernels import masked_attention as kernels

    kernels.forward(a.qkv, a.key_mask, a.num_heads, int(a.start), a.scale, out, lse)


def _backward_triton(a: BackwardArguments, dqkv: Tensor) -> None:
    from titok.kernels import masked_attention_backward as kernels

    if a.start == a.stop:
        dqkv.zero_()
        return
    _zero_unused_queries(dqkv, a)
    kernels.backward(a.grad, a.qkv, a.key_mask, a.out, a.lse, a.num_heads, int(a.start), a.scale, dqkv)


# ---------------------------------------------------------------------------------------------------------------
# PyTorch's fused attention (SDPA) and the package flash-attn (Dao 2023), on views of the packed projection


def _sdpa(a: Arguments) -> tuple[Tensor, Tensor]:
    if a.qkv.device.type == "cpu":
        return _sdpa_cpu(a)
    return _sdpa_gpu(a.qkv, a), _kept(a)[0].fill_(math.nan)


def _sdpa_gpu(qkv: Tensor, a: Arguments | BackwardArguments) -> Tensor:
    q, k, v = _heads(qkv, a)
    mask = None if a.key_mask is None else a.key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a.scale)
    out = _with_nan(out, q, k, a.key_mask).transpose(1, 2).flatten(2)
    return _zero_samples_without_keys(out, a.key_mask).contiguous()


def _with_nan(out: Tensor, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """The output (B, H, Nq, D) of SDPA with the NaN of queries and visible keys, some of which it loses."""
    in_keys = k.isnan().any(-1)
    if key_mask is not None:
        in_keys = in_keys & key_mask[:, None]
    in_row = q.isnan().any(-1) | in_keys.any(-1, keepdim=True)
    return out.masked_fill(in_row[..., None], math.nan)


def _sdpa_cpu(a: Arguments) -> tuple[Tensor, Tensor]:
    """SDPA's one fused kernel on a CPU, called by its own name, because that returns the log-sum-exp (base e) too."""
    if a.qkv.numel() == 0 or a.start == a.stop:
        return _results(a)[0], _kept(a)[0]
    q, k, v = _heads(_dense(a.qkv), a)
    out, lse = _SDPA_CPU(q, k, v, attn_mask=_additive(a.key_mask, q.dtype), scale=a.scale)
    out = _with_nan(out, q, k, a.key_mask).transpose(1, 2).flatten(2).contiguous()
    return _zero_samples_without_keys(out, a.key_mask), (lse * _LOG2_E).contiguous()


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, N): 0 for visible keys, -inf for hidden ones."""
    if key_mask is None:
        return None
    return torch.zeros_like(key_mask, dtype=dtype).masked_fill_(~key_mask, -math.inf)[:, None, None, :]


def _backward_sdpa(a: BackwardArguments) -> tuple[Tensor]:
    if a.qkv.numel() == 0 or a.start == a.stop:
        return (torch.zeros_like(a.qkv, memory_format=torch.contiguous_format),)
    if a.qkv.device.type != "cpu":
        (dqkv,) = vjp(lambda qkv: _sdpa_gpu(qkv, a), (a.qkv,), a.grad)
        return (_zero_samples_without_keys(dqkv, a.key_mask).contiguous(),)
    # In float32 at least: SDPA's backward pass in bfloat16 takes far longer on a CPU.
    wide = _wide_dtype(a.qkv)
    q, k, v = _heads(_dense(a.qkv.to(wide)), a)
    grad, out = (_dense(t.to(wide)).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for t in (a.grad, a.out))
    # The kernel wants the heads innermost in the log-sum-exp.
    lse = (a.lse / _LOG2_E).transpose(1, 2).contiguous().transpose(1, 2)
    mask = _additive(a.key_mask, q.dtype)
    gradients = _SDPA_CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=a.scale)
    dqkv = torch.empty_like(a.qkv, memory_format=torch.contiguous_format)
    _zero_unused_queries(dqkv, a)
    dq, _, _ = _heads(dqkv, a)
    _, dk, dv = _heads(dqkv, a, every_query=True)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient)
    return (_zero_samples_without_keys(dqkv, a.key_mask),)


def _why_no_flash_attn(a: Arguments | BackwardArguments) -> str | None:
    if a.qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {str(a.qkv.dtype).removeprefix('torch.')}"
    return why_no_flash_attn(a.qkv) if a.key_mask is None else "it takes no key_mask"


def _flash_attn(a: Arguments) -> tuple[Tensor, Tensor]:
    return _flash_attn_out(a.qkv, a), _kept(a)[0].fill_(math.nan)


def _flash_attn_out(qkv: Tensor, a: Arguments | BackwardArguments) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in _heads(qkv, a))
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=a.scale).flatten(2)
    return out.contiguous()


def _backward_flash_attn(a: BackwardArguments) -> tuple[Tensor]:
    """Runs the forward pass once more."""
    (dqkv,) = vjp(lambda qkv: _flash_attn_out(qkv, a), (a.qkv,), a.grad)
    return (dqkv.contiguous(),)


# ---------------------------------------------------------------------------------------------------------------
# Plain matrix products, in float32 at least


def _plain(a: Arguments) -> tuple[Tensor, Tensor]:
    step = _samples_at_once(a)
    masks = itertools.repeat(None) if a.key_mask is None else a.key_mask.split(step)
    parts = [_attend(qkv, mask, a) for qkv, mask in zip(a.qkv.split(step), masks, strict=False)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _samples_at_once(a: Arguments | BackwardArguments) -> int:
    scores = a.num_heads * (a.stop - a.start) * a.qkv.shape[1]
    return max(1, _SCORES_AT_ONCE // max(1, scores))


def _attend(qkv: Tensor, key_mask: Tensor | None, a: Arguments | BackwardArguments) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(qkv.to(_wide_dtype(qkv)), a)
    scores = product(q, k.mT) * a.scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    probabilities = scores.softmax(-1)
    if key_mask is not None:
        probabilities = probabilities.masked_fill(~key_mask.any(1)[:, None, None, None], 0)
    out = product(probabilities, v).transpose(1, 2).flatten(2).to(qkv.dtype)
    return out, scores.detach().logsumexp(-1) * _LOG2_E


def _backward_plain(a: BackwardArguments) -> tuple[Tensor]:
    step = _samples_at_once(a)
    masks = itertools.repeat(None) if a.key_mask is None else a.key_mask.split(step)
    parts = []
    for qkv, mask, grad in zip(a.qkv.split(step), masks, a.grad.split(step), strict=False):
        (dqkv,) = vjp(lambda qkv, mask=mask: _attend(qkv, mask, a)[0], (qkv,), grad)
        parts.append(dqkv)
    return (torch.cat(parts),)


# ---------------------------------------------------------------------------------------------------------------
# The ops


def _product_flops(a: Arguments | BackwardArguments) -> int | torch.SymInt:
    """Of one of the products, such as that of queries and keys over all heads."""
    batch, tokens, width = a.qkv.shape
    return 2 * batch * (a.stop - a.start) * tokens * (width // 3)


_BACKWARD = Op(
    "masked_attention_backward",
    BackwardArguments,
    1,
    check=_check_backward,
    results=_backward_results,
    backends=(
        Kernel("triton", _backward_triton, _why_no_triton, _for_triton),
        Kernel("cpp", _backward_cpp, _why_no_cpp, _with_dense_rows, checks_itself=True),
        Composite("sdpa", _backward_sdpa, differentiable=False),
        Composite("flash-attn", _backward_flash_attn, _why_no_flash_attn, differentiable=False),
        Composite("plain", _backward_plain, differentiable=False),
    ),
    flops=lambda a: 5 * _product_flops(a),  # the scores again, and two for each product of the forward pass
)

_MASKED_ATTENTION = Op(
    "masked_attention",
    Arguments,
    1,
    check=_check,
    results=_results,
    kept=_kept,
    num_kept=1,
    backends=(
        Kernel("triton", _triton, _why_no_triton, _for_triton),
        Kernel("cpp", _cpp, _why_no_cpp, _with_dense_rows, checks_itself=True),
        Composite("sdpa", _sdpa, differentiable=False),
        Composite("flash-attn", _flash_attn, _why_no_flash_attn, differentiable=False),
        Composite("plain", _plain),
    ),
    gradient=Gradient(
        _BACKWARD,
        save=lambda a, outputs: (a.qkv, a.key_mask, *outputs),
        arguments=lambda grads, saved, a, needs: (*grads, *saved, *a[2:]),
        gradients=lambda grads, returned: (*returned, None),
    ),
    flops=lambda a: 2 * _product_flops(a),
)
