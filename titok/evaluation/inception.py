"""The Inception network of FID (Szegedy et al. 2015; Heusel et al. 2017), with the weights that torch-fidelity offers.

The network is the TensorFlow graph of 2015-12-05 ("pt_inception-2015-12-05"), which the evaluator of ADM
(Dhariwal & Nichol 2021) runs, too. Its parameters have the names of torch-fidelity's state dict. It differs from
torchvision's Inception v3: its average pooling does not count the padding, one pooling of the last block takes the
maximum, and it has 1,008 classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints.files import read_weights
from titok.checks import check_tensor

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SIDE = 299  # in pixels, of what the network reads
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of the 192 of the layer that ADM's evaluator calls mixed_6/conv


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int], stride: int, padding: Any
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
        self.bn: nn.BatchNorm2d = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Layer(NamedTuple):
    """A `Convolution` of a block. With stride 1 it keeps height and width; with stride 2 it has no padding."""

    name: str
    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


AVERAGE, MAXIMUM, DOWNSAMPLE = "average", "maximum", "downsample"  # poolings of 3 x 3
Step = (
    Layer | tuple[Layer, Layer] | str
)  # two layers: both read the same input, and their outputs are concatenated
Branch = tuple[Step, ...]


class Block(nn.Module):
    """Branches that read the same input. The output is that of all branches, concatenated along the channels."""

    channels: int

    def __init__(self, channels: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self._branches = tuple(branches)
        self.channels = 0  # of the output
        for branch in branches:
            width = channels
            for step in branch:
                if isinstance(step, str):
                    continue
                layers = (step,) if isinstance(step, Layer) else step
                for layer in layers:
                    self.add_module(layer.name, _convolution(width, layer))
                width = sum(layer.width for layer in layers)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels, H', W')."""
        return torch.cat([self.run_branch(number, x) for number in range(len(self._branches))], dim=1)

    def run_branch(self, number: int, x: Tensor) -> Tensor:
        """The output of one branch."""
        for step in self._branches[number]:
            if isinstance(step, str):
                x = _pool(step, x)
            elif isinstance(step, Layer):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(layer.name)(x) for layer in step], dim=1)
        return x


def _convolution(channels: int, layer: Layer) -> Convolution:
    kernel = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
    padding = (kernel[0] // 2, kernel[1] // 2) if layer.stride == 1 else (0, 0)
    return Convolution(channels, layer.width, kernel, layer.stride, padding)


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == AVERAGE:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=1, padding=1) if kind == MAXIMUM else F.max_pool2d(x, 3, stride=2)


def _block_35(pool_width: int) -> list[Branch]:
    """Blocks on 35 x 35 positions."""
    return [
        (Layer("branch1x1", 64),),
        (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, 5)),
        (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)),
        (AVERAGE, Layer("branch_pool", pool_width)),
    ]


def _block_17(width: int) -> list[Branch]:
    """Blocks on 17 x 17 positions."""
    return [
        (Layer("branch1x1", 192),),
        (
            Layer("branch7x7_1", width),
            Layer("branch7x7_2", width, (1, 7)),
            Layer("branch7x7_3", 192, (7, 1)),
        ),
        (
            Layer("branch7x7dbl_1", width),
            Layer("branch7x7dbl_2", width, (7, 1)),
            Layer("branch7x7dbl_3", width, (1, 7)),
            Layer("branch7x7dbl_4", width, (7, 1)),
            Layer("branch7x7dbl_5", 192, (1, 7)),
        ),
        (AVERAGE, Layer("branch_pool", 192)),
    ]


def _block_8(pooling: str) -> list[Branch]:
    """Blocks on 8 x 8 positions."""
    return [
        (Layer("branch1x1", 320),),
        (
            Layer("branch3x3_1", 384),
            (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))),
        ),
        (
            Layer("branch3x3dbl_1", 448),
            Layer("branch3x3dbl_2", 384, 3),
            (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pooling, Layer("branch_pool", 192)),
    ]


_TO_17: list[Branch] = [
    (Layer("branch3x3", 384, 3, 2),),
    (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3, 2)),
    (DOWNSAMPLE,),
]
_TO_8: list[Branch] = [
    (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, 3, 2)),
    (
        Layer("branch7x7x3_1", 192),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, 3, 2),
    ),
    (DOWNSAMPLE,),
]


