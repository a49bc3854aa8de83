"""Which crop of which picture a step gets: the same for any number of workers and processes, killed or not."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from titok import TokenizerConfig, ViTConfig
from titok.data.folders import ImageFolder, Pictures, read_batches
from titok.training import TokenizerTraining, checkpoint, train_tokenizer
from titok.training.order import micro_batches, seed_of, shuffled_batches, shuffled_draws

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, BATCH, MICRO, STEPS, SEED = 7, 4, 2, 6, 5


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (10 + number, 40 - 2 * number, 3), dtype=np.uint8)
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    return ImageFolder(tmp_path, 8)


def batches_of_rank(pictures: Pictures, rank: int, world: int, first_step: int, **how: Any) -> Iterator[Tensor]:
    """As `titok.training.run` reads them."""
    draws = micro_batches(shuffled_draws(len(pictures), BATCH, SEED, first_step), MICRO, rank, world)
    draws = itertools.islice(draws, (STEPS - first_step) * BATCH // MICRO // world)
    return read_batches(pictures.augmented(SEED, flip=True), draws, **how)


def hashes(pictures: Pictures, world: int = 1, stopped: int = STEPS, **how: Any) -> list[str]:
    """A hash of the images of each step of a run of `world` processes that is stopped and resumed."""
    found = []
    for first, last in ((0, stopped), (stopped, STEPS)):
        streams = [batches_of_rank(pictures, rank, world, first, **how) for rank in range(world)]
        for _ in range(first, last):
            parts = [next(streams[number % world]) for number in range(BATCH // MICRO)]
            found.append(hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest())
    return found


def test_one_hash_for_all(folder: ImageFolder) -> None:
    want = hashes(folder, workers=0)
    assert len(set(want)) == STEPS
    assert want == hashes(folder, workers=2) == hashes(folder, workers=5) == hashes(folder)
    assert want == hashes(folder, world=2, workers=0) == hashes(folder, world=2, workers=5)
    assert want == hashes(folder, stopped=2, workers=2) == hashes(folder, world=2, stopped=5, workers=0)


@pytest.mark.slow
def test_processes_read_the_same(folder: ImageFolder) -> None:
    state = torch.get_rng_state()
    want = hashes(folder, workers=0)
    assert want == hashes(folder, workers=2, processes=True)
    assert want == hashes(folder, world=2, stopped=3, workers=1, processes=True)
    assert torch.equal(torch.get_rng_state(), state), "reading draws no number of PyTorch's"


def test_the_order_is_that_of_the_definition() -> None:
    """Each epoch is a permutation from a generator that is seeded with (seed, 1, epoch)."""
    flat = [
        epoch * COUNT + index
        for epoch in range(4)
        for index in torch.randperm(
            COUNT, generator=torch.Generator().manual_seed(seed_of(SEED, 1, epoch))
        ).tolist()
    ]
    draws = shuffled_draws(COUNT, BATCH, SEED)
    batches = shuffled_batches(COUNT, BATCH, SEED)
    for step in range(STEPS):
        want = flat[step * BATCH : (step + 1) * BATCH]
        assert next(draws).tolist() == want
        assert next(batches).tolist() == [draw % COUNT for draw in want]


def test_crops_differ_between_epochs_and_pictures(folder: ImageFolder) -> None:
    augmented = folder.augmented(SEED)
    crops = [augmented[epoch * COUNT].numpy().tobytes() for epoch in range(40)]
    assert len(set(crops)) > 10, "picture 0 becomes 8 x 32: 25 places"
    assert len({folder.augmented(seed)[0].numpy().tobytes() for seed in range(20)}) > 5
    mirrored = folder.augmented(SEED, crop=False, flip=True)
    kept = [torch.equal(mirrored[epoch * COUNT], folder[0]) for epoch in range(40)]
    assert 8 < sum(kept) < 32
    assert all(
        torch.equal(mirrored[epoch * COUNT], folder[0] if keep else folder[0].flip(-1))
        for epoch, keep in enumerate(kept)
    )


def training(**changes: Any) -> TokenizerTraining:
    vit = ViTConfig(16, 1, 2, 8)
    model = TokenizerConfig(8, vit, vit, 4, 4, 16, l2_normalize=True)
    options = {
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 1,
        "checkpoint_every": 2,
        "random_flip": True,
        **changes,
    }
    return TokenizerTraining(model=model, random_crop=True, **options)


@pytest.mark.slow
def test_training_on_random_crops_goes_on_with_the_same(folder: ImageFolder, tmp_path: Path) -> None:
    def train(out: str, **changes: Any) -> bytes:
        train_tokenizer(folder, training(**changes), tmp_path / "runs" / out, resume=True, progress=False)
        return (tmp_path / "runs" / out / "model.safetensors").read_bytes()

    want = train("whole")
    write = checkpoint.write_checkpoint
    saved: list[int] = []

    def stops(path: Path, step: int, *rest: Any) -> None:
        write(path, step, *rest)
        saved.append(step)
        if step == 4 and saved.count(4) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_checkpoint", stops)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
        assert train("stopped") == want
    assert saved == [2, 4, 6]
    assert train("centre", random_flip=False) != want


def test_random_crops_need_pictures(folder: ImageFolder, tmp_path: Path) -> None:
    images = torch.stack([folder[index] for index in range(COUNT)])
    with pytest.raises(
        ValueError, match=r"random_crop: expected pictures that are read from files, .* got Tensor"
    ):
        train_tokenizer(images, training(), tmp_path / "run", progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_several_shapes_are_refused(workers: int) -> None:
    images = [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)]
    with pytest.raises(ValueError, match=r"images: expected \(3, 8, 8\), as the first, got \(1, 8, 8\)"):
        list(read_batches(images, [torch.tensor([0, 1])], workers=workers))
