"""The default device and the default dtype of the host change no result of sampling, pipelines and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titok import MaskGIT, Pipeline, TiTok, sample_tokens
from titok.generation.sample_sets import generate_set
from titok.training import GeneratorTraining, TokenizerTraining, train_generator, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[..., Any]


@contextmanager
def default(kind: str) -> Iterator[None]:
    try:
        if kind == "float64":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device(kind)
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("kind", ["meta", "cpu", "float64"])
def test_generation(kind: str, tiny_tokenizer: Make, tiny_generator: Make, tmp_path: Path) -> None:
    pipe = Pipeline(tiny_tokenizer(), tiny_generator())
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipe.generator.save_pretrained(tmp_path / "generator")
    init = torch.tensor([[16, 1, 16, 2], [3, 16, 16, 16]])
    want, known = pipe([0, 1], seed=3), sample_tokens(pipe.generator, [0, 1], init_tokens=init)
    with default(kind):
        assert torch.equal(pipe([0, 1], seed=3), want)
        assert torch.equal(sample_tokens(pipe.generator, [0, 1], init_tokens=init), known)
        pictures = list(pipe.generate_many([0, 1], seed=3, batch_size=2))
        generate_set(pipe, tmp_path / "a.npz", [0, 1], seed=3, batch_size=2)
        loaded = Pipeline(
            TiTok.from_pretrained(tmp_path / "tokenizer"), MaskGIT.from_pretrained(tmp_path / "generator")
        )
        assert torch.equal(loaded([0, 1], seed=3), want)
    assert torch.equal(torch.stack(pictures), want)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], want.numpy())


def test_a_float64_model_samples(tiny_generator: Make) -> None:
    generator = tiny_generator()
    want = sample_tokens(generator, [0, 1, 2])
    assert torch.equal(sample_tokens(generator.double(), [0, 1, 2]), want)


@pytest.mark.parametrize("kind", ["meta", "cpu", "float64"])
def test_training(kind: str, tiny_tokenizer: Make, tiny_generator: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 3, "batch_size": 2, "warmup_steps": 1}
    tokenizer = TokenizerTraining(
        model=tiny_tokenizer().config, random_shift=1, random_flip=True, restart_every=3, **settings
    )
    generator = GeneratorTraining(model=tiny_generator().config, **settings)
    images, tokens, labels = torch.rand(5, 3, 16, 24), torch.arange(20).view(5, 4) % 16, torch.arange(5) % 3

    def train(folder: Path) -> tuple[Any, Any]:
        return (
            train_tokenizer(images, tokenizer, folder / "t", progress=False),
            train_generator(tokens, labels, generator, folder / "g", progress=False),
        )

    want = train(tmp_path / "want")
    with default(kind):
        got = train(tmp_path / "got")
    for model, expected in zip(got, want, strict=True):
        for name, value in model.state_dict().items():
            assert (value.device.type, value.dtype) == ("cpu", torch.float32)
            if kind != "float64":  # in which PyTorch draws other initial weights
                # PyTorch implements a default device as a function mode, in which ops take another way to their
                # gradients, so that sums are rounded differently.
                torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-4)
