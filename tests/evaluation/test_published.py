"""The published figures, for whoever has weights, Inception and ImageNet; docs/evaluation.md lists the variables."""

from __future__ import annotations

import os

import pytest
import torch

from titok import TiTok
from titok.data.folders import Pictures
from titok.data.images import PUBLISHED_PREPROCESSING
from titok.data.opening import open_pictures
from titok.evaluation.features import InceptionFeatures
from titok.evaluation.picture_sets import NpzPictures
from titok.evaluation.reconstruction import evaluate_reconstruction
from titok.evaluation.samples import evaluate_samples

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def variables(*names: str) -> list[str]:
    """The values of environment variables; the test is skipped where one is not set."""
    if missing := [name for name in names if not os.environ.get(name)]:
        pytest.skip(f"{', '.join(missing)} not set")
    return [os.environ[name] for name in names]


def inception() -> InceptionFeatures:
    return InceptionFeatures(os.environ.get("TITOK_EVAL_INCEPTION"), device=DEVICE)


def test_rfid_of_a_published_tokenizer() -> None:
    source, published, folder = variables("TITOK_EVAL_TOKENIZER", "TITOK_EVAL_RFID", "TITOK_EVAL_IMAGENET_VAL")
    model = TiTok.from_pretrained(source, device=DEVICE, prepare=True)
    pictures = Pictures(
        open_pictures(folder),
        model.config.image_size,
        model.config.channels,
        preprocessing=PUBLISHED_PREPROCESSING,
    )
    assert len(pictures) == 50_000
    figures = evaluate_reconstruction(model, pictures, extractor=inception()).figures
    assert figures["rfid"] == pytest.approx(float(published), abs=0.02)


def test_gfid_of_published_samples() -> None:
    samples, published, reference = variables("TITOK_EVAL_SAMPLES", "TITOK_EVAL_GFID", "TITOK_EVAL_ADM_REFERENCE")
    found = evaluate_samples(NpzPictures(samples), NpzPictures(reference), inception(), with_precision=False)
    assert found.figures["fid"] == pytest.approx(float(published), abs=0.1)