class InceptionNetwork(nn.Module):
    """Pictures to features. It has random weights, in eval mode; `load_inception` reads the published ones."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3: Convolution = Convolution(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3: Convolution = Convolution(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3: Convolution = Convolution(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1: Convolution = Convolution(64, 80, 1, 1, 0)
        self.Conv2d_4a_3x3: Convolution = Convolution(80, 192, 3, 1, 0)
        self.Mixed_5b: Block = Block(192, _block_35(32))
        self.Mixed_5c: Block = Block(256, _block_35(64))
        self.Mixed_5d: Block = Block(288, _block_35(64))
        self.Mixed_6a: Block = Block(288, _TO_17)
        self.Mixed_6b: Block = Block(768, _block_17(128))
        self.Mixed_6c: Block = Block(768, _block_17(160))
        self.Mixed_6d: Block = Block(768, _block_17(160))
        self.Mixed_6e: Block = Block(768, _block_17(192))
        self.Mixed_7a: Block = Block(768, _TO_8)
        self.Mixed_7b: Block = Block(1280, _block_8(AVERAGE))
        self.Mixed_7c: Block = Block(2048, _block_8(MAXIMUM))
        self.fc: nn.Linear = nn.Linear(2048, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures uint8 (B, 3, H, W) to features in the dtype of the weights.

        Returns:
            "pool" (B, 2048): the last layer, averaged over its positions ("pool_3" of TensorFlow).
            "spatial" (B, 2023): 7 channels of the 1 x 1 branch of the sixth of eleven blocks ("mixed_6/conv") at
            17 x 17 positions, ordered by row, column and channel.
            "logits" (B, 1008): of the classes, without bias ("logits_unbiased" of torch-fidelity).

        Raises:
            TypeError, ValueError: another dtype or shape.
        """
        check_tensor("pictures", pictures, shape=("B", 3, "H", "W"), dtypes=(torch.uint8,))
        x = resize_as_tensorflow(pictures.to(self.fc.weight.dtype), SIDE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.run_branch(0, x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return {
            "pool": pool,
            "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": pool @ self.fc.weight.T,
        }


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) to (B, C, side, side), bilinear, as TensorFlow 1's `resize_bilinear` computes it.

    The pixel i of the result lies at the position i * (input size / side) of the input: corners are not aligned,
    there is no offset of half a pixel, and no filter when the picture becomes smaller. The scale is rounded to
    float32, as in TensorFlow, for every dtype.
    """
    top, bottom, down = _positions(images.shape[2], side, images)
    left, right, across = _positions(images.shape[3], side, images)
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _positions(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `side` pixels: the pixels before and behind its position, and its distance to the former."""
    scale = float(np.float32(size / side))
    positions = torch.arange(side, dtype=like.dtype, device=like.device) * scale
    before = positions.long()
    return before, (before + 1).clamp_max(size - 1), positions - before.to(like.dtype)


def load_inception(path: str | os.PathLike[str] | None = None) -> tuple[InceptionNetwork, dict[str, Tensor]]:
    """The network with published weights in float32, and these weights by name.

    Args:
        path: of torch-fidelity's state dict, as .pth or .safetensors. None takes the file from the cache of
            `torch.hub`, and downloads it (96 MB) if it is not there.

    Raises:
        ValueError: the file is damaged, or it holds other weights or anything but tensors.
        OSError: the download failed.
    """
    if path is None:
        try:
            state = torch.hub.load_state_dict_from_url(
                WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True, progress=False
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: another file came, by its hash
            raise OSError(
                f"the weights of Inception cannot be downloaded from {WEIGHTS_URL} ({error}): fetch the file "
                "elsewhere and give its path, or choose other features"
            ) from error
    else:
        state = read_weights(path)
    with torch.device("meta"):  # random weights would only be overwritten
        network = InceptionNetwork()
    # Older files of PyTorch do not count the batches of batch normalisation, which is of use in training alone.
    counters = {n for n in network.state_dict() if n.endswith("num_batches_tracked")}
    state = {name: value for name, value in state.items() if name not in counters}
    counted = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    try:
        network.load_state_dict({**state, **counted}, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{path or WEIGHTS_URL}: not the weights of torch-fidelity's Inception: {reason}"
        ) from error
    return network.float().eval().requires_grad_(False), state
