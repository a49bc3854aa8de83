"""The optimizer of every recipe, AdamW with weight decay on matrices only, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from titok.models.layers import Conv3x3, UpsampleConv
from titok.training.config import TrainingConfig


def learning_rate(step: int, *, base: float, final: float, warmup: int, total: int) -> float:
    """The learning rate of step `step`, which counts from 0.

    It rises linearly from 0 to `base` over `warmup` steps, falls to `final` over half a cosine until step `total`,
    and stays there.
    """
    if step < warmup:
        return base * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on.

    They are the weights of linear layers and convolutions, except those that embed patches or codes. Decay does
    not act on norms, biases, learned tokens, positions, embeddings and codebooks.
    """
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "embed" not in name
    }


def lay_out_convolutions(model: nn.Module) -> None:
    """Stores the weights of the 3x3 convolutions of channels-last maps in channels-last order, too.

    PyTorch otherwise brings a weight into that order three times in a step, before each product that reads or makes it.
    The optimizer's state and the averages take the order of the weights.
    """
    for module in model.modules():
        if isinstance(module, (Conv3x3, UpsampleConv)):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that require gradients, in two groups: with and without weight decay."""
    decayed = decayed_parameters(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
