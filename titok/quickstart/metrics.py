"""How good the quickstart's two models are, measured on real held-out digits and on generated ones.

Images are (n, 1, 32, 32) floats in [0, 1]. Distances are l2 norms over all pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.data.digits import Digits
from titok.models.tokenizer import TiTok


class Requirement(NamedTuple):
    """A requirement on one figure.

    Attributes:
        key: of the figure, in the result of `measure`.
        meaning: for the report.
        at_least: True if the figure must not be below `value`, False if it must not be above.
        value: the limit.
        unit: of the figure; "%" stands for a share in [0, 1].
    """

    key: str
    meaning: str
    at_least: bool
    value: float
    unit: str = "%"

    def met_by(self, value: float) -> bool:
        """True if a figure of this value meets the requirement."""
        return value >= self.value if self.at_least else value <= self.value

    def text(self, value: float) -> str:
        """A figure with its unit, for people."""
        if self.unit == "%":
            return f"{100 * value:.1f}%"
        return f"{value:.4g} {self.unit}".strip()


REQUIREMENTS = (
    Requirement("heldout_psnr", "PSNR of held-out digits, reconstructed from 8 tokens", True, 22.0, "dB"),
    Requirement("codes_used", "codes in use, of 256", True, 200, ""),
    Requirement(
        "classifier_accuracy", "held-out digits that a classifier (an RBF-SVM) reads correctly", True, 0.98
    ),
    Requirement("reconstructions_right", "held-out reconstructions that it reads correctly", True, 0.95),
    Requirement("samples_right", "generated digits that it reads as the requested class", True, 0.97),
    Requirement("diversity", "distance between samples of a class, relative to that of real ones", True, 0.65),
    Requirement("copies", "samples nearer to a training digit than 95% of held-out digits are", False, 0.05),
)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image in dB, (n,), for a peak of 1. Reconstructions are clamped."""
    error = (images - reconstructions.clamp(0, 1)).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10()


class Judge:
    """A classifier (an RBF-SVM) that is trained on real digits, and independent of the models that it judges."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.svm import SVC

        self.svm: Any = SVC(C=10.0, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images, in [0, 1], that it assigns to their label."""
        return float((self.svm.predict(images.flatten(1).numpy()) == labels.numpy()).mean())


def within_class_distance(images: Tensor, labels: Tensor) -> float:
    """The mean distance between two different images of one class, averaged over the classes."""
    means = []
    for label in labels.unique():
        members = images[labels == label].flatten(1)
        if len(members) > 1:
            means.append(torch.cdist(members, members).sum() / (len(members) * (len(members) - 1)))
    return float(torch.stack(means).mean())


def nearest_distance(images: Tensor, others: Tensor) -> Tensor:
    """The distance of each image to the nearest of `others`, (n,)."""
    return torch.cdist(images.flatten(1), others.flatten(1)).min(dim=1).values


def share_of_copies(samples: Tensor, digits: Digits) -> float:
    """The share of samples that are nearer to a training image than 95% of the held-out digits are."""
    threshold = nearest_distance(digits.test_images, digits.train_images).quantile(0.05)
    return float((nearest_distance(samples, digits.train_images) < threshold).float().mean())


@torch.no_grad()
def measure(tokenizer: TiTok, digits: Digits, samples: Tensor, labels: Tensor) -> dict[str, Any]:
    """Every figure of `REQUIREMENTS` by its key, and the two distances of which "diversity" is the ratio.

    Args:
        samples: (n, 1, 32, 32), which the generator made.
        labels: (n,) int64, the classes that the samples were generated for.

    Returns:
        figures by name. "codes_used" is the number of codes that the training images use.
    """
    judge = Judge(digits.train_images, digits.train_labels)
    reconstructions = tokenizer.decode(tokenizer.encode(digits.test_images)).clamp(0, 1)
    sample_distance = within_class_distance(samples, labels)
    real_distance = within_class_distance(digits.train_images, digits.train_labels)
    return {
        "heldout_psnr": float(psnr(digits.test_images, reconstructions).mean()),
        "codes_used": len(tokenizer.encode(digits.train_images).unique()),
        "classifier_accuracy": judge.accuracy(digits.test_images, digits.test_labels),
        "reconstructions_right": judge.accuracy(reconstructions, digits.test_labels),
        "samples_right": judge.accuracy(samples, labels),
        "diversity": sample_distance / real_distance,
        "copies": share_of_copies(samples, digits),
        "sample_distance": sample_distance,
        "real_distance": real_distance,
    }
