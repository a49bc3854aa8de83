"""--skip-unreadable: everything that can be wrong with one picture, in every command that reads pictures."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli_runner import refused
from titok.cli.commands import app
from titok.data import images, sources

pytestmark = pytest.mark.usefixtures("one_thread")

RNG = np.random.default_rng(0)
SMALL = ("--width", 64, "--layers", 1, "--batch-size", 2, "--steps", 3)
TOKENIZER = ("--image-size", 16, "--tokens", 4, "--codebook-size", 16)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in some hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 1000, dtype=np.int32)).save(buffer, "TIFF")
    return buffer.getvalue()


PROBLEMS: dict[str, Callable[[], bytes]] = {
    "cut.jpg": lambda: jpeg()[:900],
    "empty.png": lambda: b"",
    "text.gif": lambda: b"no picture at all",
    "bomb.png": bomb,
    "deep.tif": deep,
}


@pytest.fixture
def mixed() -> Path:
    """A folder of one class with three whole pictures and one for each of `PROBLEMS`."""
    folder = Path("mixed/class")
    folder.mkdir(parents=True)
    for name in ("a.png", "m.png", "z.png"):
        Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    for name, content in PROBLEMS.items():
        (folder / name).write_bytes(content())
    return folder.parent


def commands(models: Path) -> list[tuple[Any, ...]]:
    tokenizer = ("-t", models / "tokenizer")
    return [
        ("tokenize", "mixed", *tokenizer, "-o", "out/t.npz", "--batch-size", 2),
        ("reconstruct", "mixed", *tokenizer, "-o", "out", "--batch-size", 2),
        ("reconstruct", "mixed", *tokenizer, "-o", "out/r.png"),
        ("train", "tokenizer", "mixed", "-o", "out", *SMALL, *TOKENIZER),
        ("train", "generator", "mixed", *tokenizer, "-o", "out", *SMALL),
    ]


@pytest.mark.parametrize("which", range(5))
def test_unreadable_pictures_are_skipped_by_name_or_stop_all(which: int, models: Path, mixed: Path) -> None:
    command = commands(models)[which]
    assert "not a readable picture" in refused(*command)
    assert not Path("out").exists(), "nothing was written"
    result = CliRunner().invoke(app, [*map(str, command), "--skip-unreadable"])
    assert result.exit_code == 0, result.output
    named = {line.split(":")[0] for line in result.stderr.splitlines() if "not a readable picture" in line}
    assert named == {f"mixed/class/{name}" for name in PROBLEMS}
    if command[0] == "tokenize":
        with np.load("out/t.npz") as file:
            assert file["names"].tolist() == ["class/a.png", "class/m.png", "class/z.png"]
    if command[0] == "reconstruct":
        assert "mean of 3 (5 left out)" in result.stdout
        assert [line.split()[-1] for line in result.stdout.splitlines()[:3]] == [
            "class/a.png",
            "class/m.png",
            "class/z.png",
        ]
    if command[:4] == ("reconstruct", "mixed", "-t", models / "tokenizer") and command[5] == "out":
        assert sorted(os.listdir("out/class")) == ["a.png", "m.png", "z.png"]


@pytest.mark.parametrize("which", range(5))
def test_no_readable_picture(which: int, models: Path, mixed: Path) -> None:
    for path in mixed.rglob("[amz].png"):
        path.unlink()
    result = CliRunner().invoke(app, [*map(str, commands(models)[which]), "--skip-unreadable"])
    assert result.exit_code == 2
    assert result.stderr.endswith("error: mixed: none of its pictures is readable\n")
    assert not Path("out").exists()


@pytest.mark.parametrize("which", range(5))
def test_a_picture_that_disappears(which: int, models: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROBLEMS:
        (mixed / "class" / name).unlink()
    list_images = images.list_images

    def and_then_one_is_gone(path: Path) -> images.ImageList:
        found = list_images(path)
        Path("mixed/class/m.png").unlink()
        return found

    monkeypatch.setattr(images, "list_images", and_then_one_is_gone)
    monkeypatch.setattr(sources, "list_images", and_then_one_is_gone)
    result = CliRunner().invoke(app, [*map(str, commands(models)[which]), "--skip-unreadable"])
    assert result.exit_code == 0, result.output
    assert "mixed/class/m.png" in result.stderr


@pytest.mark.parametrize("which", range(3))
def test_names_that_are_not_text(which: int, models: Path) -> None:
    """Linux takes any bytes for a name; those that are no UTF-8 are kept."""
    Path("mixed").mkdir()
    Image.new("RGB", (30, 20)).save("a.png")
    try:
        os.rename(b"a.png", b"mixed/\xff.png")
    except OSError:
        pytest.skip("this file system takes text only")
    result = CliRunner().invoke(app, [*map(str, commands(models)[which])])
    assert result.exit_code == 0, result.output
