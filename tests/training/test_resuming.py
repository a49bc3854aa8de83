"""Resumption: kills at every change of a file, other data, two runs in one folder, damaged checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import content, generator_training, pictures, tokenizer_training, train_one

from titok.data.folders import ImageFolder
from titok.training import fingerprint, train_generator, train_tokenizer
from titok.training.folder import CHECKPOINT, METRICS, RunFolder

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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("tokenizer", marks=pytest.mark.slow), "generator"])
def test_a_run_that_dies_before_any_file_goes_on(kind: str, tmp_path: Path) -> None:
    """Three saves write three files each: the checkpoint, the weights of the model, its config.json."""

    def train(out: str, *, resume: bool = False) -> None:
        changes = {"steps": 6, "checkpoint_every": 2}
        train_one(kind, tmp_path / out, resume=resume, changes=changes)

    train("whole")
    want = content(tmp_path / "whole")
    for change in range(9):
        assert killed_before(change, lambda out=str(change): train(out))  # type: ignore[misc]
        train(str(change), resume=True)
        assert content(tmp_path / str(change)) == want, change
    assert not killed_before(9, lambda: train("9"))


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


def folder_of_pictures(folder: Path, count: int) -> Path:
    (folder / "a").mkdir(parents=True)
    for number in range(count):
        Image.new("L", (16, 16), 10 * number).save(folder / "a" / f"{number:02}.bmp")
    return folder


def change_one_byte(path: Path) -> None:
    """Changes the last byte of a file, and neither its size nor its modification time."""
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_of_a_large_set_a_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_pictures(tmp_path / "photos", 20)
    size = (folder / "a" / "00.bmp").stat().st_size
    monkeypatch.setattr(fingerprint, "MAX_HASHED_BYTES", 15 * size)
    monkeypatch.setattr(fingerprint, "SAMPLED_FILES", 10)
    sampled = fingerprint._sampled([size] * 20)
    assert len(sampled) == 10
    uneven = [9 * size] + [size] * 19
    assert sum(uneven[number] for number in fingerprint._sampled(uneven)) <= 15 * size

    def hashes() -> dict[str, str]:
        return fingerprint.of_images(ImageFolder(folder, (16, 16), 1))

    first = hashes()
    read = []
    with monkeypatch.context() as patch:
        read_bytes = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
        assert hashes() == first
    assert sorted(int(path.stem) for path in read) == sorted(sampled)
    for number in range(20):
        path = folder / "a" / f"{number:02}.bmp"
        content, status = path.read_bytes(), path.stat()
        change_one_byte(path)
        assert (hashes() == first) == (number not in sampled)
        path.write_bytes(content)
        assert hashes()["pictures"] == first["pictures"], "the content is as it was, the time is not"
        assert hashes()["times"] != first["times"]
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashes() == first
    path.write_bytes(path.read_bytes() + b"x")
    assert hashes()["pictures"] != first["pictures"], "the size of every file counts"
    path.rename(path.with_name("99.bmp"))
    assert hashes()["pictures"] != first["pictures"], "the name of every file counts"


def test_a_copy_of_a_large_set_is_compared_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_pictures(tmp_path / "photos", 20)
    monkeypatch.setattr(fingerprint, "MAX_HASHED_BYTES", 10_000)
    monkeypatch.setattr(fingerprint, "SAMPLED_FILES", 5)

    def train(folder: Path, *, resume: bool = True) -> None:
        images = ImageFolder(folder, (16, 16), 1)
        train_tokenizer(images, tokenizer_training(), tmp_path / "t", resume=resume, progress=False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(folder, resume=False)
        train(folder)
        train(folder.rename(tmp_path / "moved"))  # keeps its times
    copy = Path(shutil.copytree(tmp_path / "moved", tmp_path / "copy", copy_function=shutil.copyfile))
    with pytest.warns(
        UserWarning, match="the pictures have other modification times than when the run was started"
    ):
        train(copy)
    changed = sorted(fingerprint._sampled([path.stat().st_size for path in sorted(copy.rglob("*.bmp"))]))[2]
    change_one_byte(copy / "a" / f"{changed:02}.bmp")
    with pytest.raises(ValueError, match="the pictures are not those"):
        train(copy)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder(resume: bool, tmp_path: Path) -> None:
    """The second one is refused from the first moment, before there is any file."""
    with RunFolder(tmp_path, resume=False):
        with pytest.raises(ValueError, match=f"{tmp_path}: another training run is at work here"):
            train_one("tokenizer", tmp_path, resume=resume)
        assert not list(tmp_path.iterdir())
    train_one("tokenizer", tmp_path, resume=resume)


def test_a_folder_that_received_nothing_goes_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b", resume=True) as folder:
        assert folder.path.is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with RunFolder(tmp_path / "mine", resume=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "raw", tmp_path / "pictures"):
        (folder / ".titok-0123456789abcdef").mkdir(parents=True)
        (folder / ".titok-0123456789abcdef" / "file.safetensors").touch()
    train_one("tokenizer", tmp_path)
    for name in ("raw", "pictures"):
        (tmp_path / name).rmdir()  # empty again
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        METRICS,
        "model.safetensors",
        CHECKPOINT,
    ]


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    train_one("tokenizer", tmp_path)
    path = tmp_path / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: not a readable training checkpoint: its tensors are not"):
        train_one("tokenizer", tmp_path, resume=True)


@pytest.mark.parametrize(
    "info",
    [
        None, [], {}, {"step": "3", "config": {}, "data": {}, "checksum": 0},
        {"step": 3, "config": None, "data": {}, "checksum": 0},
    ],
)  # fmt: skip
def test_damaged_information_is_named(info: Any, tmp_path: Path) -> None:
    train_one("tokenizer", tmp_path)
    path = tmp_path / CHECKPOINT
    save_file(load_file(path), path, {"training": json.dumps(info)})
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: not a readable training checkpoint"):
        train_one("tokenizer", tmp_path, resume=True)
