"""The whole quickstart with few steps, and its figures on random images."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titok import Pipeline
from titok.data.digits import Digits, load_digits
from titok.quickstart import run as quickstart
from titok.quickstart.metrics import (
    REQUIREMENTS,
    nearest_distance,
    psnr,
    share_of_copies,
    within_class_distance,
)
from titok.training.folder import CHECKPOINT

pytestmark = pytest.mark.usefixtures("one_thread")
needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None or importlib.util.find_spec("matplotlib") is None,
    reason="needs the extra 'quickstart'",
)


@needs_extra
@pytest.mark.slow
def test_from_nothing_to_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Digits(*(values[:100] for values in load_digits()))
    monkeypatch.setattr(quickstart, "load_digits", lambda: few)
    steps = {"tokenizer_steps": 6, "generator_steps": 6, "samples_per_class": 10}
    metrics = quickstart.run(tmp_path, seed=3, **steps)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert set(metrics["bars"]) <= set(metrics["metrics"])
    assert metrics["seed"] == 3
    assert not metrics["all_bars_reached"]
    printed = capsys.readouterr().out
    for name in ("report.html", "samples.png", "reconstructions.png", "metrics.json", "tokenizer", "generator"):
        assert str(tmp_path / name) in printed
        assert (tmp_path / name).exists()
    with Image.open(tmp_path / "samples.png") as picture:
        assert min(picture.size) > 800
    pipeline = Pipeline.from_pretrained(tmp_path / "tokenizer", tmp_path / "generator")
    assert pipeline([7, 0]).shape == (2, 32, 32, 1)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<svg" in page
    assert not re.findall(r"(?:src|href)=.?https?:", page)  # the page loads nothing from the network
    for requirement in REQUIREMENTS:
        assert requirement.text(metrics["metrics"][requirement.key]) in page

    before = (tmp_path / "generator" / "model.safetensors").read_bytes()
    (tmp_path / "generator" / CHECKPOINT).unlink()
    quickstart.run(tmp_path, seed=3, **steps, resume=True, progress=False)
    assert (tmp_path / "generator" / "model.safetensors").read_bytes() == before
    assert capsys.readouterr().out == ""


def test_missing_packages_are_named_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install 'titok-kernels\[quickstart\]'"):
        quickstart.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_requirements_and_their_text() -> None:
    by_key = {requirement.key: requirement for requirement in REQUIREMENTS}
    assert by_key["copies"].met_by(0.05)
    assert not by_key["copies"].met_by(0.051)
    assert by_key["heldout_psnr"].met_by(22.0)
    assert not by_key["heldout_psnr"].met_by(21.99)
    assert by_key["samples_right"].text(0.9876) == "98.8%"
    assert by_key["heldout_psnr"].text(23.456) == "23.46 dB"
    assert by_key["codes_used"].text(251) == "251"


def test_psnr_is_that_of_each_clamped_image() -> None:
    images = torch.rand(3, 1, 4, 4)
    other = images + torch.tensor([0.1, 0.01, 5.0])[:, None, None, None]
    clipped = np.clip(other.double().numpy(), 0, 1) - images.double().numpy()
    want = -10 * np.log10((clipped**2).reshape(3, -1).mean(axis=1))
    np.testing.assert_allclose(psnr(images, other).numpy(), want, rtol=1e-4)


def test_distances() -> None:
    images, labels = torch.rand(7, 1, 3, 3), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    flat = images.flatten(1).double().numpy()
    means = []
    for members in (flat[:3], flat[3:]):
        pairs = [np.linalg.norm(a - b) for i, a in enumerate(members) for j, b in enumerate(members) if i != j]
        means.append(np.mean(pairs))
    assert within_class_distance(images, labels) == pytest.approx(np.mean(means), rel=1e-5)
    nearest = [min(np.linalg.norm(a - b) for b in flat[3:]) for a in flat[:3]]
    np.testing.assert_allclose(nearest_distance(images[:3], images[3:]).numpy(), nearest, rtol=1e-4)


def test_training_images_are_copies_and_noise_is_none() -> None:
    images = torch.rand(40, 1, 4, 4)
    digits = Digits(images[:20], torch.zeros(20), images[20:], torch.zeros(20))
    assert share_of_copies(images[:20], digits) == 1.0
    assert share_of_copies(images[20:], digits) == pytest.approx(0.05)
    assert share_of_copies(images[:10] + 10, digits) == 0.0
