"""nearest_codebook: every back end against float64 distances, ties, non-finite values, tracing, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import squared_distances
from titok.ops import last_backend, nearest_codebook


def assert_nearest(latents: torch.Tensor, codebook: torch.Tensor, normalize: bool, indices: torch.Tensor) -> None:
    """Each chosen code's float64 distance is within float32 rounding of the best."""
    assert indices.dtype == torch.int64
    assert indices.shape == latents.shape[:-1]
    z = latents.detach().double().reshape(-1, latents.shape[-1]).numpy()
    e = codebook.detach().double().numpy()
    distances = squared_distances(z, e, normalize)
    chosen = np.take_along_axis(distances, indices.reshape(-1, 1).numpy(), 1)[:, 0]
    scale = 1 + 1 if normalize else (z * z).sum(1) + (e * e).sum(1).max()
    assert (chosen - distances.min(1) <= 4e-7 * np.sqrt(z.shape[1]) * scale).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("rows", "codes", "width"), [(1, 2, 4), (33, 7, 12), (130, 257, 16), (5, 1000, 3)])
def test_plain(rows: int, codes: int, width: int, normalize: bool) -> None:
    latents, codebook = torch.randn(rows, width), torch.randn(codes, width)
    indices = nearest_codebook(latents, codebook, normalize=normalize, backend="plain")
    assert_nearest(latents, codebook, normalize, indices)
    assert last_backend("nearest_codebook") == "plain"
