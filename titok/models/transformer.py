"""The transformers: attention, MLP and block, and the three stacks of blocks that tokenizer and generators use.

The heavy work is in `titok.ops`. Attention reads the packed projection in the layout in which the linear layer
wrote it, and every residual sum is fused with the norm that follows it.

Shapes: B samples, N tokens, D width. A `query_range` (start, stop) limits attention's queries, and so its output,
to those tokens; all tokens stay keys and values.

Dropout is an argument of each call, 0 unless the caller is training. No module reads `training` here, so that
sampling from a model that is being trained needs no change of its mode.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titok.models.layers import BlockLinear, LayerNorm
from titok.ops import add_layer_norm, layer_norm_of_sum, masked_attention

T = TypeVar("T")


class Attention(nn.Module):
    """Bidirectional multi-head attention (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        # Rows of the weight: queries, keys, values; heads within each.
        self.qkv: BlockLinear = BlockLinear(width, 3 * width, bias=qkv_bias)
        self.proj: BlockLinear = BlockLinear(width, width)

    def attend(self, qkv: Tensor, query_range: tuple[int, int] | None = None, *, dropout: float = 0.0) -> Tensor:
        """Attention, before the output projection.

        Args:
            qkv: (B, N, 3 * D), what `self.qkv` returned.
            dropout: probability with which an attention weight is set to 0.

        Returns:
            (B, N, D), or (B, stop - start, D) with a `query_range`.
        """
        if dropout > 0:
            # Our op has no dropout, because its backward would have to store the noise. PyTorch's own has.
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
            q = q if query_range is None else q[:, :, query_range[0] : query_range[1]]
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            return rearrange(attended, "b h n d -> b n (h d)")
        return masked_attention(qkv, self.heads, query_range=query_range)


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1: BlockLinear = BlockLinear(width, hidden)
        self.fc2: BlockLinear = BlockLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., hidden), what `fc2` reads."""
        return self.fc1(x, gelu=True)


class Block(nn.Module):
    """One transformer layer, which `forward` computes pre-norm and `post_norm` post-norm."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, eps: float, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1: LayerNorm = LayerNorm(width, eps=eps)
        self.attn: Attention = Attention(width, heads, qkv_bias=qkv_bias)
        self.norm2: LayerNorm = LayerNorm(width, eps=eps)
        self.mlp: MLP = MLP(width, mlp_width)

    def forward(self, x: Tensor, query_range: tuple[int, int] | None = None) -> Tensor:
        """x (B, N, D): x = x + attention(norm1(x)), then x + MLP(norm2(x))."""
        x, h = self.attend(x, self.attn.qkv(self.norm1(x)), query_range)
        return x + self.mlp(h)

    def attend(self, x: Tensor, qkv: Tensor, query_range: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """The first half of the pre-norm layer: x + attention, and norm2 of it, which the MLP reads.

        Args:
            x: (B, N, D).
            qkv: (B, N, 3 * D), the packed projection of norm1(x).

        Returns:
            two tensors (B, N, D), or (B, stop - start, D) with a `query_range`.
        """
        attended = self.attn.attend(qkv, query_range)
        x = x if query_range is None else x[:, query_range[0] : query_range[1]]
        return linear_add_norm(self.attn.proj, attended, x, self.norm2)

    def post_norm(self, x: Tensor, *, dropout: float = 0.0) -> Tensor:
        """x (B, N, D): x = norm1(x + attention(x)), then norm2(x + MLP(x)), as in BERT (Devlin et al. 2019).

        `dropout` acts on the attention weights, on the result of attention and on that of the MLP.
        """
        attended = self.attn.attend(self.attn.qkv(x), dropout=dropout)
        x = linear_norm_of_sum(self.attn.proj, attended, x, self.norm1, dropout=dropout)
        return linear_norm_of_sum(self.mlp.fc2, self.mlp.hidden(x), x, self.norm2, dropout=dropout)


def linear_add_norm(linear: BlockLinear, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """linear(x) + residual, and norm of it.

    x (B, N, inputs), residual (B, N, D) -> two tensors (B, N, D).
    """
    fused = linear.add_norm(x, residual, norm)
    return fused or add_layer_norm(residual, linear(x), norm.weight, norm.bias, norm.eps)


def linear_norm_of_sum(
    linear: BlockLinear, x: Tensor, residual: Tensor, norm: nn.LayerNorm, *, dropout: float = 0.0
) -> Tensor:
    """norm(dropout(linear(x)) + residual), where nobody reads the sum.

    x (B, N, inputs), residual (B, N, D) -> (B, N, D).
    """
    fused = None if dropout else linear.add_norm(x, residual, norm)
    if fused is not None:
        return fused[1]
    return layer_norm_of_sum(residual, F.dropout(linear(x), dropout), norm.weight, norm.bias, norm.eps)


class Stack(nn.Module):
    """What the stacks of blocks share.

    Attributes:
        checkpoint_activations: True keeps only the inputs of each block for the backward pass, which computes the
            block again.
        whole_blocks: True calls each block as a whole, so that all of its weights are read within one call. Sharded
            training needs this. By default, a pre-norm block ends with the first norm and projection of the next
            one, because the norm reads the sum in the same pass.
    """

    checkpoint_activations = False
    whole_blocks = False

    def run_block(self, block: Callable[..., T], *inputs: Tensor) -> T:
        """block(*inputs), whose activations are computed again in the backward pass if that is asked for."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block(*inputs)
        result: T = checkpoint(block, *inputs, use_reentrant=False)
        return result


class Transformer(Stack):
    """A norm, pre-norm blocks, a norm: the stack in the tokenizer's encoder and decoder."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_pre: LayerNorm = LayerNorm(width, eps=eps)
        self.blocks: nn.ModuleList = nn.ModuleList(Block(width, heads, mlp_width, eps=eps) for _ in range(layers))
        self.norm_post: LayerNorm = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, query_range: tuple[int, int]) -> Tensor:
        """The output of the tokens in `query_range`.

        The last layer computes those tokens alone, because nothing reads the others. That changes no value.

        Args:
            x: (B, N, D).

        Returns:
            (B, stop - start, D).
        """
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        x = self.norm_pre(x)
        if self.whole_blocks:
            for block in blocks[:-1]:
                x = self.run_block(block, x)
            return self.norm_post(blocks[-1](x, query_range))
        qkv = blocks[0].attn.qkv(blocks[0].norm1(x))
        for block, next_block in itertools.pairwise(blocks):
            x, qkv = self.run_block(functools.partial(_block_and_next_qkv, block, next_block), x, qkv)
        x, h = blocks[-1].attend(x, qkv, query_range)
        mlp = blocks[-1].mlp
        return linear_norm_of_sum(mlp.fc2, mlp.hidden(h), x, self.norm_post)


def _block_and_next_qkv(block: Block, next_block: Block, x: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a pre-norm block, from its input and the packed projection of it, and the next one's projection."""
    x, h = block.attend(x, qkv)
    x, h = linear_add_norm(block.mlp.fc2, block.mlp.hidden(h), x, next_block.norm1)
    return x, next_block.attn.qkv(h)


class PostNormTransformer(Stack):
    """A norm, then post-norm blocks, as in BERT (Devlin et al. 2019): the official generators called "ViT"."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.norm: LayerNorm = LayerNorm(width, eps=eps)
        self.blocks: nn.ModuleList = nn.ModuleList(Block(width, heads, mlp_width, eps=eps) for _ in range(layers))

    def forward(self, x: Tensor, *, dropout: float = 0.0) -> Tensor:
        """x (B, N, D) -> (B, N, D). `dropout` acts after the first norm and in every block (`Block.post_norm`)."""
        x = F.dropout(self.norm(x), dropout)
        for block in self.blocks:
            x = self.run_block(functools.partial(block.post_norm, dropout=dropout), x)  # type: ignore[arg-type, operator, misc]
        return x


class UViT(Stack):
    """U-ViT (Bao et al. 2023): pre-norm blocks in two halves around one more, then a norm.

    Each block of the second half first reads the output of its mirror image in the first half, by a linear layer
    on both, concatenated: x = skip([x, output of the mirror image]).
    """

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, eps: float = 1e-5) -> None:
        super().__init__()

        def block() -> Block:
            return Block(width, heads, mlp_width, eps=eps, qkv_bias=False)

        self.in_blocks: nn.ModuleList = nn.ModuleList(block() for _ in range(layers // 2))
        self.mid_block: Block = block()
        self.out_blocks: nn.ModuleList = nn.ModuleList(block() for _ in range(layers // 2))
        self.skips: nn.ModuleList = nn.ModuleList(BlockLinear(2 * width, width) for _ in range(layers // 2))
        self.norm: LayerNorm = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)"""
        outputs = []
        for block in self.in_blocks:
            x = self.run_block(block, x)
            outputs.append(x)
        x = self.run_block(self.mid_block, x)
        for block, skip in zip(self.out_blocks, self.skips, strict=True):
            x = self.run_block(block, skip(torch.cat([x, outputs.pop()], dim=-1)))
        return self.norm(x)


def init_weights(module: nn.Module, scheme: Literal["xavier", "trunc_normal"]) -> None:
    """Initialises all linear layers and norms of `module`. The owners of embedding tables initialise those.

    Args:
        scheme: for the weights of linear layers. "xavier" (Glorot & Bengio 2010) for the tokenizers;
            "trunc_normal", a normal distribution with standard deviation 0.02 that is cut at two of them, for the
            generators. Biases become 0; the weight of a norm becomes 1.
    """
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
