"""Slow definitions in float64 that tests compare with. They import nothing of titok and share no code with it."""

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
    """(..., K), (K, C) -> (..., C): the mean of the codes, weighted by exp(logit), in float64."""
    logits, codebook = logits.double(), codebook.double()
    weights = (logits - logits.max(-1, keepdim=True).values).exp()
    return (weights[..., None] * codebook).sum(-2) / weights.sum(-1, keepdim=True)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last axis, by its definition, in float64."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    deviation = ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * weight.double() + bias.double()


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as the paper defines it (Salmon et al., SC 2011), with Python's integers."""
    left, right, (k0, k1) = [counter[0], counter[2]], [counter[1], counter[3]], key
    for _ in range(10):
        high = [m * x // 2**32 for m, x in zip((0xD2511F53, 0xCD9E8D57), left, strict=True)]
        low = [m * x % 2**32 for m, x in zip((0xD2511F53, 0xCD9E8D57), left, strict=True)]
        left, right = [high[1] ^ right[0] ^ k0, high[0] ^ right[1] ^ k1], [low[1], low[0]]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return left[0], right[0], left[1], right[1]


def decode_distribution(
    cond: np.ndarray,
    uncond: np.ndarray | None,
    guidance: float,
    softmax_temperature: float,
    draw_temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The logits (V,) of one position after guidance and temperature, and the probability (V,) of each code."""
    logits = cond.astype(np.float64)
    if uncond is not None:
        logits = guidance * logits + (1.0 - guidance) * uncond.astype(np.float64)
    logits = logits / softmax_temperature
    weights = np.exp((logits - logits.max()) / draw_temperature)
    return logits, weights / weights.sum()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """The chi-square statistic and its degrees of freedom. Cells with an expected count below 10 are merged."""
    expected = counts.sum() * probabilities.astype(np.float64)
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def group_norm_silu(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """GroupNorm of (B, C, H, W), one group at a time, then z / (1 + exp(-z)), in float64. Differentiable."""
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
