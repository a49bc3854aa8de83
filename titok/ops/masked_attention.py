"""Bidirectional multi-head attention between the two linear layers, without a transposed copy in between."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops._checks import check_tensor
from titok.ops._registry import choose, register, runs_eagerly

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCORES_AT_ONCE = 1 << 21  # of the plain path: 8 MiB in float32, so that the passes over them stay in the cache


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
            passes no gradient. Hidden tokens must be finite all the same: 0 * inf is NaN.
        query_range: (start, stop): compute these rows only, 0 <= start <= stop <= N; None: all.
        scale: default D ** -0.5.
        backend: "plain", "sdpa" or None for the fastest that can run.

    Returns:
        (B, Nq, H * D), contiguous, in qkv's dtype. A NaN or inf in qkv makes NaN in each row that it reaches.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
        RuntimeError: the back end asked for cannot run here.
    """
    check_tensor("qkv", qkv, shape=("B", "N", "3*H*D"), dtypes=DTYPES)
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
    call = _forward if runs_eagerly(qkv) else _op
    return call(qkv, key_mask, num_heads, start, stop, float(scale), backend or "auto")[0]


def _checked_range(query_range: Any, tokens: int) -> tuple[int, int]:
    if not isinstance(query_range, tuple | list) or len(query_range) != 2:
        raise TypeError(f"query_range: expected a pair (start, stop), got {query_range!r}")
    start, stop = query_range
    if not all(isinstance(i, int | torch.SymInt) and not isinstance(i, bool) for i in query_range):
        raise TypeError(f"query_range: expected two ints, got {query_range!r}")
    if not 0 <= start <= stop <= tokens:
        raise ValueError(f"query_range: expected 0 <= start <= stop <= {tokens}, got ({start}, {stop})")
    return start, stop


def _choose(qkv: Tensor, backend: str) -> str:
    return choose("masked_attention", backend, {"sdpa": lambda: None, "plain": lambda: None})


def _heads(qkv: Tensor, num_heads: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: queries (B, H, Nq, D), keys and values (B, H, N, D)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).transpose(1, 3).unbind(2)
    return q[:, :, start:stop], k, v


def _forward(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The output (B, Nq, H*D), and the log-sum-exp of each row's scores for back ends whose backward wants it."""
    name = _choose(qkv, backend)
    no_lse = qkv.new_empty(0, dtype=torch.float32)
    if qkv.shape[0] == 0 or start == stop:
        return qkv.new_empty(qkv.shape[0], stop - start, qkv.shape[2] // 3), no_lse
    path = _sdpa if name == "sdpa" else _plain
    with torch.autocast(qkv.device.type, enabled=False):
        return path(qkv, key_mask, num_heads, start, stop, scale), no_lse


def _sdpa(qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float) -> Tensor:
    """PyTorch's fused attention on views: it reads strided heads and writes tokens before heads."""
    q, k, v = _heads(qkv, num_heads, start, stop)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
    if key_mask is not None:  # whether a fully hidden row gives 0 or NaN differs among SDPA's own back ends
        out = out.masked_fill(~key_mask.any(1)[:, None, None], 0)
    return out.contiguous()


def _plain(qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float) -> Tensor:
    out = qkv.new_empty(qkv.shape[0], stop - start, qkv.shape[2] // 3)
    for rows in _chunks(qkv, num_heads, stop - start):
        q, k, v = _heads(_widened(qkv[rows]), num_heads, start, stop)
        probabilities = _probabilities(q, k, None if key_mask is None else key_mask[rows], scale)
        out[rows] = (probabilities @ v).transpose(1, 2).flatten(2)
    return out


def _plain_backward(
    grad: Tensor, qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float
) -> Tensor:
    """Gradient of qkv, from qkv alone, in float32 at least: bfloat16 products are slow on a CPU's backward."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for rows in _chunks(qkv, num_heads, stop - start):
        q, k, v = _heads(_widened(qkv[rows]), num_heads, start, stop)
        do = _widened(grad[rows]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        p = _probabilities(q, k, None if key_mask is None else key_mask[rows], scale)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq, dk, dv = _heads(dqkv[rows], num_heads, 0, qkv.shape[1])
        dq[:, :, :start] = 0
        dq[:, :, stop:] = 0
        dq[:, :, start:stop] = ds @ k
        dk.copy_(ds.mT @ q)
        dv.copy_(p.mT @ do)
    return dqkv


def _chunks(qkv: Tensor, num_heads: int, num_queries: int) -> list[slice]:
    """Slices of the batch, each with about `_SCORES_AT_ONCE` scores."""
    batch, tokens = qkv.shape[:2]
    step = max(1, _SCORES_AT_ONCE // max(1, num_heads * num_queries * tokens))
    return [slice(i, i + step) for i in range(0, batch, step)]


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _probabilities(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).mul_(scale)
    if key_mask is None:
        return scores.softmax(-1)
    scores.masked_fill_(~key_mask[:, None, None, :], -math.inf)
    return scores.softmax(-1).masked_fill_(~key_mask.any(1)[:, None, None, None], 0)


def _forward_fake(
    qkv: Tensor, key_mask: Tensor | None, num_heads: int, start: int, stop: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    _choose(qkv, backend)
    return qkv.new_empty(qkv.shape[0], stop - start, qkv.shape[2] // 3), qkv.new_empty(0, dtype=torch.float32)


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
    if qkv.shape[0] == 0 or start == stop:
        return torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    with torch.autocast(qkv.device.type, enabled=False):
        return _plain_backward(grad, qkv, key_mask, num_heads, start, stop, scale)


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
