"""Masked-token training of MaskGIT (Chang et al. 2022) as pure functions; all randomness comes in as arguments."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def num_masked(times: Tensor, length: int) -> Tensor:
    """How many of `length` tokens to mask at `times` (B,) in [0, 1), by the arccos schedule: (B,) int64, >= 1.

    Rounds half to even, where sampling takes the floor: as the official code trains and samples.
    """
    ratio = (torch.acos(times) / (math.pi / 2)).clamp(1e-6, 1.0)
    return (length * ratio).round().clamp(min=1).long()


def random_mask(times: Tensor, uniform: Tensor) -> Tensor:
    """The masked positions, (B, K) bool, out of times (B,) and uniform draws (B, K), both in [0, 1)."""
    return uniform.argsort(dim=-1) < num_masked(times, uniform.shape[-1])[:, None]


def drop_classes(labels: Tensor, no_class: int, uniform: Tensor, probability: float) -> Tensor:
    """labels (B,), those with a draw of `uniform` (B,) below `probability` replaced by `no_class`."""
    return labels.masked_fill(uniform < probability, no_class)


def masked_token_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    label_smoothing: float = 0.1,
    unmasked_weight: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy over all tokens of the batch, and the accuracy on the masked ones.

    Args:
        logits: (B, K, V).
        targets: (B, K) int64, the tokens before masking.
        mask: (B, K) bool, the masked ones: weight 1, the others `unmasked_weight`.

    Returns:
        loss (), and accuracy (): the mean over rows of each row's own (0 for a row without masked tokens).
    """
    losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", label_smoothing=label_smoothing)
    masked = mask.to(logits.dtype)
    weights = masked + (1 - masked) * unmasked_weight
    loss = (losses * weights).sum() / (weights.sum() + 1e-8)
    correct = (logits.detach().argmax(dim=-1) == targets) * masked
    return loss, (correct.sum(dim=-1) / (masked.sum(dim=-1) + 1e-8)).mean()
