"""`masked_attention` for queries, keys and values in tensors of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.ops.core.mode import are_plain
from titok.ops.masked_attention import masked_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    key_mask: Tensor | None = None,
    query_range: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`masked_attention` of q, k, v that three linear layers wrote: softmax(scale * q k^T) v, differentiable once.

    Nothing is copied, neither forward nor backward, where q, k and v are the three parts of one packed tensor, as
    `qkv.chunk(3, dim=-1)` returns them. Otherwise, and under torch.compile or torch.export, they are concatenated
    first. A projection that writes them side by side saves that copy.

    Args:
        q, k, v: (B, N, H * D), of one shape, dtype and device: for each token all heads, one after the other.
        num_heads, key_mask, query_range, scale, backend: as of `masked_attention`.

    Returns:
        (B, Nq, H * D), contiguous, in the dtype of q.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_attention`, or q, k and v differ in shape, dtype or device.
    """
    check_tensor("q", q, shape=("B", "N", "H*D"), dtypes=FLOAT_DTYPES)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    is_packed = not torch.compiler.is_compiling() and _are_parts_of_one(q, k, v)
    qkv = _Packed.apply(q, k, v) if is_packed else torch.cat([q, k, v], dim=-1)
    return masked_attention(
        qkv, num_heads, key_mask=key_mask, query_range=query_range, scale=scale, backend=backend
    )


def _are_parts_of_one(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v lie in one storage as the three thirds of each row of a packed tensor."""
    if not are_plain((q, k, v)):  # they may have no storage, for example within vmap
        return False
    width = q.shape[-1]
    return (
        q.stride() == k.stride() == v.stride()
        and q.stride(-1) == 1
        and q.stride(1) >= 3 * width
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        and k.storage_offset() - q.storage_offset() == width
        and v.storage_offset() - k.storage_offset() == width
    )


class _Packed(torch.autograd.Function):
    """The packed tensor (B, N, 3 * H * D) that q, k and v are the parts of, without a copy."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, width = q.shape
        return q.detach().as_strided((batch, tokens, 3 * width), q.stride())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is kept: the gradient of a view is a view of the gradient."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0].chunk(3, dim=-1)
