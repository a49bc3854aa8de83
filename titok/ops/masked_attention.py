"""Bidirectional multi-head attention between the two linear layers, without a transposed copy in between."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.ops import _masked_attention_cpp as cpp
from titok.ops._extension import why_no_cpp, why_no_flash_attn, why_no_triton
from titok.ops._registry import choose, no_autocast, ran, register, runs_eagerly
from titok.profiling import ranged

_SDPA_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_SDPA_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SCORES_AT_ONCE = 1 << 21  # of the plain path: 8 MiB in float32, so that the passes over them stay in the cache


@ranged("masked_attention")
def masked_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    key_mask: Tensor | None = None,
    query_range: tuple[int, int] | None = None,
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
        query_range: (start, stop): compute these rows only, 0 <= start <= stop <= N; None: all.
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
    if backend is None and key_mask is None and (done := _common(qkv, num_heads, query_range, scale)) is not None:
        return done
    check_tensor("qkv", qkv, shape=("B", "N", "3*H*D"), dtypes=FLOAT_DTYPES)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    batch, tokens, width = qkv.shape
    if num_heads < 1 or width == 0 or width % (3 * num_heads):
        raise ValueError(f"qkv: expected a last dimension of 3 * {num_heads} heads * D, got {width}")
    if key_mask is not None:
        check_tensor("key_mask", key_mask, shape=(batch, tokens), dtypes=(torch.bool,), device=qkv.device)
    start, stop = (0, tokens) if query_range is None else _checked_range(query_range, tokens)
    if scale is None:
        scale = (width // (3 * num_heads)) ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    arguments = (qkv, key_mask, num_heads, start, stop, float(scale), backend or "auto")
    if not runs_eagerly(qkv, gradients=True):
        return _op(*arguments)[0]
    wants_gradient = torch.is_grad_enabled() and qkv.requires_grad
    return (_Eager.apply(*arguments) if wants_gradient else _forward(*arguments))[0]


def _common(
    qkv: Tensor, num_heads: int, query_range: tuple[int, int] | None, scale: float | None
) -> Tensor | None:
    """The result of a usual call on the CPU, in C++, with the least Python; None for all other calls, whose arguments
    are then looked at one by one."""
    if not (
        runs_eagerly(qkv, gradients=True)
        and qkv.is_cpu
        and qkv.dtype in cpp.DTYPES
        and qkv.ndim == 3
        and qkv.numel() > 0
        and qkv.is_contiguous()
        and type(num_heads) is int
        and num_heads > 0
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and why_no_cpp() is None
    ):
        return None
    batch, tokens, width = qkv.shape
    if width % (3 * num_heads):
        return None
    start, stop = (0, tokens) if query_range is None else _checked_range(query_range, tokens)
    if start == stop:
        return None
    if scale is None:
        scale = (width // (3 * num_heads)) ** -0.5
    if qkv.requires_grad and torch.is_grad_enabled():
        return _Eager.apply(qkv, None, num_heads, start, stop, scale, "cpp")[0]
    ran("masked_attention", "cpp")
    out = qkv.new_empty(batch, stop - start, width // 3)
    cpp.forward(qkv, None, num_heads, start, scale, out)
    return out


def _checked_range(query_range: Any, tokens: int) -> tuple[int, int]:
    if not isinstance(query_range, tuple | list) or len(query_range) != 2:
        raise TypeError(f"query_range: expected a pair (start, stop), got {query_range!r}")
    start, stop = query_range
    if not all(isinstance(i, int | torch.SymInt) and not isinstance(i, bool) for i in query_range):
        raise TypeError(f"query_range: expected two ints, got {query_range!r}")
    if not 0 <= start <= stop <= tokens:
        raise ValueError(f"query_range: expected 0 <= start <= stop <= {tokens}, got ({start}, {stop})")
    return start, stop


def _choose(qkv: Tensor, key_mask: Tensor | None, num_heads: int, backend: str) -> str:
    def triton() -> str | None:
        head_dim = qkv.shape[2] // (3 * num_heads)
        if qkv.dtype == torch.float64:
            return "it has no float64 kernel"
        return why_no_triton(qkv) if head_dim <= 128 else f"its heads have at most 128 channels, got {head_dim}"

    def why_not_cpp() -> str | None:
        if qkv.dtype not in cpp.DTYPES:
            return f"it takes float32 and bfloat16, got {str(qkv.dtype).removeprefix('torch.')}"
        return why_no_cpp(qkv)

    def flash_attn() -> str | None:
        if qkv.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, got {str(qkv.dtype).removeprefix('torch.')}"
        return why_no_flash_attn(qkv) if key_mask is None else "it takes no key_mask"

    return choose(
        "masked_attention",
        backend,
        {
            "triton": triton,
            "cpp": why_not_cpp,
            "sdpa": lambda: None,
            "flash-attn": flash_attn,
            "plain": lambda: None,
        },
    )


def _forward(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The output (B, Nq, H*D), and the log-sum-exp (B, H, Nq) of the scores where the backward wants it."""
    name = _choose(qkv, key_mask, num_heads, backend)
    if qkv.shape[0] == 0 or start == stop:
        return _forward_empty(qkv, num_heads, start, stop, name)
    if name == "triton":
        from titok.kernels import masked_attention as kernels

        out, lse = _forward_empty(qkv, num_heads, start, stop, name)
        kernels.forward(*_for_triton(qkv, key_mask), num_heads, start, scale, out, lse)
        return out, lse
    if name == "cpp":
        out, lse = _forward_empty(qkv, num_heads, start, stop, name)
        cpp.forward(_dense(qkv), key_mask, num_heads, start, scale, out, lse)
        return out, lse
    with no_autocast(qkv):
        if name == "flash-attn":
            return _flash_attn(qkv, num_heads, start, stop, scale), qkv.new_empty(0, dtype=torch.float32)
        path = _plain if name == "plain" else _sdpa_cpu if qkv.device.type == "cpu" else _sdpa
        return path(qkv, key_mask, num_heads, start, stop, scale)


