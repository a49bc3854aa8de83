"""examples/masked_diffusion_text.py and examples/amused_decode.py, with few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_text_is_decoded_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.png"
    load("masked_diffusion_text").main(["--steps", "3", "--out", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("  the object is ") == 6
    with Image.open(path) as picture:
        assert picture.width > 400
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_the_prompt_stays_and_steps_count_up() -> None:
    example = load("masked_diffusion_text")
    model = example.Denoiser(5, width=16, layers=1)
    tokens = torch.full((2, 12), 5)
    tokens[:, :3] = 2
    new, steps = example.decode(model, tokens.clone(), 5, policy="top_k", count=4, temperature=1.0)
    assert (new[:, :3] == 2).all()
    assert (new < 5).all()
    for row in steps.tolist():
        assert sorted(row) == [-1] * 3 + [0] * 4 + [1] * 4 + [2]


def test_amused_gives_equal_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    load("amused_decode").main(["--batch", "2", "--steps", "6"])
    assert "128 of 128 tokens equal" in capsys.readouterr().out
