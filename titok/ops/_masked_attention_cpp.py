"""The way from `masked_attention` to its C++ kernels: tensors that are checked and allocated, with dense rows."""

from __future__ import annotations

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
    extension().masked_attention(qkv, key_mask, num_heads, start, scale, out, lse)


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
    extension().masked_attention_backward(grad, qkv, key_mask, out, lse, num_heads, start, scale, dqkv)
