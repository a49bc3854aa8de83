"""What the page of `titok demo` computes, without gradio."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from titok import Pipeline, sample_tokens
from titok.demo.logic import Demo

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo(tiny_tokenizer: Callable[..., Any], tiny_generator: Callable[..., Any]) -> Demo:
    return Demo(Pipeline(tiny_tokenizer(), tiny_generator()))


def test_generation_ends_with_the_picture_of_the_pipeline(demo: Demo) -> None:
    stages = list(demo.generate(2, seed=5))
    assert stages[0].tokens == [None] * 4
    tokens = sample_tokens(demo.generator, [2], seed=5)
    assert stages[-1].tokens == tokens[0].tolist()
    # 16 x 24 pixels, each shown as 11 x 11.
    assert stages[-1].picture.shape == (176, 264, 3)
    assert np.array_equal(stages[-1].picture[::11, ::11], demo.pipe([2], seed=5)[0].numpy())
    decided = [sum(token is not None for token in stage.tokens) for stage in stages]
    assert decided == sorted(set(decided)), "every stage decides a token"
    for before, after in itertools.pairwise(stages):
        assert all(old in (None, new) for old, new in zip(before.tokens, after.tokens, strict=True))


def test_a_stage_is_shown_before_the_next_step_runs(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    features = demo.generator.features
    monkeypatch.setattr(demo.generator, "features", lambda ids: passes.append(1) or features(ids))
    stages = demo.generate(1, seed=0, steps=4)
    assert [len(passes) for _ in stages] == [0, 1, 2, 3, 4]


def test_masked_tokens_are_shown_as_the_mean_of_all_codes(demo: Demo) -> None:
    first = next(iter(demo.generate(0, seed=0)))
    codes = demo.tokenizer.quantizer.lookup(torch.arange(16))
    image = demo.tokenizer.decode_latents(codes.mean(0).expand(1, 4, -1))[0].detach()
    expected = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(first.picture[::11, ::11], expected)


def test_no_class_and_other_steps(demo: Demo) -> None:
    assert len(list(demo.generate(None, 0, steps=2, guidance=0.0, temperature=0.0))) == 3
    with pytest.raises(ValueError, match="labels"):
        list(demo.generate(4, 0))
    with pytest.raises(ValueError, match="steps"):
        list(demo.generate(0, 0, steps=0))


def test_inpainting_keeps_the_other_tokens(demo: Demo) -> None:
    stages = list(demo.inpaint([1, 2, 3, 4], [0, 3], label=1, seed=2))
    assert stages[0].tokens == [None, 2, 3, None]
    assert stages[-1].tokens[1:3] == [2, 3]
    assert None not in stages[-1].tokens


def test_reconstruction(demo: Demo, photos: Path) -> None:
    result = demo.reconstruct(photos / "a.png")
    original = np.asarray(Image.open(photos / "a.png"))
    assert np.array_equal(result.original[::11, ::11], original)
    assert np.array_equal(result.copy, demo.decode(result.tokens))
    error = np.mean((original.astype(float) - result.copy[::11, ::11]) ** 2)
    assert result.psnr == pytest.approx(10 * np.log10(255**2 / error))


def test_a_bad_upload_gets_a_sentence(demo: Demo, photos: Path) -> None:
    for path in (photos / "notes.txt", photos / "missing.png"):
        with pytest.raises(
            ValueError, match=r"^This file is not a picture that can be read here\. Try a PNG or a JPEG\.$"
        ):
            demo.reconstruct(path)
    with pytest.raises(ValueError, match=r"^Upload a picture first\.$"):
        demo.reconstruct(None)


def test_swap(demo: Demo) -> None:
    assert demo.swap([1, 2, 3, 4], [5, 6, 7, 8], [0, 2]) == ([5, 2, 7, 4], [1, 6, 3, 8])


def test_grey_pictures_have_no_channel(
    tiny_tokenizer: Callable[..., Any], tiny_generator: Callable[..., Any]
) -> None:
    grey = Demo(Pipeline(tiny_tokenizer(channels=1, image_size=(8, 8)), tiny_generator()))
    assert grey.decode([0, 1, 2, 3]).shape == (256, 256)


def test_what_visitors_write(demo: Demo) -> None:
    assert demo.parse_tokens(" 1, 2;3\n15 ") == [1, 2, 3, 15]
    assert demo.parse_positions("2-3, 0") == [0, 2, 3]
    for text, words in {"": "there are 0", "1 2 3": "there are 3", "1 2 3 16": "'16'", "1 2 3 x": "'x'"}.items():
        with pytest.raises(ValueError, match=words):
            demo.parse_tokens(text)
    for text in ("", "4", "0-9", "-1", "a", "3-1"):
        with pytest.raises(ValueError, match="ositions"):
            demo.parse_positions(text)
