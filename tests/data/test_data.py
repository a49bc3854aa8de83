"""Folders of pictures, batches read by threads, digits, augmentation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titok.data.augment import shift_images
from titok.data.digits import load_digits
from titok.data.folders import ImageFolder, read_batches


def picture(path: Path, level: int, size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level, name in ((10, "cat/a.png"), (20, "cat/deep/b.png"), (30, "ant/c.JPG"), (40, "bee/d.png")):
        picture(tmp_path / name, level)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    return tmp_path


def test_class_is_the_sub_folder(folder: Path) -> None:
    data = ImageFolder(folder, 8)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.labels.tolist() == [0, 1, 2, 2]
    assert len(data) == 4
    assert data[1].shape == (3, 8, 8)
    assert torch.allclose(data[1], torch.full((3, 8, 8), 40 / 255))


def test_linked_folders_are_classes_and_those_of_programs_are_not(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "a.png", 10)
    for name in ("eel/a.ppm", ".ipynb_checkpoints/a.png", "__MACOSX/eel/a.png", "@eaDir/a.png", "eel/._a.png"):
        picture(tmp_path / "data" / name, 20)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store")
    data = ImageFolder(tmp_path / "data", 8)
    assert data.classes == ["cat", "eel"]
    assert data.labels.tolist() == [0, 1]
    assert data.source.left_out == "left out: 1 @eaDir, 1 __MACOSX, 2 hidden"


def test_grey_and_oblong(folder: Path) -> None:
    assert ImageFolder(folder, (6, 10), channels=1)[0].shape == (1, 6, 10)


def test_folder_without_sub_folders_is_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    assert ImageFolder(tmp_path, 8).labels.tolist() == [0]


def test_folder_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no picture"):
        ImageFolder(tmp_path / "empty", 8)
    picture(folder / "loose.png", 1)
    with pytest.raises(ValueError, match=r"loose\.png.*sub-folder"):
        ImageFolder(folder, 8)


def test_unreadable_file_is_named_also_from_the_threads(folder: Path) -> None:
    (folder / "bee" / "d.png").write_bytes(b"not a picture")
    data = ImageFolder(folder, 8)
    with pytest.raises(ValueError, match=r"d\.png"):
        list(read_batches(data, [torch.tensor([0, 1])]))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_batches_come_in_the_order_asked_for(folder: Path, as_tensor: bool) -> None:
    data = ImageFolder(folder, 8)
    images = torch.stack([data[i] for i in range(4)]) if as_tensor else data
    order = [torch.tensor(x) for x in ([3, 0], [1, 1], [2, 3], [0, 2], [1, 0])]
    batches = list(read_batches(images, iter(order)))
    levels = [(255 * b[:, 0, 0, 0]).round().int().tolist() for b in batches]
    of = [30, 40, 10, 20]
    assert levels == [[of[i] for i in indices] for indices in order]


def test_batches_of_several_shapes_are_refused() -> None:
    images = [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)]  # the second would broadcast
    with pytest.raises(ValueError, match=r"images: expected \(3, 8, 8\), as the first, got \(1, 8, 8\)"):
        list(read_batches(images, [torch.tensor([0, 1])]))


def test_endless_order_can_be_left(folder: Path) -> None:
    batches = read_batches(ImageFolder(folder, 8), iter(lambda: torch.tensor([0, 1]), None))
    assert next(batches).shape == (2, 3, 8, 8)
    batches.close()


def test_shift_moves_each_image_by_its_own_pixels() -> None:
    images = torch.rand(3, 2, 5, 6)
    down, right = [0, 1, -2], [0, -1, 3]
    got = shift_images(images, torch.tensor(down), torch.tensor(right))
    for b in range(3):
        padded = np.pad(images[b].numpy(), ((0, 0), (3, 3), (3, 3)), mode="edge")
        want = padded[:, 3 - down[b] : 8 - down[b], 3 - right[b] : 9 - right[b]]
        assert np.array_equal(got[b].numpy(), want)


@pytest.mark.slow
def test_digits_are_split_by_class() -> None:
    pytest.importorskip("sklearn")
    digits = load_digits()
    assert digits.train_images.shape == (1433, 1, 32, 32)
    assert digits.test_images.shape == (364, 1, 32, 32)
    assert digits.train_images.dtype == torch.float32
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    for label in range(10):
        held_out = int((digits.test_labels == label).sum())
        total = held_out + int((digits.train_labels == label).sum())
        assert held_out == -(-total // 5)
    known = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in known for image in digits.test_images)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"titok-kernels\[quickstart\]"):
        load_digits()