def _forward_empty(qkv: Tensor, num_heads: int, start: int, stop: int, name: str) -> tuple[Tensor, Tensor]:
    batch, _, width = qkv.shape
    out = qkv.new_empty(batch, stop - start, width // 3)
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    if name in ("triton", "cpp"):
        return out, qkv.new_empty(batch, num_heads, stop - start, dtype=dtype)
    if name == "sdpa" and qkv.device.type == "cpu":  # its log-sum-exp comes with the heads innermost
        return out, qkv.new_empty(batch, stop - start, num_heads, dtype=dtype).transpose(1, 2)
    return out, qkv.new_empty(0, dtype=dtype)


def _forward_fake(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _forward_empty(qkv, num_heads, start, stop, _choose(qkv, key_mask, num_heads, backend))


def _backward(
    grad: Tensor,
    qkv: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    start: int,
    stop: int,
    scale: float,
    backend: str,
) -> Tensor:
    """Gradient of qkv (B, N, 3*H*D), contiguous; 0 for the queries outside start..stop."""
    name = _choose(qkv, key_mask, num_heads, backend)
    if qkv.shape[0] == 0 or start == stop:
        return torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    if name == "triton":
        return _triton_backward(grad, qkv, key_mask, out, lse, num_heads, start, stop, scale)
    if name == "cpp":
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        _zero_unused_queries(dqkv, start, stop)
        cpp.backward(_dense(grad), _dense(qkv), key_mask, out, lse, num_heads, start, scale, dqkv)
        return dqkv
    with no_autocast(qkv):
        if name == "plain":
            return _plain_backward(grad, qkv, key_mask, num_heads, start, stop, scale)
        if qkv.device.type == "cpu":
            return _sdpa_cpu_backward(grad, qkv, key_mask, out, lse, num_heads, start, stop, scale)
        return _fused_backward(grad, qkv, key_mask, num_heads, start, stop, scale, name)


def _backward_fake(grad: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, key_mask, *ctx.arguments = inputs
    ctx.save_for_backward(qkv, key_mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dqkv = None if grad is None else _backward_op(grad, *ctx.saved_tensors, *ctx.arguments)
    return (dqkv, *[None] * 6)


class _Eager(torch.autograd.Function):
    """What `register_autograd` makes of the op, without the dispatcher's cost for an op written in Python."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        dqkv = None if grad is None else _backward(grad, *ctx.saved_tensors, *ctx.arguments)
        return (dqkv, *[None] * 6)


# --- Triton


def _for_triton(qkv: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """qkv as it is where its rows are dense and its offsets within a sample fit 32 bits."""
    fits = qkv.stride(2) == 1 and 0 <= qkv.stride(1) * qkv.shape[1] < 2**31 and qkv.stride(0) >= 0
    return qkv if fits else qkv.contiguous(), None if key_mask is None else key_mask.contiguous()


def _triton_backward(
    grad: Tensor,
    qkv: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    start: int,
    stop: int,
    scale: float,
) -> Tensor:
    from titok.kernels import masked_attention_backward as kernels

    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _zero_unused_queries(dqkv, start, stop)
    kernels.backward(grad.contiguous(), *_for_triton(qkv, key_mask), out, lse, num_heads, start, scale, dqkv)
    return dqkv


def _zero_unused_queries(dqkv: Tensor, start: int, stop: int) -> None:
    width = dqkv.shape[2] // 3
    if start > 0:
        dqkv[:, :start, :width] = 0
    if stop < dqkv.shape[1]:
        dqkv[:, stop:, :width] = 0


def _heads(qkv: Tensor, num_heads: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: queries (B, H, Nq, D), keys and values (B, H, N, D)."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind()
    return (q if stop - start == tokens else q[:, :, start:stop]), k, v


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# --- PyTorch's fused attention, on views: it reads strided heads and writes tokens before heads


def _sdpa(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(qkv, num_heads, start, stop)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
    return _zero_rows_without_keys(out, key_mask).contiguous(), qkv.new_empty(0, dtype=torch.float32)


def _flash_attn(qkv: Tensor, num_heads: int, start: int, stop: int, scale: float) -> Tensor:
    """The flash-attn package (Dao 2023), on views."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in _heads(qkv, num_heads, start, stop))
    return flash_attn_func(q, k, v, softmax_scale=scale).flatten(2)


def _fused_backward(
    grad: Tensor,
    qkv: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    start: int,
    stop: int,
    scale: float,
    name: str,
) -> Tensor:
    """Runs the forward once more, because what its backward needs differs among the libraries' own back ends."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        if name == "flash-attn":
            out = _flash_attn(leaf, num_heads, start, stop, scale)
        else:
            out, _ = _sdpa(leaf, key_mask, num_heads, start, stop, scale)
        (dqkv,) = torch.autograd.grad(out, leaf, grad)
    return _zero_rows_without_keys(dqkv, key_mask).contiguous()


def _sdpa_cpu(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float
) -> tuple[Tensor, Tensor]:
    """SDPA's one fused back end on the CPU, by its own name: that returns the log-sum-exp too."""
    q, k, v = _heads(_dense(qkv), num_heads, start, stop)
    out, lse = _SDPA_CPU(q, k, v, attn_mask=_additive(key_mask, q.dtype), scale=scale)
    out = out.transpose(1, 2).reshape(q.shape[0], stop - start, -1)
    return _zero_rows_without_keys(out, key_mask), lse


def _sdpa_cpu_backward(
    grad: Tensor,
    qkv: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    start: int,
    stop: int,
    scale: float,
) -> Tensor:
    """In float32 at least: SDPA's backward in bfloat16 takes far longer on a CPU."""
    q, k, v = _heads(_dense(_widened(qkv)), num_heads, start, stop)
    do, o = (_dense(_widened(t)).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (grad, out))
    gradients = _SDPA_CPU_BACKWARD(
        do, q, k, v, o, lse, 0.0, False, attn_mask=_additive(key_mask, q.dtype), scale=scale
    )
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _fill(dqkv, gradients, num_heads, start, stop)
    return _zero_rows_without_keys(dqkv, key_mask)


def _dense(x: Tensor) -> Tensor:
    """x with a last stride of 1, which the kernel takes for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, N): 0 where visible, -inf where hidden."""
    if key_mask is None:
        return None
    return torch.zeros(key_mask.shape, dtype=dtype).masked_fill_(~key_mask, -math.inf)[:, None, None, :]


def _zero_rows_without_keys(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """0 where a sample's keys are all hidden, for which SDPA gives 0 or NaN, as its version has it."""
    return x if key_mask is None else x.masked_fill(~key_mask.any(1)[:, None, None], 0)


def _fill(dqkv: Tensor, gradients: tuple[Tensor, Tensor, Tensor], num_heads: int, start: int, stop: int) -> None:
    """Writes the three gradients (B, H, ., D) into dqkv (B, N, 3*H*D)."""
    _zero_unused_queries(dqkv, start, stop)
    _, dk, dv = _heads(dqkv, num_heads, 0, dqkv.shape[1])
    dq, _, _ = _heads(dqkv, num_heads, start, stop)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient)


# --- plain matrix products, in float32 at least


def _plain(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], stop - start, qkv.shape[2] // 3)
    for rows in _chunks(qkv, num_heads, stop - start):
        q, k, v = _heads(_widened(qkv[rows]), num_heads, start, stop)
        p = _probabilities(q, k, None if key_mask is None else key_mask[rows], scale)
        out[rows] = (p @ v).transpose(1, 2).flatten(2)
    return out, _forward_empty(qkv, num_heads, 0, 0, "plain")[1]


def _plain_backward(
    grad: Tensor, qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float
) -> Tensor:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for rows in _chunks(qkv, num_heads, stop - start):
        q, k, v = _heads(_widened(qkv[rows]), num_heads, start, stop)
        do = _widened(grad[rows]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        p = _probabilities(q, k, None if key_mask is None else key_mask[rows], scale)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        _fill(dqkv[rows], (ds @ k, ds.mT @ q, p.mT @ do), num_heads, start, stop)
    return dqkv


def _chunks(qkv: Tensor, num_heads: int, num_queries: int) -> list[slice]:
    """Slices of the batch, each with about `_SCORES_AT_ONCE` scores."""
    batch, tokens = qkv.shape[:2]
    step = max(1, _SCORES_AT_ONCE // (num_heads * num_queries * tokens))
    return [slice(i, i + step) for i in range(0, batch, step)]


def _probabilities(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).mul_(scale)
    if key_mask is None:
        return scores.softmax(-1)
    scores.masked_fill_(~key_mask[:, None, None, :], -math.inf)
    return _zero_rows_without_keys(scores.softmax(-1).flatten(1, 2), key_mask).view_as(scores)


_ARGUMENTS = "int num_heads, SymInt start, SymInt stop, float scale, str backend"
_backward_op = register(
    "masked_attention_backward(Tensor grad, Tensor qkv, Tensor? key_mask, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> Tensor",
    _backward,
    _backward_fake,
)
_op = register(
    f"masked_attention(Tensor qkv, Tensor? key_mask, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
