"""The one transformer of the project: attention, MLP, blocks before or after which the norms stand, and the trunk.

All heavy work is in `titok.ops`: attention reads the packed projection as the linear layer wrote it, and every
residual sum is fused with the norm that follows it.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok.models.layers import LayerNorm, Linear
from titok.ops import add_layer_norm, masked_attention

Rows = tuple[int, int]  # the half-open range of tokens that somebody reads; None: all
FirstLayerInput = tuple[
    Tensor, Tensor
]  # residual stream (B, N, D) and packed projection (B, N, 3*D) of the first layer


class Attention(nn.Module):
    """Bidirectional multi-head attention. `dropout` acts on the attention weights, in training only."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)  # rows: queries, keys, values; heads within each
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D), or (B, stop - start, D) for `rows` = (start, stop)."""
        return self.attend(self.qkv(x), rows)

    def attend(self, qkv: Tensor, rows: Rows | None = None) -> Tensor:
        """What follows the packed projection (B, N, 3*D)."""
        if self.training and self.dropout > 0:
            # The op has no dropout (its noise would have to be stored for the backward): PyTorch's own has.
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
            q = q if rows is None else q[:, :, rows[0] : rows[1]]
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
            return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))
        return self.proj(masked_attention(qkv, self.heads, query_range=rows))


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


class Block(nn.Module):
    """One layer: pre-norm by `forward` (or `attend`, where a trunk fuses its sums with the next norm), or post-norm."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, *, eps: float, qkv_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x + attention(norm1(x)), then x + MLP(norm2(x))."""
        x, h = self.attend(x, self.norm1(x))
        return x + self.mlp(h)

    def attend(self, x: Tensor, h: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Residual stream x and h = norm1(x) -> the stream after attention, and norm2 of it."""
        return self.attend_to(x, self.attn.qkv(h), rows)

    def attend_to(self, x: Tensor, qkv: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """The same from the packed projection of h."""
        attended = self.attn.attend(qkv, rows)
        return add_norm(x if rows is None else x[:, rows[0] : rows[1]], attended, self.norm2)

    def post_norm(self, x: Tensor) -> Tensor:
        """x = norm1(x + attention(x)), then norm2(x + MLP(x)), as in BERT."""
        _, x = add_norm(x, self.dropout(self.attn(x)), self.norm1)
        _, x = add_norm(x, self.dropout(self.mlp(x)), self.norm2)
        return x


def add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(x + residual, norm of it) in one pass."""
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


class Transformer(nn.Module):
    """norm_pre, pre-norm blocks, norm_post: the trunk of both sides of the tokenizer."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_pre = LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, eps=eps) for _ in range(layers))
        self.norm_post = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, rows: Rows, entered: FirstLayerInput | None = None) -> Tensor:
        """x (B, N, D) -> norm_post of the tokens in `rows` (B, stop - start, D).

        Only those rows of the last layer are computed: nobody reads the others (exact, not an approximation).

        Args:
            entered: `enter` of tokens that stand in front of x in every sample, computed once for all.
        """
        x, qkv = self.enter(x)
        if entered is not None:
            x, qkv = (torch.cat([a.expand(len(b), -1, -1), b], 1) for a, b in zip(entered, (x, qkv), strict=True))
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        for block, following in itertools.pairwise(blocks):
            x, h = block.attend_to(x, qkv)
            x, h = add_norm(x, block.mlp(h), following.norm1)
            qkv = following.attn.qkv(h)
        x, h = blocks[-1].attend_to(x, qkv, rows)
        return add_norm(x, blocks[-1].mlp(h), self.norm_post)[1]

    def enter(self, x: Tensor) -> FirstLayerInput:
        """x (B, N, D) -> the residual stream and the first layer's packed projection, both token by token."""
        first: Block = self.blocks[0]  # type: ignore[assignment]
        x = self.norm_pre(x)
        return x, first.attn.qkv(first.norm1(x))


class PostNormTrunk(nn.Module):
    """BERT's encoder, the published generators' "ViT": embedding norm, then post-norm blocks. Its eps is 1e-12."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, dropout: float) -> None:
        super().__init__()
        eps = 1e-12
        self.norm = LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_width, eps=eps, dropout=dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block.post_norm(x)  # type: ignore[operator]
        return x


class UViTTrunk(nn.Module):
    """U-ViT (Bao et al. 2023): layers/2 blocks, one in the middle, layers/2 that each first mix in the output of
    their mirror image by a linear layer on [x, skip]; then a norm."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, eps: float = 1e-5) -> None:
        super().__init__()

        def block() -> Block:
            return Block(width, heads, mlp_width, eps=eps, qkv_bias=False)

        self.in_blocks = nn.ModuleList(block() for _ in range(layers // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block() for _ in range(layers // 2))
        self.skips = nn.ModuleList(Linear(2 * width, width) for _ in range(layers // 2))
        self.norm = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        stack = []
        for block in self.in_blocks:
            x = block(x)
            stack.append(x)
        x = self.mid_block(x)
        for block, skip in zip(self.out_blocks, self.skips, strict=True):
            x = block(skip(torch.cat([x, stack.pop()], dim=-1)))
        return self.norm(x)


def init_weights(module: nn.Module, scheme: Literal["xavier", "trunc_normal"]) -> None:
    """Fresh weights: linear layers by Xavier (tokenizers) or a normal of 0.02 cut at two deviations (generators),
    biases 0, norms 1 and 0. Embedding tables are drawn by their owners."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            if scheme == "xavier":
                nn.init.xavier_uniform_(m.weight)
            else:
                nn.init.trunc_normal_(m.weight, std=0.02, a=-0.04, b=0.04)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
