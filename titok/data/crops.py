"""Crops of pictures to the size that a model takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# A picture is cropped before it is resized where resizing all of it would make more than this many times as many
# pixels as the result has. That is so for pictures that are thinner than 1 to 64.
MAX_ENLARGEMENT = 64
ADM_MARGIN = 1.1  # the side of the picture that ten crops are taken from, as a multiple of the side of a crop

# What becomes of a picture: a function of the picture and (height, width) that returns float32 in [0, 1], an image
# (C, height, width) or several copies of it (copies, C, height, width).
Transform = Callable[[Image.Image, tuple[int, int]], Tensor]


def centre_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The transform of TiTok's evaluation: the smallest size that covers `size` = (height, width), then its centre.

    Resizing is bicubic with antialiasing. Both roundings are those of torchvision's Resize and CenterCrop.
    """
    height, width = size
    resized = _covering_size(picture, size)
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return _resize_and_crop(picture, resized, (left, top, left + width, top + height))


def random_crop(picture: Image.Image, size: tuple[int, int], down: int, right: int) -> Image.Image:
    """The crop of TiTok's training: resized as for `centre_crop`, then a window that is anywhere with equal chance.

    Args:
        size: (height, width).
        down, right: random integers, uniform in [0, 2^64), that choose the window.
    """
    height, width = size
    resized = _covering_size(picture, size)
    left, top = right * (resized[0] - width + 1) >> 64, down * (resized[1] - height + 1) >> 64
    return _resize_and_crop(picture, resized, (left, top, left + width, top + height))


def adm_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol 2021), by which pictures are tokenised for the training of generators.

    While both sides are at least twice those of `size` = (height, width), a box filter halves them. A bicubic filter
    resizes to the smallest size that covers `size`, and the centre is cut out, its corner rounded down.
    """
    height, width = size
    while min(picture.width / width, picture.height / height) >= 2:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    resized = (round(picture.width * scale), round(picture.height * scale))
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return _resize_and_crop(picture, resized, (left, top, left + width, top + height))


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture of mode RGB or L as float32 (C, H, W) in [0, 1]."""
    array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(array).reshape(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()


def ten_crops(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The four corners and the centre of an image (C, H, W), then those of its mirror image: (10, C, *size).

    The order is top left, top right, bottom left, bottom right, centre, as in torchvision's TenCrop.
    """
    height, width = size
    bottom, right = image.shape[-2] - height, image.shape[-1] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return torch.stack(
        [
            source[:, top : top + height, left : left + width]
            for source in (image, image.flip(-1))
            for top, left in corners
        ]
    )


# ---------------------------------------------------------------------------------------------------------------
# Transforms


def evaluation(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """`centre_crop` as an image (C, height, width)."""
    return to_tensor(centre_crop(picture, size))


def evaluation_copies(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """`centre_crop` as the only copy (1, C, height, width)."""
    return evaluation(picture, size)[None]


def evaluation_and_mirror(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """`centre_crop` and its mirror image (2, C, height, width)."""
    return _with_mirror(evaluation(picture, size))


def adm_and_mirror(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """`adm_crop` and its mirror image (2, C, height, width)."""
    return _with_mirror(to_tensor(adm_crop(picture, size)))


def adm_ten_crops(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Ten crops (10, C, height, width) of the crop of ADM to 1.1 times the size, rounded down."""
    enlarged = (int(size[0] * ADM_MARGIN), int(size[1] * ADM_MARGIN))
    return ten_crops(to_tensor(adm_crop(picture, enlarged)), size)


# The copies of a picture that a set of tokens holds, by name: their transform and their number.
COPIES: Mapping[str, tuple[Transform, int]] = MappingProxyType(
    {
        "none": (evaluation_copies, 1),
        "flip": (adm_and_mirror, 2),
        "ten-crop": (adm_ten_crops, 10),
        "evaluation-and-mirror": (evaluation_and_mirror, 2),  # of `titok train generator --flip`
    }
)


def _with_mirror(image: Tensor) -> Tensor:
    return torch.stack([image, image.flip(-1)])


def _covering_size(picture: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the smallest picture of the same shape that covers `size` = (height, width)."""
    height, width = size
    if width * picture.height >= height * picture.width:
        return width, width * picture.height // picture.width
    return height * picture.width // picture.height, height


def _resize_and_crop(
    picture: Image.Image, resized: tuple[int, int], window: tuple[int, int, int, int]
) -> Image.Image:
    """The picture resized to `resized` = (width, height), of which `window` = (left, top, right, bottom) is kept."""
    left, top, right, bottom = window
    if resized[0] * resized[1] > MAX_ENLARGEMENT * (right - left) * (bottom - top):
        return _resize_window(picture, resized, window)
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    return picture.crop(window)


def _resize_window(
    picture: Image.Image, resized: tuple[int, int], window: tuple[int, int, int, int]
) -> Image.Image:
    """`picture.resize(resized).crop(window)`, up to rounding, without the rest of the resized picture."""
    scale_x, scale_y = picture.width / resized[0], picture.height / resized[1]
    left, top, right, bottom = window
    exact = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
    # The bicubic filter reaches 2 pixels far, of the larger of the two pictures.
    margin_x, margin_y = math.ceil(2 * max(scale_x, 1)) + 1, math.ceil(2 * max(scale_y, 1)) + 1
    first_x, first_y = max(0, math.floor(exact[0]) - margin_x), max(0, math.floor(exact[1]) - margin_y)
    end_x = min(picture.width, math.ceil(exact[2]) + margin_x)
    end_y = min(picture.height, math.ceil(exact[3]) + margin_y)
    part = picture.crop((first_x, first_y, end_x, end_y))
    box = (
        exact[0] - first_x,
        exact[1] - first_y,
        min(exact[2] - first_x, part.width),
        min(exact[3] - first_y, part.height),
    )
    return part.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=box)
