"""The published generators, and the published sampling loop around them.

Every step takes two forward passes for guidance, logits at every position, noise for every logit, and a sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.baselines.published_parts import mlp, with_weights
from titok import MaskGIT
from titok.config import GeneratorConfig, SamplingConfig
from titok.generation.schedules import schedule

# tokens (B, K), labels (B,), probability of dropping the class -> logits (B, K, V)
Predict = Callable[[Tensor, Tensor, float], Tensor]


class BertLayer(nn.Module):
    """Post-norm transformer layer with separate products for queries, keys and values."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.mlp = mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (linear(x).view(split).transpose(1, 2) for linear in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(self.proj(mixed) + x)
        return self.norm2(self.mlp(x) + x)


class Bert(nn.Module):
    """The trunk that the official configuration calls "ViT": embeddings, a norm, post-norm layers."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        # titok adds the one token type in use to its position embeddings. Here the addition remains, with zeros.
        self.types = nn.Parameter(torch.zeros(1, config.width), requires_grad=False)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.blocks = nn.Sequential(
            *(BertLayer(config.width, config.heads, config.mlp_width) for _ in range(config.layers))
        )

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        return self.blocks(self.norm(words + self.types + positions))


class UViTBlock(nn.Module):
    """Pre-norm transformer layer whose attention runs in float32, whatever the dtype of the rest."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x))
        wide = qkv if qkv.dtype == torch.float64 else qkv.float()
        q, k, v = rearrange(wide, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        # The official code does not convert back, so it raises an error here when its weights are bfloat16.
        x = x + self.proj(mixed.to(qkv.dtype))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """U-ViT (Bao et al. 2023): a transformer with long skip connections."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width, half = config.width, config.layers // 2
        shape = (width, config.heads, config.mlp_width)
        self.in_blocks, self.out_blocks = (nn.ModuleList(UViTBlock(*shape) for _ in range(half)) for _ in range(2))
        self.mid_block = UViTBlock(*shape)
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(half))
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        x, stack = words + positions, []
        for block in self.in_blocks:
            x = block(x)
            stack.append(x)
        x = self.mid_block(x)
        for block, skip in zip(self.out_blocks, self.skips, strict=True):
            x = block(skip(torch.cat([x, stack.pop()], dim=-1)))
        return self.norm(x)


class PublishedGenerator(nn.Module):
    """A class and partly masked tokens to logits; `sample` draws tokens."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size + config.num_classes + 2, config.width)
        self.positions = nn.Parameter(torch.empty(1 + config.num_latent_tokens, config.width))
        self.trunk = Bert(config) if config.architecture == "vit" else UViT(config)
        self.lm_head = nn.Linear(config.width, config.codebook_size)

    @classmethod
    def of(cls, generator: MaskGIT, dtype: torch.dtype | None = None) -> PublishedGenerator:
        """With the weights of a titok generator, in `dtype`; None keeps theirs."""
        weights = dict(generator.state_dict())
        if generator.config.architecture == "vit":
            weights["trunk.types"] = torch.zeros_like(weights["positions"][:1])
            for name in [name for name in weights if ".attn." in name]:
                value, short = weights.pop(name), name.replace("attn.", "")
                if "qkv" not in name:
                    weights[short] = value
                    continue
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    weights[short.replace("qkv", part)] = rows
        else:
            weights = {name.replace("attn.", ""): value for name, value in weights.items()}
        return with_weights(lambda: cls(generator.config), weights, dtype)

    def forward(self, tokens: Tensor, labels: Tensor, drop: float) -> Tensor:
        """tokens (B, K), labels (B,) -> logits (B, K, V); each class is dropped with probability `drop`."""
        codes, classes = self.config.codebook_size, self.config.num_classes
        labels = torch.where(torch.rand(labels.shape, device=labels.device) < drop, classes, labels)
        words = self.embedding(torch.cat([(codes + 1 + labels)[:, None], tokens], dim=1))
        return self.lm_head(self.trunk(words, self.positions)[:, 1:])

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """labels (B,) -> tokens (B, K)."""
        config = self.config
        steps = sample_steps(
            self, labels, config.num_latent_tokens, config.codebook_size, sampling or config.sampling
        )
        return steps[-1]


def sample_steps(
    predict: Predict,
    labels: Tensor,
    length: int,
    mask_token: int,
    sampling: SamplingConfig,
    uniform: Callable[[Tensor], Tensor] = torch.rand_like,
) -> list[Tensor]:
    """Draws tokens for labels (B,) and returns those entering each step, then the result: each (B, length) int64.

    Args:
        predict: called in every step with no class dropped, and in guided steps again with all classes dropped.
        mask_token: the id of a token that is not decided yet.
        uniform: tensor -> uniform numbers in [0, 1) of its shape. Each step asks first for noise on the logits,
            then for noise on the scores of the drawn tokens.

    Raises:
        ValueError: `sampling.confidence` is not "titok", the only rule of the official code.
    """
    if sampling.confidence != "titok":
        raise ValueError(f"sampling.confidence: expected 'titok', the published one, got {sampling.confidence!r}")
    tokens = torch.full((len(labels), length), mask_token, device=labels.device)
    history = [tokens]
    for step in schedule(sampling):
        masked = tokens == mask_token
        logits = predict(tokens, labels, 0.0)
        if step.guidance != 1.0 or sampling.guidance_schedule == "power-cosine":
            logits = logits + (logits - predict(tokens, labels, 1.0)) * (step.guidance - 1.0)
        if sampling.softmax_annealing:
            logits = logits / step.softmax_temperature
        drawn = _perturbed(logits, step.noise_temperature, uniform).argmax(dim=-1)
        scores = logits.gather(-1, drawn[..., None]).squeeze(-1)
        drawn = torch.where(masked, drawn, tokens)
        scores = torch.where(masked, scores, math.inf).float()
        # As published, row 0 decides for all rows how many tokens stay masked, and ties mask more than that.
        most = torch.tensor([math.floor(length * step.mask_ratio)], device=labels.device)
        left = torch.minimum(masked.sum(-1, keepdim=True) - 1, most).clamp(min=1)[0, 0]
        confidence = _perturbed(scores, step.noise_temperature, uniform)
        cut = confidence.sort(dim=-1).values[:, left - 1 : left]
        tokens = drawn if step.final else torch.where(confidence <= cut, mask_token, drawn)
        history.append(tokens)
    return history


def _perturbed(x: Tensor, temperature: float, uniform: Callable[[Tensor], Tensor]) -> Tensor:
    """x plus Gumbel noise times `temperature`."""
    noise = -torch.log((-torch.log(uniform(x).clamp(min=1e-20))).clamp(min=1e-20))
    return x + temperature * noise
