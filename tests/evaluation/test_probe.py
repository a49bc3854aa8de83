"""The linear probe: its optimizer by definition, and what it reads from features of digits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from titok import TiTok
from titok.evaluation.probe import FEATURES, LARS, ProbeData, ProbeSettings, encode_for_probe, train_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lars_takes_the_steps_of_its_definition() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    expected, velocity = [weight.double(), bias.double()], [torch.zeros(3, 4).double(), torch.zeros(3).double()]
    optimizer = LARS([weight, bias], momentum=0.9, trust=0.001)
    for rate in (0.5, 2.0, 0.1):
        gradients = (torch.randn(3, 4), torch.randn(3))
        scale = 0.001 * expected[0].square().sum().sqrt() / gradients[0].double().square().sum().sqrt()
        for i, factor in enumerate((scale, 1.0)):
            velocity[i] = 0.9 * velocity[i] + factor * gradients[i].double()
            expected[i] = expected[i] - rate * velocity[i]
        optimizer.step(gradients, rate)
    torch.testing.assert_close(weight.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.double(), expected[1], rtol=1e-5, atol=1e-6)


def test_wrong_settings_are_refused() -> None:
    for name, value in (("epochs", 0), ("batch_size", 0), ("warmup_epochs", 90), ("base_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ProbeSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.slow
def test_digits_are_read_far_better_than_shuffled_labels(tmp_path: Path) -> None:
    """After 60 steps of training. Only a tokenizer that was trained to the end is compared with raw pixels.

    TITOK_EVAL_DIGITS names that of `titok quickstart`. Its last block is then read better than the pixels are.
    """
    pytest.importorskip("sklearn")
    from titok.data.digits import load_digits
    from titok.quickstart.run import tokenizer_training
    from titok.training import train_tokenizer
    from titok.training.folder import RunFolder

    digits, trained = load_digits(), os.environ.get("TITOK_EVAL_DIGITS")
    if trained:
        model = TiTok.from_pretrained(trained)
    else:
        with RunFolder(tmp_path, resume=False) as folder:
            model = train_tokenizer(digits.train_images, tokenizer_training(60), folder, progress=False)
    training, held_out = (
        encode_for_probe(model.eval(), images, labels, features=tuple(FEATURES), flip=False, progress=False)
        for images, labels in (
            (digits.train_images, digits.train_labels),
            (digits.test_images, digits.test_labels),
        )
    )
    assert training is not None
    assert held_out is not None
    settings = ProbeSettings(epochs=60, warmup_epochs=10, batch_size=32, base_rate=30)
    tokens = training["last_block_tokens"]
    found = train_probe(tokens, held_out["last_block_tokens"], settings, progress=False).top1
    order = torch.randperm(len(tokens.labels), generator=torch.Generator().manual_seed(0))
    shuffled = tokens._replace(labels=tokens.labels[order])
    by_chance = train_probe(shuffled, held_out["last_block_tokens"], settings, progress=False).top1
    assert by_chance < 0.3
    assert found > 0.85
    if trained:
        pixels = [
            ProbeData(images.flatten(1), None, labels)
            for images, labels in (
                (digits.train_images, digits.train_labels),
                (digits.test_images, digits.test_labels),
            )
        ]
        assert found > train_probe(*pixels, settings, progress=False).top1
