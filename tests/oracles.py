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
def attention(
    qkv: torch.Tensor,
    num_heads: int,
    key_mask: torch.Tensor | None = None,
    query_range: tuple[int, int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """(B, N, 3*H*D) -> (B, Nq, H*D) by the definition, one sample and head at a time, in float64; differentiable."""
    width = qkv.shape[2] // 3
    head_dim = width // num_heads
    start, stop = query_range or (0, qkv.shape[1])
    samples = []
    for i, sample in enumerate(qkv.double()):
        seen = torch.arange(len(sample)) if key_mask is None else torch.nonzero(key_mask[i])[:, 0]
        heads = []
        for h in range(num_heads):
            q, k, v = (sample[:, part * width + h * head_dim :][:, :head_dim] for part in range(3))
            q, k, v = q[start:stop], k[seen], v[seen]
            if len(seen) == 0:
                heads.append(q * 0)
                continue
            scores = torch.einsum("id,jd->ij", q, k) * (head_dim**-0.5 if scale is None else scale)
            weights = torch.exp(scores - scores.detach().max(1, keepdim=True).values)
            heads.append(torch.einsum("ij,jd->id", weights / weights.sum(1, keepdim=True), v))
        samples.append(torch.cat(heads, 1))
    return torch.stack(samples)
