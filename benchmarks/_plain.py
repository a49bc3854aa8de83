"""TiTok's generation as eager PyTorch, the way the official code computes it: the baseline of our own engine.

It runs the weights of our modules, but none of our ops: separate norms, sums and activations, both guidance passes for
every sample in every step, the head at every position, whole noise tensors. The switches are the rungs of the ladder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from titok import MaskGIT, TiTok, official
from titok.config import SamplingConfig
from titok.images import to_uint8
from titok.schedules import schedule
from titok.transformer import UViTTrunk


class Plain:
    """`Plain(tokenizer, generator)(labels)` -> uint8 pictures (B, H, W, 3), as `titok.Pipeline`, from other noise.

    Args:
        sdpa: PyTorch's fused attention; otherwise two matrix products and a softmax.
        channels_last: memory format of the pixel decoder's maps.
        fused_ops: our modules, with their ops, in place of the plain ones; the sampling loop stays plain.
    """

    def __init__(
        self,
        tokenizer: TiTok,
        generator: MaskGIT,
        *,
        sdpa: bool = True,
        channels_last: bool = False,
        fused_ops: bool = False,
    ) -> None:
        self.tokenizer, self.generator = tokenizer.eval(), generator.eval()
        self.sdpa, self.channels_last, self.fused_ops = sdpa, channels_last, fused_ops

    @torch.no_grad()
    def __call__(self, labels: Sequence[int]) -> Tensor:
        logits = self.proxy_logits(self.sample(labels))
        return to_uint8(self.pixels(logits))

    @torch.no_grad()
    def sample(self, labels: Sequence[int]) -> Tensor:
        """(B, K) tokens."""
        g = self.generator
        sampling, length, mask = g.config.sampling, g.config.num_latent_tokens, g.mask_token
        classes = torch.tensor(labels, device=g.device)
        dropped = torch.full_like(classes, g.no_class)
        tokens = torch.full((len(labels), length), mask, device=g.device)
        left = length
        for step in schedule(sampling):
            cond, uncond = self.logits(tokens, classes), self.logits(tokens, dropped)
            left = step.num_masked(length, left)
            tokens = _decide(tokens, uncond + step.guidance * (cond - uncond), step, left, mask, sampling)
        return tokens

    @torch.no_grad()
    def logits(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """The generator's (B, K, V) logits."""
        g = self.generator
        if self.fused_ops:
            return g.lm_head(g.features(tokens, classes))
        ids = torch.cat([(g.mask_token + 1 + classes)[:, None], tokens], dim=1)
        x = F.embedding(ids, g.embedding.weight) + g.positions
        trunk: Any = g.trunk
        if isinstance(trunk, UViTTrunk):
            stack = []
            for block in trunk.in_blocks:
                x = self._pre_norm(block, x)
                stack.append(x)
            x = self._pre_norm(trunk.mid_block, x)
            for block, skip in zip(trunk.out_blocks, trunk.skips, strict=True):
                x = self._pre_norm(block, skip(torch.cat([x, stack.pop()], dim=-1)))
            return g.lm_head(trunk.norm(x)[:, 1:])
        x = trunk.norm(x)
        for block in trunk.blocks:
            x = block.norm1(x + self._attend(block.attn, x))
            x = block.norm2(x + block.mlp(x))
        return g.lm_head(x[:, 1:])

    @torch.no_grad()
    def proxy_logits(self, tokens: Tensor) -> Tensor:
        """(B, h, w, codes): the tokenizer's decoder."""
        t, d = self.tokenizer, self.tokenizer.decoder
        assert t.quantizer is not None
        latents = t.quantizer.lookup(tokens).to(t.dtype)
        if self.fused_ops:
            return d(latents)
        (h, w), batch = d.grid, len(tokens)
        masks = torch.cat([d.class_token + d.patch_positions[:1], d.mask_token[0] + d.patch_positions[1:]])
        x = torch.cat([masks.expand(batch, -1, -1), d.embed(latents) + d.latent_positions], dim=1)
        x = d.trunk.norm_pre(x)
        for block in d.trunk.blocks:
            x = self._pre_norm(block, x)
        x = d.head(d.trunk.norm_post(x)[:, 1 : 1 + h * w])
        return rearrange(x, "b (h w) (r s c) -> b (h r) (w s) c", h=h, w=w, r=d.side, s=d.side)

    @torch.no_grad()
    def pixels(self, logits: Tensor) -> Tensor:
        """(B, 3, H, W): expected code vectors, then the pixel decoder."""
        t = self.tokenizer
        d: Any = t.pixel_decoder
        x = rearrange(logits.softmax(-1) @ t.pixel_codebook.to(logits.dtype), "b h w c -> b c h w")
        x = x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        if self.fused_ops:
            return d(x)
        x = d.conv_in(x)
        for block in d.mid:
            x = _residual(block, x)
        for level in reversed(d.levels):
            for block in level.blocks:
                x = _residual(block, x)
            if level.upsample is not None:
                x = level.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return d.conv_out(F.silu(d.norm_out(x)))

    def _pre_norm(self, block: Any, x: Tensor) -> Tensor:
        x = x + self._attend(block.attn, block.norm1(x))
        return x + block.mlp(block.norm2(x))

    def _attend(self, attn: Any, x: Tensor) -> Tensor:
        q, k, v = rearrange(attn.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attn.heads)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.proj(rearrange(mixed, "b h n d -> b n (h d)"))


def _residual(block: Any, x: Tensor) -> Tensor:
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.conv2(F.silu(block.norm2(h)))
    if block.nin_shortcut is None:
        return x + h
    if block.shortcut_of_result:
        return official.shortcut_of_result(h, block.nin_shortcut)
    return block.nin_shortcut(x) + h


def _decide(tokens: Tensor, logits: Tensor, step: Any, left: int, mask: int, sampling: SamplingConfig) -> Tensor:
    """One step with whole noise tensors: draw, confidence, and the least confident `left` positions masked again."""
    masked = tokens == mask
    logits = logits / step.softmax_temperature
    noise = _gumbel(logits) * step.noise_temperature if sampling.confidence == "titok" else _gumbel(logits)
    drawn = torch.where(masked, (logits + noise).argmax(dim=-1), tokens)
    scores = logits if sampling.confidence == "titok" else logits.log_softmax(dim=-1)
    confidence = scores.gather(-1, drawn[..., None])[..., 0]
    confidence = confidence + step.noise_temperature * _gumbel(confidence)
    confidence = torch.where(masked, confidence, math.inf)
    if left == 0:
        return drawn
    again = confidence.argsort(dim=-1)[:, :left]
    return drawn.scatter(1, again, mask)


def _gumbel(like: Tensor) -> Tensor:
    uniform = torch.rand(like.shape, device=like.device).clamp_(min=1e-20)
    return (-torch.log((-torch.log(uniform)).clamp_(min=1e-20))).to(like.dtype)
