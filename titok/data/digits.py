"""The handwritten digits of the quickstart."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Digits(NamedTuple):
    """Images (n, 1, 32, 32) float32 in [0, 1] and labels (n,) int64, for training and held out for tests."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1,797 digits that scikit-learn contains (UCI "optical recognition of handwritten digits").

    They are 8x8 pictures with 17 grey levels, enlarged here to 32x32 by bicubic interpolation. Every fifth image
    of each class is held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says what to install.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn, which carries the digits, is not installed: pip install 'titok-kernels[quickstart]'"
        ) from error
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images).float()[:, None] / 16
    images = F.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)
    labels = torch.from_numpy(raw.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[::5, 0]] = True
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])
