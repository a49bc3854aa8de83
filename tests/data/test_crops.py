"""Crops against definitions that are written out here, and against torchvision where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titok.data import crops
from titok.data.augment import random_numbers
from titok.data.images import read_image, transform_picture

RNG = np.random.default_rng(0)
SIZES = [(40, 61), (61, 40), (50, 50), (33, 100), (16, 16), (10, 13), (64, 64), (31, 32), (130, 70)]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def adm_definition(image: Image.Image, side: int) -> np.ndarray:
    """As the paper's code describes it: halve by a box while possible, resize the shorter side, cut out the centre."""
    while True:
        width, height = image.size
        if width < 2 * side or height < 2 * side:
            break
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    factor = side / min(image.size)
    width, height = (round(length * factor) for length in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize("size", SIZES)
def test_adm_crop(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert np.array_equal(np.asarray(crops.adm_crop(image, (16, 16))), adm_definition(image, 16))


def test_adm_crop_covers_a_target_that_is_not_square() -> None:
    for size in SIZES:
        assert crops.adm_crop(picture(*size), (16, 24)).size == (24, 16)


def ten_definition(pixels: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Pixel by pixel: four corners and the centre, then the same of the picture read from right to left."""
    found = []
    rows, columns = pixels.shape[:2]
    for mirrored in (False, True):
        for top, left in (
            (0, 0),
            (0, columns - width),
            (rows - height, 0),
            (rows - height, columns - width),
            (round((rows - height) / 2), round((columns - width) / 2)),
        ):
            crop = np.empty((height, width, 3), np.uint8)
            for y in range(height):
                for x in range(width):
                    column = left + x
                    crop[y, x] = pixels[top + y, columns - 1 - column if mirrored else column]
            found.append(crop)
    return found


@pytest.mark.parametrize("size", [(17, 17), (18, 21), (20, 19)])
def test_ten_crops(size: tuple[int, int]) -> None:
    image = picture(*size)
    got = crops.ten_crops(crops.to_tensor(image), (16, 15))
    want = ten_definition(np.asarray(image), 16, 15)
    for one, expected in zip(got, want, strict=True):
        assert torch.equal((one * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(expected))


def test_copies_of_a_training_set() -> None:
    """ADM's crop and its mirror image; or ten crops of ADM's crop to 1.1 times the side, rounded down."""
    image = picture(50, 70)
    transform, count = crops.COPIES["flip"]
    whole = torch.from_numpy(adm_definition(image, 16).copy()).permute(2, 0, 1).float() / 255
    assert count == 2
    assert torch.equal(transform(image, (16, 16)), torch.stack([whole, whole.flip(2)]))
    transform, count = crops.COPIES["ten-crop"]
    want = ten_definition(adm_definition(image, 17), 16, 16)
    assert count == 10
    assert torch.equal(
        transform(image, (16, 16)), torch.from_numpy(np.stack(want)).permute(0, 3, 1, 2).float() / 255
    )
    assert int(256 * crops.ADM_MARGIN) == 281


@pytest.mark.parametrize("size", SIZES)
def test_random_crop_is_a_window_of_the_resized_picture(size: tuple[int, int]) -> None:
    image = picture(*size)
    height, width = size
    resized = (int(16 * width / height), 16) if height < width else (16, int(16 * height / width))
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC) if resized != image.size else image)
    highest = (1 << 64) - 1
    corners = {(0, 0): (0, 0), (highest, highest): (pixels.shape[0] - 16, pixels.shape[1] - 16)}
    for (down, right), (top, left) in corners.items():
        got = np.asarray(crops.random_crop(image, (16, 16), down, right))
        assert np.array_equal(got, pixels[top : top + 16, left : left + 16])


def test_every_place_is_equally_likely() -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8)[None].repeat(16, axis=0))
    counts = np.zeros(9, int)
    for sample in range(2000):
        down, right = random_numbers(3, 0, sample, count=2)
        counts[np.asarray(crops.random_crop(image, (16, 16), down, right))[0, 0]] += 1
    assert counts.sum() == 2000
    # Nine places: chi-squared with 8 degrees of freedom is above 26.1 with a probability of 0.1%.
    assert ((counts - 2000 / 9) ** 2 / (2000 / 9)).sum() < 26.1


def test_random_numbers_depend_on_every_argument() -> None:
    base = random_numbers(1, 2, 3, count=3)
    assert base == random_numbers(1, 2, 3, count=3)
    assert all(0 <= number < 1 << 64 for number in base)
    assert len({tuple(random_numbers(*key, count=3)) for key in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (1, 2, 4))}) == 4


@pytest.mark.parametrize("name", list(crops.COPIES))
@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_have_the_announced_shape(name: str, channels: int, tmp_path: Path) -> None:
    picture(20, 30).save(tmp_path / "a.png")
    transform, copies = crops.COPIES[name]
    got = transform_picture(tmp_path / "a.png", transform, (8, 12), channels, name="a")
    assert got.shape == (copies, channels, 8, 12)
    if name.startswith(("none", "evaluation")):
        assert torch.equal(got[0], read_image(tmp_path / "a.png", (8, 12), channels))


@pytest.mark.slow
def test_memory_of_every_crop_is_bounded(tmp_path: Path) -> None:
    """Resized as a whole, these pictures would take from 3 GB to 200 TB."""
    for i, size in enumerate(((1, 4000), (1_000_000, 1))):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / f"{i}.png")
    code = (
        "import resource, sys\nfrom titok.data import crops\nfrom titok.data.images import transform_picture\n"
        "window = lambda p, s: crops.to_tensor(crops.random_crop(p, s, 1 << 63, 1 << 63))\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for transform in (window, crops.adm_and_mirror, crops.adm_ten_crops):\n"
        "    transform_picture(sys.argv[1], transform, (8, 8), name='a')\n"
        "before = used()\n"
        "for path in sys.argv[1:]:\n"
        "    for transform in (window, crops.adm_and_mirror, crops.adm_ten_crops):\n"
        "        assert transform_picture(path, transform, (256, 256), name=path).std() == 0\n"
        "print((used() - before) / 1024)"
    )
    arguments = [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 100, "MiB"


def test_equal_to_torchvision() -> None:
    try:
        from torchvision.transforms import CenterCrop, InterpolationMode, Resize, TenCrop
    except (ImportError, RuntimeError) as error:  # the second where it is built for another PyTorch
        pytest.skip(f"torchvision cannot be imported: {error}")
    for size in SIZES:
        image = picture(*size)
        want = CenterCrop(16)(Resize(16, InterpolationMode.BICUBIC, antialias=True)(image))
        assert np.array_equal(np.asarray(crops.centre_crop(image, (16, 16))), np.asarray(want))
        larger = crops.adm_crop(image, (17, 19))
        ten = torch.stack([crops.to_tensor(crop) for crop in TenCrop((16, 15))(larger)])
        assert torch.equal(crops.ten_crops(crops.to_tensor(larger), (16, 15)), ten)
