"""Runs commands of `titok` in the current folder and looks at what they write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from titok import TiTok
from titok.cli.app import app

SIZE = (16, 24)
NAMES = ["a.png", "b.png", "cats/a.png", "cats/old/c.jpg", "d.bmp"]  # what the fixture `photos` holds


def titok(*arguments: str | Path | int) -> list[str]:
    """Runs a command that must work; the lines that it prints."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refused(*arguments: str | Path | int) -> str:
    """Runs a command that must refuse its input, in one line and leaving no file; that line."""
    before = sorted(Path.cwd().rglob("*"))
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert sorted(Path.cwd().rglob("*")) == before
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING: ", "note: "))]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


def load(models: Path, name: str) -> TiTok:
    return TiTok.from_pretrained(models / name).requires_grad_(False)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)
