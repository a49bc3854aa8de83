"""Precision and recall of generated pictures (Kynkaanniemi et al. 2019), as ADM's evaluator defines them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


def precision_and_recall(
    reference: Tensor, samples: Tensor, *, neighbours: int = 3, block_size: int = 4096
) -> PrecisionRecall:
    """Precision and recall of samples with respect to a reference.

    Around each feature vector lies a ball whose radius is the distance to its k-th nearest neighbour in its own set,
    not counting itself. Precision is the share of samples in at least one ball of the reference. Recall is the share
    of reference vectors in at least one ball of the samples. A vector on the surface is inside.

    Distances are computed from products of vectors, in float64, in blocks of `block_size` rows. ADM's evaluator
    computes them in float16, so that its figures differ slightly.

    Args:
        reference: (N, D) of any floating dtype.
        samples: (M, D) on the same device.
        neighbours: k.
        block_size: vectors whose distances to all others are in memory at once.

    Raises:
        TypeError: not floating tensors.
        ValueError: other shapes, or a set has not more than `neighbours` vectors.
    """
    check_tensor("reference", reference, shape=("N", "D"), dtypes=FLOAT_DTYPES)
    check_tensor("samples", samples, shape=("M", reference.shape[1]), dtypes=FLOAT_DTYPES, device=reference.device)
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise ValueError(f"{name}: expected more than {neighbours} vectors, got {len(features)}")
    return PrecisionRecall(
        precision=_share_inside(samples, reference, _radii(reference, neighbours, block_size), block_size),
        recall=_share_inside(reference, samples, _radii(samples, neighbours, block_size), block_size),
    )


def _radii(features: Tensor, neighbours: int, block_size: int) -> Tensor:
    """The squared distance of each vector to its k-th nearest neighbour besides itself, (N,) float64."""
    radii = []
    for start in range(0, len(features), block_size):
        block = features[start : start + block_size]
        distances = _squared_distances(block, features)
        # Exactly 0 for the vector itself, which rounding may have made larger than the distance to a neighbour.
        distances[torch.arange(len(block)), torch.arange(start, start + len(block))] = 0.0
        radii.append(distances.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, block_size: int) -> float:
    """The share of points within at least one of the balls."""
    inside = [
        (_squared_distances(points[start : start + block_size], centres) <= radii).any(dim=1)
        for start in range(0, len(points), block_size)
    ]
    return float(torch.cat(inside).double().mean())


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, D) and (C, D) -> (R, C) float64."""
    products = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=rows.device)
    step = 8192  # columns at a time, so that the copies in float64 stay small
    rows = rows.double()
    for start in range(0, len(columns), step):
        block = columns[start : start + step].double()
        products[:, start : start + step] = (
            rows.square().sum(dim=1)[:, None] + block.square().sum(dim=1) - 2 * rows @ block.T
        )
    return products.clamp_(min=0.0)
