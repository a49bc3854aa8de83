"""The way from `masked_attention` to its C++ kernels: tensors that are checked and allocated, with dense rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titok.ops._extension import extension

DTYPES = (torch.float32, torch.bfloat16)


def forward(
    qkv: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    start: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """Writes out (B, Nq, H*D) and, for `backward`, the log-sum-exp of the scores (B, H, Nq), to base 2."""
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    extension().masked_attention(*_common(qkv, key_mask, num_heads, start, scale, out, lse))


def backward(
    grad: Tensor,
    qkv: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    start: int,
    scale: float,
    dqkv: Tensor,
) -> None:
    """Writes dqkv (B, N, 3*H*D), all but the queries that are not among the Nq from `start` on."""
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    common = _common(qkv, key_mask, num_heads, start, scale, out, lse)
    extension().masked_attention_backward(
        *common, grad.data_ptr(), grad.stride(0), grad.stride(1), dqkv.data_ptr()
    )


def _common(
    qkv: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    start: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> tuple[Any, ...]:
    batch, tokens, width = qkv.shape
    return (
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        0 if key_mask is None else key_mask.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        qkv.dtype is torch.bfloat16,
        batch,
        tokens,
        num_heads,
        width // (3 * num_heads),
        start,
        out.shape[1],
        scale,
    )
