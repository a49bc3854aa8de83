"""Helpers for tests of the command line: they run commands in the current folder and read what these wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from titok import TiTok
from titok.cli.commands import app

SIZE = (16, 24)  # height and width of the pictures of `tiny_tokenizer`
NAMES = ["a.png", "b.png", "cats/a.png", "cats/old/c.jpg", "d.bmp"]  # of the pictures in the fixture `photos`


def titok(*arguments: str | Path | int) -> list[str]:
    """Runs a command that must succeed. Returns the lines that it prints on stdout."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refused(*arguments: str | Path | int) -> str:
    """Runs a command that must refuse its input and leave no file. Returns its one-line error message."""
    before = sorted(Path.cwd().rglob("*"))
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert sorted(Path.cwd().rglob("*")) == before
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING: ", "note: "))]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


def load(models: Path, name: str) -> TiTok:
    """A tokenizer of the fixture `models`."""
    return TiTok.from_pretrained(models / name).requires_grad_(False)


def pixels(path: Path) -> np.ndarray:
    """The pixels of a PNG file, uint8 (H, W, C), or (H, W) where it is grey."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)
