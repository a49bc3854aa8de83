"""How good the quickstart's two models are: every figure is computed on real held-out digits or on generated ones.

Images are float (n, 1, 32, 32) in [0, 1]; distances are l2 over all pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.data.folders import Digits
from titok.models.tokenizer import TiTok


class Bar(NamedTuple):
    """What a figure has to reach. `unit` "%" marks shares in [0, 1]."""

    key: str
    meaning: str
    at_least: bool
    value: float
    unit: str = "%"

    def reached(self, value: float) -> bool:
        return value >= self.value if self.at_least else value <= self.value

    def text(self, value: float) -> str:
        return f"{100 * value:.1f}%" if self.unit == "%" else f"{value:.4g} {self.unit}".strip()


BARS = (
    Bar("heldout_psnr", "PSNR of held-out digits after 8 tokens", True, 22.0, "dB"),
    Bar("codes_used", "codes in use, of 256", True, 200, ""),
    Bar("classifier_accuracy", "held-out digits that the judge (an RBF-SVM) reads right", True, 0.98),
    Bar("reconstructions_right", "held-out reconstructions that it reads right", True, 0.95),
    Bar("samples_right", "generated digits that it reads as the class asked for", True, 0.97),
    Bar("diversity", "distance between samples of a class, relative to real ones", True, 0.65),
    Bar("copies", "samples nearer to a training digit than 95% of held-out digits are", False, 0.05),
)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (n,), for a peak of 1. Reconstructions are clamped."""
    error = (images - reconstructions.clamp(0, 1)).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10()


class Judge:
    """An RBF-SVM trained on real training digits; it knows nothing of the models that it judges."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.svm import SVC

        self.svm = SVC(C=10.0, gamma="scale").fit(images.flatten(1).numpy(), labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that it assigns to their label."""
        return float((self.svm.predict(images.flatten(1).numpy()) == labels.numpy()).mean())


def within_class_distance(images: Tensor, labels: Tensor) -> float:
    """Mean distance between two different images of one class, averaged over the classes."""
    means = []
    for label in labels.unique():
        members = images[labels == label].flatten(1)
        if len(members) > 1:
            means.append(torch.cdist(members, members).sum() / (len(members) * (len(members) - 1)))
    return float(torch.stack(means).mean())


def nearest_distance(images: Tensor, others: Tensor) -> Tensor:
    """Distance of each image to the nearest of `others`, (n,)."""
    return torch.cdist(images.flatten(1), others.flatten(1)).min(dim=1).values


def share_of_copies(samples: Tensor, digits: Digits) -> float:
    """Share of samples whose nearest training image is nearer than that of 95% of the held-out digits."""
    threshold = nearest_distance(digits.test_images, digits.train_images).quantile(0.05)
    return float((nearest_distance(samples, digits.train_images) < threshold).float().mean())


@torch.no_grad()
def measure(tokenizer: TiTok, digits: Digits, samples: Tensor, labels: Tensor) -> dict[str, Any]:
    """Every figure of `BARS`, and the two distances behind "diversity"; samples and their labels are the generator's.

    "codes_used" counts codes that some training image uses.
    """
    judge = Judge(digits.train_images, digits.train_labels)
    reconstructions = tokenizer.decode(tokenizer.encode(digits.test_images)).clamp(0, 1)
    spread = within_class_distance(samples, labels)
    real_spread = within_class_distance(digits.train_images, digits.train_labels)
    return {
        "heldout_psnr": float(psnr(digits.test_images, reconstructions).mean()),
        "codes_used": len(tokenizer.encode(digits.train_images).unique()),
        "classifier_accuracy": judge.accuracy(digits.test_images, digits.test_labels),
        "reconstructions_right": judge.accuracy(reconstructions, digits.test_labels),
        "samples_right": judge.accuracy(samples, labels),
        "diversity": spread / real_spread,
        "copies": share_of_copies(samples, digits),
        "sample_distance": spread,
        "real_distance": real_spread,
    }
