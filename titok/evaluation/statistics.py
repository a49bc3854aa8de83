"""Statistics of sets of pictures, as sums in float64 that take the same memory for any number of pictures.

Each class collects batches by `update`. `reduce` then adds the sums of all processes of `torch.distributed`; without a
group it does nothing. Each process must call `reduce` once, after its last batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titok.checks import FLOAT_DTYPES, INTEGER_DTYPES, check_tensor
from titok.processes import sum_of_all


class FeatureMoments:
    """Mean and covariance of feature vectors.

    Attributes:
        count: number of vectors.
    """

    def __init__(self, dimension: int) -> None:
        self.count: int = 0
        self._sum = torch.zeros(dimension, dtype=torch.float64)
        self._products = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds features (B, D) of any floating dtype. The sums are kept on the device of the first batch.

        Raises:
            TypeError: not a floating tensor.
            ValueError: another shape.
        """
        check_tensor("features", features, shape=("B", len(self._sum)), dtypes=FLOAT_DTYPES)
        self._sum, self._products = self._sum.to(features.device), self._products.to(features.device)
        features = features.double()
        self.count += len(features)
        self._sum += features.sum(dim=0)
        self._products.addmm_(features.T, features)

    def reduce(self) -> None:
        """Adds the sums of all processes."""
        self._sum, self._products = sum_of_all(self._sum.cpu()), sum_of_all(self._products.cpu())
        self.count = _sum_of_counts(self.count)

    def mean(self) -> Tensor:
        """(D,) float64. Raises `ValueError` without vectors."""
        if self.count < 1:
            raise ValueError("features: expected at least 1 vector for a mean, got none")
        return self._sum / self.count

    def covariance(self) -> Tensor:
        """(D, D) float64, normalised by n - 1. Raises `ValueError` for fewer than 2 vectors."""
        if self.count < 2:
            raise ValueError(f"features: expected at least 2 vectors for a covariance, got {self.count}")
        mean = self.mean()
        covariance = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (covariance + covariance.T) / 2


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """The squared Frechet distance of two normal distributions (Dowson & Landau 1982; Heusel et al. 2017).

    It is |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). The last trace is the sum of the singular values of
    A1^T A2, where S = A A^T. The factors come from the eigenvalues of S. An eigenvalue that is not above the rounding
    error of the largest one counts as 0, so singular covariances need no special treatment. They arise from fewer
    vectors than dimensions.

    Args:
        mean, other_mean: (D,).
        covariance, other_covariance: (D, D), symmetric.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    size = len(mean)
    for name, tensor, shape in (
        ("mean", mean, (size,)),
        ("covariance", covariance, (size, size)),
        ("other_mean", other_mean, (size,)),
        ("other_covariance", other_covariance, (size, size)),
    ):
        check_tensor(name, tensor, shape=shape, dtypes=FLOAT_DTYPES)
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got others")
    factor, other_factor = _factor(covariance), _factor(other_covariance)
    overlap = torch.linalg.svdvals(factor.T @ other_factor).sum()
    shift = (mean.double() - other_mean.double()).square().sum()
    distance = float(shift + factor.square().sum() + other_factor.square().sum() - 2 * overlap)
    return max(distance, 0.0)  # rounding makes that of equal sets slightly negative


def _factor(covariance: Tensor) -> Tensor:
    """A (D, rank) with A A^T = covariance (D, D)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    smallest = len(values) * torch.finfo(torch.float64).eps * float(values.abs().max())
    kept = values > smallest
    return vectors[:, kept] * values[kept].sqrt()


class ClassScore:
    """The Inception Score (Salimans et al. 2016) of pictures, from the class logits of a network.

    It is the exponential of the mean Kullback-Leibler divergence between the class probabilities of a picture and
    their mean over the pictures. It is computed for each split of the pictures.

    Args:
        classes: of the network.
        pictures: in all.
        split_size: pictures in a split. The last split has the rest. None makes one split.
    """

    def __init__(self, classes: int, pictures: int, split_size: int | None = None) -> None:
        self.split_size: int = split_size or max(pictures, 1)
        splits = max(1, math.ceil(pictures / self.split_size))
        self._counts = torch.zeros(splits, dtype=torch.float64)
        self._negative_entropies = torch.zeros(splits, dtype=torch.float64)
        self._probabilities = torch.zeros(splits, classes, dtype=torch.float64)

    def update(self, logits: Tensor, numbers: Tensor) -> None:
        """Adds the logits (B, classes) of the pictures with the numbers (B,), which count from 0."""
        classes = self._probabilities.shape[1]
        check_tensor("logits", logits, shape=("B", classes), dtypes=FLOAT_DTYPES)
        check_tensor("numbers", numbers, shape=(len(logits),), dtypes=INTEGER_DTYPES)
        logarithms = logits.double().log_softmax(dim=1).cpu()
        probabilities = logarithms.exp()
        splits = numbers.cpu().long() // self.split_size
        self._counts.index_add_(0, splits, torch.ones(len(splits), dtype=torch.float64))
        self._negative_entropies.index_add_(0, splits, (probabilities * logarithms).sum(dim=1))
        self._probabilities.index_add_(0, splits, probabilities)

    def reduce(self) -> None:
        """Adds the sums of all processes."""
        self._counts = sum_of_all(self._counts)
        self._negative_entropies = sum_of_all(self._negative_entropies)
        self._probabilities = sum_of_all(self._probabilities)

    def scores(self) -> Tensor:
        """The score of each split, (splits,) float64."""
        mean = self._probabilities / self._counts[:, None]
        entropy_of_mean = -torch.xlogy(mean, mean).sum(dim=1)
        return (self._negative_entropies / self._counts + entropy_of_mean).exp()


class CodeUsage:
    """How often a tokenizer uses each of its codes.

    Args:
        codebook_size: V.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts: Tensor = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, tokens: Tensor) -> None:
        """Adds tokens of any shape and integer dtype, in [0, V).

        Raises:
            TypeError: another dtype.
            ValueError: a token outside [0, V).
        """
        check_tensor("tokens", tokens, dtypes=INTEGER_DTYPES)
        tokens = tokens.flatten().long().cpu()
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.counts):
            raise ValueError(f"tokens: expected ids in [0, {len(self.counts)}), got others")
        self.counts += tokens.bincount(minlength=len(self.counts))

    def reduce(self) -> None:
        """Adds the counts of all processes."""
        self.counts = sum_of_all(self.counts)

    def usage(self) -> float:
        """The share of codes that were used at least once."""
        return float((self.counts > 0).double().mean())

    def entropy(self) -> float:
        """The entropy of the distribution of codes in bits: log2(V) where all are used equally often."""
        shares = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(-torch.xlogy(shares, shares).sum() / math.log(2))


class PictureMeans:
    """Means over pictures of several figures, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, name: str, values: Tensor) -> None:
        """Adds the values (B,) of a figure."""
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def reduce(self, names: list[str]) -> None:
        """Adds the sums of all processes. `names` are those of all figures, in the same order in each process."""
        for name in names:
            total = sum_of_all(torch.tensor([self._sums.get(name, 0.0)], dtype=torch.float64))
            self._sums[name] = float(total)
            self._counts[name] = _sum_of_counts(self._counts.get(name, 0))

    def mean(self, name: str) -> float:
        """The mean of a figure. Raises `ValueError` where there is no picture."""
        if not self._counts.get(name):
            raise ValueError(f"{name}: expected at least one picture, got none")
        return self._sums[name] / self._counts[name]


def _sum_of_counts(count: int) -> int:
    return int(sum_of_all(torch.tensor([count], dtype=torch.int64)))
