"""Similarity of reconstructions and originals, picture by picture."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from titok.checks import check_tensor


def ssim(pictures: Tensor, references: Tensor) -> Tensor:
    """The structural similarity (Wang et al. 2004) of each pair, (B,) float64, by torchmetrics.

    The window is a Gaussian of 11 x 11 pixels with a standard deviation of 1.5; channels are treated alike.

    Args:
        pictures, references: (B, H, W, C) uint8, with sides of at least 6 pixels.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
        TypeError, ValueError: other dtypes or shapes.
    """
    check_tensor("pictures", pictures, shape=("B", "H", "W", "C"), dtypes=(torch.uint8,))
    check_tensor("references", references, shape=tuple(pictures.shape), dtypes=(torch.uint8,))
    if min(pictures.shape[1:3]) < 6:
        raise ValueError(
            f"pictures: expected sides of at least 6 pixels for SSIM, got {tuple(pictures.shape[1:3])}"
        )
    check_ssim()
    from torchmetrics.functional.image import structural_similarity_index_measure

    ours, theirs = (images.permute(0, 3, 1, 2).double() / 255 for images in (pictures, references))
    values = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)  # a pair only where the full map is asked for
    return values.reshape(len(pictures))


def check_ssim() -> None:
    """Raises `ModuleNotFoundError` where torchmetrics, which computes SSIM, cannot be used."""
    try:
        importlib.import_module("torchmetrics.functional.image")
    except ModuleNotFoundError as error:
        message = "SSIM needs torchmetrics: pip install 'titok-kernels[eval]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    except RuntimeError as error:  # it imports torchvision, which may have been built for another torch
        message = f"SSIM needs torchmetrics, which cannot be imported here ({error})"
        raise ModuleNotFoundError(message, name="torchmetrics") from error
