"""Slow float64 definitions that tests compare against. They import nothing of titok and share no code with it."""

from __future__ import annotations

import numpy as np
import torch


def squared_distances(latents: np.ndarray, codebook: np.ndarray, normalize: bool) -> np.ndarray:
    """(M, V) squared distances of latents (M, C) to codes (V, C), by subtraction, in float64."""
    z, e = latents.astype(np.float64), codebook.astype(np.float64)
    if normalize:
        z = z / np.maximum(np.sqrt((z * z).sum(1, keepdims=True)), 1e-12)
        e = e / np.maximum(np.sqrt((e * e).sum(1, keepdims=True)), 1e-12)
    return np.stack([((z - code) ** 2).sum(1) for code in e], axis=1)


def code_mixture(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(..., K), (K, C) -> (..., C): sum over codes of exp(logit) * code, over the sum of exp(logit), in float64."""
    logits, codebook = logits.double(), codebook.double()
    weights = (logits - logits.max(-1, keepdim=True).values).exp()
    return (weights[..., None] * codebook).sum(-2) / weights.sum(-1, keepdim=True)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last axis, by its definition, in float64."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    deviation = ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * weight.double() + bias.double()


def group_norm_silu(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """GroupNorm of (B, C, H, W) group by group, then z / (1 + exp(-z)), in float64; differentiable."""
    width = x.shape[1] // num_groups
    images = []
    for image in x.double():
        groups = []
        for first in range(0, x.shape[1], width):
            group = image[first : first + width]
            centred = group - group.sum() / group.numel()
            deviation = ((centred * centred).sum() / group.numel() + eps).sqrt()
            affine = torch.stack(
                [
                    c / deviation * weight[first + i].double() + bias[first + i].double()
                    for i, c in enumerate(centred)
                ]
            )
            groups.append(affine / (1 + torch.exp(-affine)))
        images.append(torch.cat(groups))
    return torch.stack(images)
