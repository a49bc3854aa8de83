"""Slow definitions in float64, which share no code with titok, and extractors and pictures for tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
    """Heusel et al. (2017), with a matrix square root, for covariances of full rank."""
    one, other = np.cov(features, rowvar=False), np.cov(others, rowvar=False)
    root = linalg.sqrtm(one @ other).real
    shift = features.mean(axis=0) - others.mean(axis=0)
    return float(shift @ shift + np.trace(one) + np.trace(other) - 2 * np.trace(root))


def frechet_distance_of_singular(features: np.ndarray, others: np.ndarray) -> float:
    """The same by the singular values of the product of the centred sets, which need no covariance of full rank."""
    one = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    other = (others - others.mean(axis=0)) / np.sqrt(len(others) - 1)
    shift = features.mean(axis=0) - others.mean(axis=0)
    overlap = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return float(shift @ shift + (one**2).sum() + (other**2).sum() - 2 * overlap)


def class_score(logits: np.ndarray, split_size: int) -> float:
    """Salimans et al. (2016), as ADM's evaluator splits the pictures."""
    scores = []
    for start in range(0, len(logits), split_size):
        part = np.exp(logits[start : start + split_size])
        part /= part.sum(axis=1, keepdims=True)
        divergences = [np.sum(p * (np.log(p) - np.log(part.mean(axis=0)))) for p in part]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores))


def precision_and_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Kynkaanniemi et al. (2019): shares of vectors within a ball of the other set."""

    def radius(features: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(features - features[i], axis=1))[k]

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [radius(centres, i) for i in range(len(centres))]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return share(samples, reference), share(reference, samples)


def resize_bilinear(image: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow 1's `resize_bilinear` without aligned corners, in float32, of one channel (H, W)."""
    image = image.astype(np.float32)
    result = np.empty((side, side), dtype=np.float32)
    scales = [np.float32(size / side) for size in image.shape]
    for row in range(side):
        y = np.float32(row) * scales[0]
        top = int(y)
        bottom, down = min(top + 1, image.shape[0] - 1), y - np.float32(top)
        for column in range(side):
            x = np.float32(column) * scales[1]
            left = int(x)
            right, across = min(left + 1, image.shape[1] - 1), x - np.float32(left)
            upper = image[top, left] + (image[top, right] - image[top, left]) * across
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
            result[row, column] = upper + (lower - upper) * down
    return result


class Projection:
    """An extractor for tests: fixed random projections of the pixels."""

    device = torch.device("cpu")

    def __init__(self, name: str = "projection", size: tuple[int, int] = (16, 24), spatial: bool = True) -> None:
        self.name = name
        generator = torch.Generator().manual_seed(5)
        pixels = size[0] * size[1] * 3
        self.matrices = {
            kind: torch.randn(pixels, width, generator=generator, dtype=torch.float64) / pixels**0.5
            for kind, width in (("pool", 6), ("logits", 4), ("spatial", 5))
            if spatial or kind != "spatial"
        }

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        pixels = pictures.double().flatten(1) / 64
        return {kind: pixels @ matrix for kind, matrix in self.matrices.items()}


def projection(device: Any) -> Projection:
    """For `--features evaluation_oracles:projection`."""
    return Projection()


def inception_like(device: Any) -> Projection:
    """An extractor that claims to be Inception, so that figures have their usual names."""
    return Projection("inception")


def random_pictures(count: int, seed: int, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Smooth random pictures uint8 (count, H, W, 3)."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (count, 1, 1, 3)) + rng.normal(0, 30, (count, *size, 3))
    return levels.clip(0, 255).astype(np.uint8)


def allow_torchvision() -> None:
    """Declares two operators of torchvision, without which it cannot be imported beside a torch for CPUs."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torchmetrics")]:
            del sys.modules[name]


_KEPT: list[Any] = []  # a library that is garbage takes its declarations with it


def in_processes(count: int, code: str) -> None:
    """Runs code in `count` processes that form a group, to its end. It may import the modules beside this one."""
    import forked  # here, because commands that a test starts import this module without tests/ on their path

    forked.in_processes(count, code, Path(__file__).parent)
