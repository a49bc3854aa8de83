"""Perceptual losses: distances of two images as a pretrained network sees them.

The published second stage compares the class logits of ConvNeXt-S. LPIPS (Zhang et al. 2018) compares feature maps of
VGG-16. torchvision and lpips are imported when such a loss is made; the extra `titok-kernels[train]` installs them.

A distance maps images (B, 3, H, W) and targets of the same shape, both in [0, 1] or slightly outside, to a tensor of
shape (). Gradients reach its first argument alone.

The classes are not derived from `nn.Module`. A module that has one of them as an attribute therefore does not own its
weights: they are neither trained nor saved, and `module.to` does not move them. Their own method `to` does.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints.files import read_weights
from titok.checks import FLOAT_DTYPES, check_tensor

Distance = Callable[[Tensor, Tensor], Tensor]
PathLike = str | os.PathLike[str]
N = TypeVar("N")

# Mean and standard deviation of the RGB values of ImageNet, with which torchvision's networks were trained.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What LPIPS subtracts from RGB values in [-1, 1], and then divides them by.
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# The layers of VGG-16's `features` whose outputs LPIPS compares: the last ReLU before each pooling.
_LPIPS_LAYERS = (3, 8, 15, 22, 29)


class LogitsDistance:
    """The mean squared difference of what a network answers to two images.

    Both images are resized to `size` x `size` (bilinear, antialiased) and normalised by mean and standard deviation of
    ImageNet. They are not clamped.

    Args:
        network: maps images (B, 3, size, size) to logits (B, D). If it is a module, it is put into evaluation mode
            and its parameters are frozen, in place.
        size: in pixels.

    Raises:
        ValueError: `size` is below 1.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], size: int = 224) -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected an int of at least 1, got {size!r}")
        self.network, self.size = _frozen(network), size
        self.to(*_placement(network))

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> LogitsDistance:
        """Moves the network to a device and a dtype, in place, and returns this object."""
        self._mean, self._std = (_channels(v, device, dtype) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        if isinstance(self.network, nn.Module):
            self.network.to(device, dtype)
        return self

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """The distance of images (B, 3, H, W) to `target`, of the same shape and dtype, as a tensor of shape ().

        Raises:
            TypeError: an argument is not a floating tensor.
            ValueError: the images have other than 3 channels, or the shapes differ.
        """
        _check_pair(images, target)
        with torch.no_grad():
            expected = self.network(self._resized(target))
        return F.mse_loss(self.network(self._resized(images)), expected)

    def _resized(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the network reads them: (B, 3, size, size)."""
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return (images - self._mean) / self._std


class LPIPSDistance:
    """LPIPS 0.1 (Zhang et al. 2018), averaged over the images.

    Images pass through a sequence of layers. The outputs of some of them are scaled to unit length along the channels.
    Their squared differences are weighted by channel, averaged over the positions, and summed over those layers.

    Args:
        layers: such as the `features` of VGG-16. They are put into evaluation mode and frozen, in place.
        channel_weights: for each layer whose output is compared, by its number: a weight for each channel, (C,).
    """

    def __init__(self, layers: nn.Sequential, channel_weights: Mapping[int, Tensor]) -> None:
        self.layers = _frozen(layers)
        self.channel_weights = {number: weights.detach() for number, weights in channel_weights.items()}
        self.to(*_placement(layers))

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> LPIPSDistance:
        """Moves the weights to a device and a dtype, in place, and returns this object."""
        self.layers.to(device, dtype)
        self.channel_weights = {n: weights.to(device, dtype) for n, weights in self.channel_weights.items()}
        self._shift, self._scale = (_channels(v, device, dtype) for v in (_LPIPS_SHIFT, _LPIPS_SCALE))
        return self

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """The distance of images (B, 3, H, W) to `target`, of the same shape and dtype, as a tensor of shape ().

        Raises:
            TypeError: an argument is not a floating tensor.
            ValueError: the images have other than 3 channels, or the shapes differ.
        """
        _check_pair(images, target)
        with torch.no_grad():
            expected = self._features(target)
        features = self._features(images)
        distances = [
            torch.einsum("bchw,c->bhw", (features[n] - expected[n]).square(), weights).mean()
            for n, weights in self.channel_weights.items()
        ]
        return torch.stack(distances).sum()

    def _features(self, images: Tensor) -> dict[int, Tensor]:
        """The outputs to compare, (B, C, h, w) of unit length along C, by the number of the layer."""
        x = (2 * images - 1 - self._shift) / self._scale
        features = {}
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.channel_weights:
                # Unlike the square root of a sum of squares, this norm has a gradient of 0 where all channels are 0.
                features[number] = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
        return features


class PerceptualLoss:
    """A weighted sum of distances.

    Args:
        terms: pairs of a weight and a distance. A distance is any callable as described at the top of this module.

    Raises:
        ValueError: there are no terms, or a weight is not finite.
    """

    def __init__(self, terms: Sequence[tuple[float, Distance]]) -> None:
        if not terms:
            raise ValueError("terms: expected at least one, got none")
        for weight, _ in terms:
            if not math.isfinite(weight):
                raise ValueError(f"terms: expected finite weights, got {weight}")
        self.terms = tuple(terms)

    @classmethod
    def from_name(
        cls, name: str, *, convnext_weights: PathLike | None = None, vgg_weights: PathLike | None = None
    ) -> PerceptualLoss:
        """The loss that a configuration of the official code names.

        Args:
            name: "lpips", "convnext_s", or "lpips-convnext_s-A-B" with numbers A and B. The last is the weighted mean
                (A * LPIPS + B * ConvNeXt-S) / (A + B), as in the official code: its single-stage configurations
                combine "lpips-convnext_s-1.0-0.1" with the weight 1.1, which makes LPIPS + 0.1 * ConvNeXt-S.
            convnext_weights: see `convnext_small_distance`.
            vgg_weights: see `lpips_distance`.

        Raises:
            ValueError: another name, or a file is not readable.
            ImportError: a package is missing or not usable; the message says which.
        """
        lpips_weight, convnext_weight = _weights_of(name)
        total = lpips_weight + convnext_weight
        terms: list[tuple[float, Distance]] = []
        if lpips_weight:
            terms.append((lpips_weight / total, lpips_distance(vgg_weights)))
        if convnext_weight:
            terms.append((convnext_weight / total, convnext_small_distance(convnext_weights)))
        return cls(terms)

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> PerceptualLoss:
        """Calls `to` of all distances that have such a method, and returns this object."""
        for _, distance in self.terms:
            if hasattr(distance, "to"):
                distance.to(device, dtype)
        return self

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """The weighted sum, of shape ()."""
        return torch.stack([weight * distance(images, target) for weight, distance in self.terms]).sum()


def convnext_small_distance(weights: PathLike | None = None) -> LogitsDistance:
    """The distance of torchvision's ConvNeXt-S with its weights IMAGENET1K_V1, on images of 224 x 224 pixels.

    Args:
        weights: path of torchvision's state dict, as .pth or .safetensors. None takes the file from the cache of
            `torch.hub`, and downloads it if it is not there.

    Raises:
        ValueError: the file is damaged, or holds other weights.
        ImportError: torchvision is missing or not usable.
    """
    models = _torchvision_models("convnext_s")
    state = _state(weights, models.ConvNeXt_Small_Weights.IMAGENET1K_V1)
    with torch.device("meta"):  # random weights would only be overwritten
        network = models.convnext_small()
    _load(network, state, weights, "ConvNeXt-S")
    return LogitsDistance(network)


def lpips_distance(weights: PathLike | None = None) -> LPIPSDistance:
    """LPIPS 0.1 on VGG-16. The weights of the channels are those in the package lpips.

    Args:
        weights: path of torchvision's state dict of VGG-16 (IMAGENET1K_V1), as .pth or .safetensors, of which only
            the convolutions are read. None takes the file from the cache of `torch.hub`, and downloads it if it is not
            there.

    Raises:
        ValueError: the file is damaged, or holds other weights.
        ImportError: lpips or torchvision is missing or not usable.
    """
    models = _torchvision_models("lpips")
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise _missing("lpips", "lpips")
    channel_weights = read_weights(Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth")
    state = _state(weights, models.VGG16_Weights.IMAGENET1K_V1)
    with torch.device("meta"):  # random weights would only be overwritten
        layers = models.vgg16().features[: max(_LPIPS_LAYERS) + 1]
    prefix = "features."
    _load(layers, {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}, weights, "VGG-16")
    return LPIPSDistance(
        layers,
        {n: channel_weights[f"lin{i}.model.1.weight"].float().flatten() for i, n in enumerate(_LPIPS_LAYERS)},
    )


def _weights_of(name: str) -> tuple[float, float]:
    """The weights of LPIPS and ConvNeXt-S in an official name. Raises `ValueError` for another name."""
    if name in ("lpips", "convnext_s"):
        return (1.0, 0.0) if name == "lpips" else (0.0, 1.0)
    prefix, _, numbers = name.partition("lpips-convnext_s-")
    try:
        first, second = map(float, numbers.split("-"))
        valid = not prefix and first >= 0 and second >= 0 and 0 < first + second < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"name: expected 'lpips', 'convnext_s' or 'lpips-convnext_s-A-B', got {name!r}")
    return first, second


def _frozen(network: N) -> N:
    """`network`, which is put into evaluation mode and frozen if it is a module."""
    if isinstance(network, nn.Module):
        network.eval().requires_grad_(False)
    return network


def _placement(network: object) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first parameter; the CPU and float32 if there is none."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)


def _channels(values: tuple[float, ...], device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """One value for each channel, as a tensor (C, 1, 1)."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _check_pair(images: Tensor, target: Tensor) -> None:
    check_tensor("images", images, shape=("B", 3, "H", "W"), dtypes=FLOAT_DTYPES)
    check_tensor("target", target, shape=images.shape, dtypes=(images.dtype,), device=images.device)


def _torchvision_models(loss: str) -> Any:
    """The module `torchvision.models`, which the loss named `loss` needs. Raises `ImportError`."""
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise _missing(error.name or "torchvision", loss) from error
    except RuntimeError as error:  # torchvision was built for another torch
        raise ImportError(
            f"the perceptual loss {loss!r} cannot import torchvision ({error}): install the build that belongs to "
            f"torch {torch.__version__}",
            name="torchvision",
        ) from error


def _missing(package: str, loss: str) -> ModuleNotFoundError:
    """The error for a package that the loss named `loss` needs."""
    message = f"the perceptual loss {loss!r} needs {package}: pip install 'titok-kernels[train]'"
    return ModuleNotFoundError(message, name=package)


def _state(path: PathLike | None, published: Any) -> dict[str, Tensor]:
    """A state dict from a file, or where `path` is None that of a member of torchvision's enumerations of weights."""
    if path is not None:
        return read_weights(path)
    return torch.hub.load_state_dict_from_url(
        published.url, map_location="cpu", check_hash=True, weights_only=True
    )


def _load(network: nn.Module, state: dict[str, Tensor], path: PathLike | None, kind: str) -> None:
    """Gives a network the weights `state`, in float32. Raises `ValueError` where they do not fit."""
    try:
        network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: not the weights of {kind}: {reason}") from error
