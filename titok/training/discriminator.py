"""The patch discriminator that TiTok's decoder is trained against: it judges each region of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checks import FLOAT_DTYPES, check_tensor

_SLOPE = 0.1  # of the leaky ReLUs


class BlurDownsample(nn.Module):
    """A 4x4 binomial blur with stride 2: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)).

    The image is surrounded by one row or column of zeros on each side. Where its height or width is odd, there are two
    at the bottom or at the right.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float32) / 8
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        return F.conv2d(x, self.kernel.expand(channels, -1, -1, -1), stride=2, padding=1, groups=channels)


class PatchDiscriminator(nn.Module):
    """Images (B, channels, H, W) -> logits (B, 1, grid, grid), which are high where the image looks real.

    The defaults are those of the published second stage. Each stage is a 3x3 convolution, a blur that halves height
    and width, a group norm and a leaky ReLU. The number of channels doubles from stage to stage, beginning with
    `width`. Images need no particular size: adaptive max pooling gives the grid.

    The names of the parameters are those of the official code after its prefix "discriminator.". The blur kernels,
    which are in its state dicts (`blocks.*.1.kernel`), are constants here.

    Args:
        channels: of the images.
        width: channels of the first convolution and of the first stage, a multiple of `groups`.
        stages: number of stages, at least 1.
        grid: height and width of the logits.
        groups: of the group norms.

    Raises:
        ValueError: `width` is not a multiple of `groups`, or another argument is below 1.
    """

    def __init__(
        self, channels: int = 3, width: int = 128, stages: int = 3, grid: int = 16, groups: int = 32
    ) -> None:
        super().__init__()
        arguments = {"channels": channels, "width": width, "stages": stages, "grid": grid, "groups": groups}
        for name, value in arguments.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if width % groups:
            raise ValueError(f"width: expected a multiple of groups = {groups}, got {width}")
        self.channels = channels
        self.block_in = nn.Sequential(nn.Conv2d(channels, width, 5, padding=2), nn.LeakyReLU(_SLOPE))
        self.blocks = nn.Sequential()
        inputs = outputs = width
        for stage in range(stages):
            outputs = width * 2**stage
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, padding=1),
                    BlurDownsample(),
                    nn.GroupNorm(groups, outputs, eps=1e-5),
                    nn.LeakyReLU(_SLOPE),
                )
            )
            inputs = outputs
        self.pool = nn.AdaptiveMaxPool2d(grid)
        self.to_logits = nn.Sequential(
            nn.Conv2d(outputs, outputs, 1), nn.LeakyReLU(_SLOPE), nn.Conv2d(outputs, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], or reconstructions, which may exceed that range, to logits.

        Raises:
            TypeError: `images` is not a floating tensor.
            ValueError: its shape is not (B, channels, H, W).
        """
        check_tensor("images", images, shape=("B", self.channels, "H", "W"), dtypes=FLOAT_DTYPES)
        return self.to_logits(self.pool(self.blocks(self.block_in(images))))
