"""Resumption: kills at every change of a file, other data, two runs in one folder, damaged checkpoints."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import generator_training, pictures, tokenizer_training, train_one

from titok import TiTok
from titok.data.folders import ImageFolder
from titok.training import train_generator, train_tokenizer
from titok.training.run import CHECKPOINT, Run

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Ends a run in place of the end of the process."""


def killed_before(change: int, train: Callable[[], Any]) -> bool:
    """Ends a run before it gives a file its name for the time `change`, from 0. False where it ends by itself."""
    count, replace = itertools.count(), os.replace

    def until(*paths: Any) -> None:
        if next(count) >= change:
            raise Killed
        replace(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", until)
        try:
            train()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("kind", [pytest.param("tokenizer", marks=pytest.mark.slow), "generator"])
def test_a_run_that_dies_before_any_file_goes_on(kind: str, tmp_path: Path) -> None:
    """Three saves write three files each: the checkpoint, the weights of the model, its config.json."""
    train_one(kind, tmp_path / "whole")
    want = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for change in range(9):
        out = tmp_path / str(change)
        assert killed_before(change, lambda out=out: train_one(kind, out))  # type: ignore[misc]
        train_one(kind, out, resume=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == want, change
    assert not killed_before(9, lambda: train_one(kind, tmp_path / "9"))


def test_other_data_are_refused_in_words(tmp_path: Path) -> None:
    tokens = torch.randint(0, 16, (20, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    train_one("tokenizer", tmp_path / "t")
    train_one("generator", tmp_path / "g")

    def tokenizer(images: Any) -> None:
        train_tokenizer(images, tokenizer_training(), tmp_path / "t", resume=True, progress=False)

    def generator(tokens: Any, labels: Any) -> None:
        train_generator(tokens, labels, generator_training(), tmp_path / "g", resume=True, progress=False)

    for call, words in (
        (lambda: tokenizer(1 - pictures()), "the pictures are not those"),
        (lambda: tokenizer(pictures().flip(0)), "the pictures are not those"),
        (lambda: generator(15 - tokens, labels), "the tokens are not those"),
        (lambda: generator(tokens.flip(0), labels), "the tokens are not those"),
        (lambda: generator(tokens, labels.flip(0)), "the labels are not those"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400, "words, not hashes"
    tokenizer(pictures())
    generator(tokens.int(), labels)


def test_a_folder_of_pictures_is_known_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for number in range(6):
        Image.new("L", (16, 16), 40 * number).save(folder / "a" / f"{number}.bmp")

    def train(folder: Path, *, resume: bool = True) -> None:
        images = ImageFolder(folder, (16, 16), 1)
        train_tokenizer(images, tokenizer_training(), tmp_path / "t", resume=resume, progress=False)

    train(folder, resume=False)
    folder = folder.rename(tmp_path / "moved")
    train(folder)
    Image.new("L", (16, 16), 1).save(folder / "a" / "3.bmp")  # a file of the same name and size
    with pytest.raises(ValueError, match="the pictures are not those"):
        train(folder)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder(resume: bool, tmp_path: Path) -> None:
    """The second one is refused from the first moment, before there is any file."""
    first = Run(TiTok(tokenizer_training().model), tokenizer_training(), tmp_path, resume=False, data={})
    with pytest.raises(ValueError, match=f"{tmp_path}: another training run is at work here"):
        train_one("tokenizer", tmp_path, resume=resume)
    assert not list(tmp_path.iterdir())
    first.close()
    train_one("tokenizer", tmp_path, resume=resume)


@pytest.mark.parametrize(
    "info",
    [
        None, [], {}, {"step": "3", "config": {}, "data": {}, "history": []},
        {"step": 3, "config": None, "data": {}, "history": []},
    ],
)  # fmt: skip
def test_damaged_information_is_named(info: Any, tmp_path: Path) -> None:
    train_one("tokenizer", tmp_path)
    path = tmp_path / CHECKPOINT
    save_file(load_file(path), path, {"training": json.dumps(info)})
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: not a readable training checkpoint"):
        train_one("tokenizer", tmp_path, resume=True)
