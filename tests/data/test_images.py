"""Pictures: conversion to 8 bits, reading, PSNR, grids, PNG files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from titok.data.folders import ImageFolder
from titok.data.images import (
    PUBLISHED_PREPROCESSING,
    grid,
    psnr,
    read_image,
    to_uint8,
    write_image,
)

RNG = np.random.default_rng(0)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 with details that resizing must average."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 3 + c) * np.cos(y / (2 + c)) for c in range(3)]
    return (127.5 + 100 * np.stack(waves, axis=-1) + RNG.uniform(-20, 20, (height, width, 3))).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_every_level_survives_the_way_to_float_and_back(rounding: Any) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    images = (levels.float() / 255).reshape(1, 16, 16)
    assert torch.equal(to_uint8(images, rounding).flatten(), levels)


def test_rounding_and_truncation() -> None:
    between = (torch.tensor([0.2, 0.4, 0.6, 0.8, 254.6]) / 255).reshape(1, 1, 5)
    assert to_uint8(between).flatten().tolist() == [0, 0, 1, 1, 255]
    assert to_uint8(between, "truncate").flatten().tolist() == [0, 0, 0, 0, 254]
    outside = torch.tensor([-3.0, -0.001, 1.001, 7.0, float("inf")]).reshape(1, 1, 5)
    assert to_uint8(outside).flatten().tolist() == [0, 0, 255, 255, 255]


def test_to_uint8_moves_channels_last_and_takes_bfloat16() -> None:
    images = torch.rand(2, 3, 4, 5)
    assert torch.equal(to_uint8(images)[1, 2, 3], (images[1, :, 2, 3] * 255).round().to(torch.uint8))
    levels = (images.bfloat16().double() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(to_uint8(images.bfloat16()), levels)
    assert to_uint8(images[:0]).shape == (0, 4, 5, 3)


def test_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="rounding: expected 'nearest' or 'truncate', got 'up'"):
        to_uint8(torch.zeros(1, 2, 2), "up")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# Reading


# Sizes for which the longer side after resizing, or the margin of the crop, is not a whole number of pixels.
@pytest.mark.parametrize("picture", [(40, 61), (61, 40), (50, 50), (33, 100), (16, 16), (10, 13), (17, 24)])
def test_read_image_is_resize_and_centre_crop(picture: tuple[int, int], tmp_path: Path) -> None:
    """The shorter side becomes 16, the longer one is rounded down, margins are rounded half to even.

    These are the rules of torchvision's Resize and CenterCrop.
    """
    array = smooth_picture(*picture)
    Image.fromarray(array).save(tmp_path / "a.png")
    height, width = picture
    small = (int(16 * width / height), 16) if height < width else (16, int(16 * height / width))
    resized = np.asarray(Image.fromarray(array).resize(small, Image.Resampling.BICUBIC))
    top, left = (round((side - 16) / 2) for side in resized.shape[:2])
    want = resized[top : top + 16, left : left + 16]
    got = read_image(tmp_path / "a.png", (16, 16))
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got, torch.from_numpy(want.astype(np.float32) / 255).permute(2, 0, 1))


@pytest.mark.parametrize("picture", [(40, 61), (61, 40), (9, 100), (100, 9)])
def test_read_image_covers_a_target_that_is_not_square(picture: tuple[int, int], tmp_path: Path) -> None:
    array = np.full((*picture, 3), 90, dtype=np.uint8)
    array[picture[0] // 2, picture[1] // 2] = 255  # the centre must stay in the picture
    Image.fromarray(array).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", (16, 24))
    assert got.shape == (3, 16, 24)
    assert got.min() > 0.3, "no pixel was added at the border"
    brightest = divmod(int(got[0].argmax()), 24)
    assert abs(brightest[0] - 8) <= 3
    assert abs(brightest[1] - 12) <= 3


def test_read_image_keeps_the_pixels_of_a_picture_that_fits(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert torch.equal(to_uint8(read_image(tmp_path / "a.png", (16, 24))), torch.from_numpy(array))


def modes() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """A 4x4 picture in every mode of Pillow, and its RGB values."""
    rgb = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    grey = RNG.integers(0, 256, (4, 4), dtype=np.uint8)
    alpha = RNG.integers(0, 256, (4, 4, 1), dtype=np.uint8)
    few = rgb[:2, :2].repeat(2, axis=0).repeat(2, axis=1)  # four colours: a palette holds them exactly
    palette = Image.fromarray(few).quantize(4)
    palette.info["transparency"] = bytes([0, 255, 128, 7])
    as_grey = np.stack([grey] * 3, axis=-1)
    return {
        "RGB": (Image.fromarray(rgb), rgb),
        "RGBA": (Image.fromarray(np.concatenate([rgb, alpha], axis=2)), rgb),
        "L": (Image.fromarray(grey), as_grey),
        "LA": (Image.fromarray(np.concatenate([grey[..., None], alpha], axis=2)), as_grey),
        "P": (palette, few),
        "1": (Image.fromarray(grey > 127), np.where(as_grey > 127, 255, 0)),
        "I;16": (Image.fromarray(grey.astype(np.uint16) * 257), as_grey),
    }


@pytest.mark.parametrize("mode", modes())
def test_modes(mode: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    picture, want = modes()[mode]
    extra = {"transparency": picture.info["transparency"]} if mode == "P" else {}
    picture.save(tmp_path / "a.png", **extra)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == mode
    as_published = {"preprocessing": PUBLISHED_PREPROCESSING}
    got = to_uint8(read_image(tmp_path / "a.png", (4, 4), **as_published))
    assert np.abs(got.numpy().astype(int) - want).max() == 0
    luma = (want @ [0.299, 0.587, 0.114]).round()
    grey = read_image(tmp_path / "a.png", (4, 4), 1, **as_published)
    assert np.abs(to_uint8(grey)[..., 0].numpy() - luma).max() <= 1
    if mode not in ("RGBA", "LA", "P"):
        assert np.array_equal(to_uint8(read_image(tmp_path / "a.png", (4, 4))).numpy(), got)
    assert not recwarn.list


def test_cmyk_and_first_frame(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = to_uint8(read_image(tmp_path / "a.jpg", (8, 8))).float().mean(dim=(0, 1))
    assert (red - torch.tensor([255.0, 0, 0])).abs().max() <= 2
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "yellow")]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    assert to_uint8(read_image(tmp_path / "b.gif", (8, 8)))[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_level_are_refused(dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, dtype=dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: not a readable picture \(32-bit pixels"):
        read_image(tmp_path / "deep.tif", (4, 4))


# Where EXIF orientation k takes pixel (row, column) of an upright picture of 5 rows and 7 columns from, in the stored
# picture. The table is that of the EXIF standard: which edges of the upright picture row 0 and column 0 are.
STORED: dict[int, Any] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    upright = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(to_uint8(read_image(path, (5, 7))).numpy(), upright)
    if kind != "tif":
        published = read_image(path, stored.shape[:2], preprocessing=PUBLISHED_PREPROCESSING)
        assert np.array_equal(to_uint8(published).numpy(), stored)


def test_damaged_exif_data_do_not_matter(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth_picture(16, 16))
    for i, exif in enumerate((b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0")):
        picture.save(tmp_path / f"{i}.jpg", exif=exif)
        picture.save(tmp_path / "plain.jpg")
        assert torch.equal(read_image(tmp_path / f"{i}.jpg", (8, 8)), read_image(tmp_path / "plain.jpg", (8, 8)))


def transparent_pictures() -> dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]]:
    """A picture of every kind of transparency, options to save it with, and its values on white."""
    rgb = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    alpha = RNG.integers(0, 256, (6, 6, 1), dtype=np.uint8)
    grey = rgb[..., :1]

    def over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        share = opacity / 255
        return np.broadcast_to(colours * share + 255 * (1 - share), (6, 6, 3))

    few = rgb[:2, :3].repeat(3, axis=0).repeat(2, axis=1)
    palette = Image.fromarray(few).quantize(6)
    opacities = np.array([0, 255, 128, 7, 77, 201], dtype=np.uint8)
    of_pixel = opacities[np.asarray(palette)][..., None]
    rgb_key, grey_key = tuple(int(c) for c in rgb[2, 3]), int(grey[2, 3, 0])
    is_rgb_key, is_grey_key = (rgb == rgb_key).all(axis=2, keepdims=True), grey == grey_key
    return {
        "RGBA": (Image.fromarray(np.concatenate([rgb, alpha], axis=2)), {}, over_white(rgb, alpha)),
        "LA": (Image.fromarray(np.concatenate([grey, alpha], axis=2)), {}, over_white(grey, alpha)),
        "P": (palette, {"transparency": opacities.tobytes()}, over_white(few, of_pixel)),
        "RGB": (Image.fromarray(rgb), {"transparency": rgb_key}, over_white(rgb, 255 * ~is_rgb_key)),
        "L": (Image.fromarray(grey[..., 0]), {"transparency": grey_key}, over_white(grey, 255 * ~is_grey_key)),
        "I;16": (
            Image.fromarray(grey[..., 0].astype(np.uint16) * 257),
            {"transparency": grey_key * 257},
            over_white(grey, 255 * ~is_grey_key),
        ),
    }


@pytest.mark.parametrize("kind", transparent_pictures())
def test_transparency_is_laid_over_white(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    picture, options, want = transparent_pictures()[kind]
    picture.save(tmp_path / "a.png", **options)
    got = to_uint8(read_image(tmp_path / "a.png", (6, 6))).numpy().astype(int)
    assert np.abs(got - want).max() <= 1
    luma = want @ [0.299, 0.587, 0.114]
    assert np.abs(to_uint8(read_image(tmp_path / "a.png", (6, 6), 1))[..., 0].numpy() - luma).max() <= 2
    assert not recwarn.list


# Thinner than 1 to 64 for a square: enlarged, reduced and unchanged across.
@pytest.mark.parametrize("picture", [(1, 700), (700, 1), (3, 901), (16, 1500), (40, 3001), (3001, 40), (16, 1025)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_thin_pictures_are_resized_and_cropped_as_others(
    picture: tuple[int, int], mode: str, tmp_path: Path
) -> None:
    array = smooth_picture(*picture)
    whole = Image.fromarray(array).convert(mode)
    whole.save(tmp_path / "a.png")
    height, width = picture
    small = (16 * width // height, 16) if height < width else (16, 16 * height // width)
    resized = np.asarray(whole.resize(small, Image.Resampling.BICUBIC)).astype(int)
    top, left = (round((side - 16) / 2) for side in resized.shape[:2])
    want = resized[top : top + 16, left : left + 16].reshape(16, 16, -1)
    got = to_uint8(read_image(tmp_path / "a.png", (16, 16), 3 if mode == "RGB" else 1)).numpy()
    assert np.abs(got - want).max() <= 1


@pytest.mark.slow
def test_memory_is_bounded_for_any_picture(tmp_path: Path) -> None:
    """Resized as a whole, these pictures would take from 3 GB to 200 TB."""
    for i, size in enumerate(((1, 4000), (4000, 1), (1, 1_000_000), (1_000_000, 1), (3, 300_000))):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / f"{i}.png")
    code = "import resource, sys; from pathlib import Path; from titok.data.images import read_image\n"
    code += "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; read_image(sys.argv[1], (8, 8))\n"
    code += "before = used()\nfor path in sys.argv[1:]: assert read_image(path, (512, 512)).std() == 0\n"
    code += "print((used() - before) / 1024)"
    arguments = [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 12 + 64 + 20, "MiB: pictures, 256 bytes for each of 512 x 512 pixels, allowance"


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may have lifted Pillow's own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"large\.png: not a readable picture \(20000 x 10000 pixels, more than"):
        read_image(tmp_path / "large.png", (8, 8))


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "webp"])
def test_damaged_files_are_named(kind: str, tmp_path: Path) -> None:
    whole = tmp_path / f"whole.{kind}"
    Image.fromarray(smooth_picture(32, 32)).save(whole)
    data = whole.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "text": b"no picture at all", "empty": b""}.items():
        path = tmp_path / f"{name}.{kind}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.{kind}: not a readable picture"):
            read_image(path, (16, 16))


def test_missing_file_and_bad_channels(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png", (16, 16))
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 4"):
        read_image(tmp_path / "none.png", (16, 16), 4)


@pytest.mark.parametrize("dtype", [int, np.int64, np.int32, np.uint8])
def test_sizes_are_integers_of_python_or_numpy(dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(smooth_picture(20, 30)).save(tmp_path / "a.png")
    want = read_image(tmp_path / "a.png", (200, 16))
    assert torch.equal(read_image(tmp_path / "a.png", (dtype(200), dtype(16))), want)
    assert torch.equal(ImageFolder(tmp_path, (dtype(200), dtype(16)))[dtype(0)], want)
    assert ImageFolder(tmp_path, dtype(200)).size == (200, 200)
    images = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    assert grid(images, dtype(4), gap=dtype(1), scale=dtype(3)).shape == (6, 27, 3)


@pytest.mark.parametrize("size", [True, 8.0, "8", (8, 8.0), None, (np.True_, 8), np.float32(8)])
def test_other_sizes_are_refused(size: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for read in (ImageFolder, lambda root, size: read_image(root / "a.png", size)):
        with pytest.raises((TypeError, ValueError), match=r"^size: expected"):
            read(tmp_path, size)
        with pytest.raises(ValueError, match="size: expected integers >= 1, got 0"):
            read(tmp_path, (8, 0))
        with pytest.raises(ValueError, match=r"size: expected \(height, width\), got \(8,\)"):
            read(tmp_path, (8,))


# ---------------------------------------------------------------------------------------------------------------
# Writing


def test_psnr() -> None:
    a = torch.from_numpy(RNG.integers(0, 200, (3, 8, 9, 3), dtype=np.uint8))
    b = a.clone()
    b[1] += 5
    b[2, 0, 0, 0] += 55
    want = [np.inf, 20 * np.log10(255 / 5), 10 * np.log10(255**2 * 8 * 9 * 3 / 55**2)]
    assert psnr(a, b).tolist() == pytest.approx(want)
    assert torch.equal(psnr(a, b), psnr(b, a))
    with pytest.raises(TypeError, match="references: expected dtype uint8"):
        psnr(a, b.float())


@pytest.mark.parametrize(("count", "columns", "rows_columns"), [(6, 3, (2, 3)), (5, None, (2, 3)), (1, 4, (1, 4))])
def test_grid_places_every_picture(count: int, columns: int | None, rows_columns: tuple[int, int]) -> None:
    images = torch.from_numpy(RNG.integers(0, 200, (count, 4, 5, 3), dtype=np.uint8))
    rows, across = rows_columns
    picture = grid(images, columns, gap=2)
    assert picture.shape == (rows * 6 - 2, across * 7 - 2, 3)
    seen = torch.zeros(picture.shape[:2], dtype=torch.bool)
    for i, image in enumerate(images):
        top, left = i // across * 6, i % across * 7
        assert torch.equal(picture[top : top + 4, left : left + 5], image)
        seen[top : top + 4, left : left + 5] = True
    assert (picture[~seen] == 255).all(), "gaps and empty places are white"


def test_grid_scale_and_bad_input() -> None:
    images = torch.tensor([[[[10], [20]]], [[[30], [40]]]], dtype=torch.uint8)  # two pictures of 1x2
    assert grid(images, 2, gap=1, scale=2)[..., 0].tolist() == [[10, 10, 20, 20, 255, 30, 30, 40, 40]] * 2
    with pytest.raises(TypeError, match="images: expected dtype uint8, got float32"):
        grid(images.float())


@pytest.mark.parametrize("channels", [1, 3])
def test_write_image_round_trip_and_parents(channels: int, tmp_path: Path) -> None:
    image = torch.from_numpy(RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8))
    path = tmp_path / "new" / "folders" / "a.png"
    write_image(path, image)
    with Image.open(path) as opened:
        assert (opened.format, opened.mode) == ("PNG", "L" if channels == 1 else "RGB")
        assert np.array_equal(np.asarray(opened).reshape(5, 7, channels), image.numpy())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    write_image(path, torch.zeros(4, 4, 3, dtype=torch.uint8))
    before = path.read_bytes()

    given = []

    def full_disk(self: Path, content: Any) -> None:
        given.append(content)
        with self.open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=r"a\.png: cannot be written \(No space left on device\)"):
        write_image(path, torch.ones(4, 4, 3, dtype=torch.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    # The error keeps the frame of `write_bytes`: see test_no_view_of_a_bytesio_is_handed_out in test_writing.py.
    assert [type(content) for content in given] == [bytes]


def test_write_image_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="image: expected dtype uint8, got float32"):
        write_image(tmp_path / "a.png", torch.zeros(4, 4, 3))
    with pytest.raises(ValueError, match="image: expected shape"):
        write_image(tmp_path / "a.png", torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())
