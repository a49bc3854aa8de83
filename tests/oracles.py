"""Slow float64 definitions that tests compare against. They import nothing of titok and share no code with it."""

from __future__ import annotations

import numpy as np


def squared_distances(latents: np.ndarray, codebook: np.ndarray, normalize: bool) -> np.ndarray:
    """(M, V) squared distances of latents (M, C) to codes (V, C), by subtraction, in float64."""
    z, e = latents.astype(np.float64), codebook.astype(np.float64)
    if normalize:
        z = z / np.maximum(np.sqrt((z * z).sum(1, keepdims=True)), 1e-12)
        e = e / np.maximum(np.sqrt((e * e).sum(1, keepdims=True)), 1e-12)
    return np.stack([((z - code) ** 2).sum(1) for code in e], axis=1)
