"""Masking and loss of MaskGIT's training (Chang et al. 2022). The random numbers come in as arguments."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def num_masked(times: Tensor, length: int) -> Tensor:
    """The number of tokens to mask, out of `length`, by the arccos schedule.

    It is rounded half to even here and rounded down in sampling, as the official code trains and samples.

    Args:
        times: (B,) in [0, 1).

    Returns:
        (B,) int64, at least 1.
    """
    ratio = (torch.acos(times) / (math.pi / 2)).clamp(1e-6, 1.0)
    return (length * ratio).round().clamp(min=1).long()


def random_mask(times: Tensor, uniform: Tensor) -> Tensor:
    """The positions to mask, (B, K) bool: `num_masked` random ones in each row.

    Args:
        times: (B,) in [0, 1).
        uniform: (B, K) uniform random numbers in [0, 1).
    """
    return uniform.argsort(dim=-1) < num_masked(times, uniform.shape[-1])[:, None]


def drop_classes(labels: Tensor, no_class: int, uniform: Tensor, probability: float) -> Tensor:
    """The labels (B,), with `no_class` in place of those whose random number is below `probability`.

    Args:
        uniform: (B,) uniform random numbers in [0, 1).
    """
    return labels.masked_fill(uniform < probability, no_class)


def masked_token_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    label_smoothing: float = 0.1,
    unmasked_weight: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """The weighted cross-entropy over all tokens of the batch, and the accuracy on the masked tokens.

    Args:
        logits: (B, K, V).
        targets: (B, K) int64, the tokens before masking.
        mask: (B, K) bool, true where a token is masked. Masked tokens have weight 1, the others `unmasked_weight`.

    Returns:
        the loss and the accuracy, both of shape (). The accuracy is computed for each row and averaged over the
        rows; a row without masked tokens counts as 0.
    """
    losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", label_smoothing=label_smoothing)
    masked = mask.to(logits.dtype)
    weights = masked + (1 - masked) * unmasked_weight
    loss = (losses * weights).sum() / (weights.sum() + 1e-8)
    correct = (logits.detach().argmax(dim=-1) == targets) * masked
    return loss, (correct.sum(dim=-1) / (masked.sum(dim=-1) + 1e-8)).mean()
