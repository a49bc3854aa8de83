"""The optimizer of both loops: AdamW with decay on matrices alone, warm-up and a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from titok.training.config import TrainingConfig


def learning_rate(step: int, *, base: float, final: float, warmup: int, total: int) -> float:
    """The rate of step `step` (from 0): linear from 0 to `base` over `warmup` steps, then half a cosine down to
    `final` at step `total`, and `final` from there on."""
    if step < warmup:
        return base * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on: weights of linear layers and convolutions, except those
    that embed patches or codes. Norms, biases, learned tokens, positions, embeddings and codebooks are left alone.
    """
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "embed" not in name
    }


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`, in two groups."""
    decayed = decayed_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
