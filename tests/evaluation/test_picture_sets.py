"""Pictures of an .npz and of a folder, as `evaluate_samples` reads them."""

from __future__ import annotations

from pathlib import Path

import evaluation_oracles as oracles
import numpy as np
import pytest
import torch
from PIL import Image

from titok.data.images import read_image, to_uint8
from titok.data.opening import open_pictures
from titok.evaluation.picture_sets import NpzPictures, SourcePictures

PICTURES = oracles.random_pictures(9, 0)


def content(path: Path) -> np.ndarray:
    ranges = torch.arange(9).split(4)
    return torch.cat(list(NpzPictures(path).batches(ranges))).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_labels_and_statistics(save: object, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, arr_0=PICTURES, arr_1=np.arange(9) % 3, mu=np.ones(4), sigma=np.eye(4))  # type: ignore[operator]
    found = NpzPictures(path)
    assert (len(found), found.size, found.channels) == (9, (16, 24), 3)
    assert np.array_equal(content(path), PICTURES)
    assert sorted(found.statistics) == ["mu", "sigma"]
    assert found.warnings() == []


def test_a_share_of_the_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", PICTURES)
    last, first = NpzPictures(tmp_path / "a.npz").batches([torch.arange(6, 9), torch.arange(2)])
    assert np.array_equal(last, PICTURES[6:])
    assert np.array_equal(first, PICTURES[:2])


@pytest.mark.parametrize("grey", [PICTURES[..., :1], PICTURES[..., 0]])
def test_grey_pictures_and_unequal_classes_are_named(grey: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=grey, arr_1=np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]))
    assert np.array_equal(content(tmp_path / "a.npz"), PICTURES[..., :1].repeat(3, axis=3))
    grey_one, classes = NpzPictures(tmp_path / "a.npz").warnings()
    assert "grey pictures" in grey_one
    assert "2 to 4 pictures of a class" in classes


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a\.npz: no such file"):
        NpzPictures(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a\.npz: not a readable"):
        NpzPictures(path)
    for arrays, message in (
        ({"mu": np.ones(3)}, "expected pictures named arr_0"),
        ({"arr_0": PICTURES.astype(np.float32)}, "arr_0: expected uint8"),
        ({"arr_0": PICTURES[..., :2]}, "arr_0: expected uint8"),
        ({"arr_0": PICTURES, "arr_1": np.arange(8)}, "arr_1: expected 9 labels"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            NpzPictures(path)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, PICTURES)
    found = NpzPictures(path)
    with path.open("rb+") as file:
        file.truncate(4000)
    with pytest.raises(ValueError, match=r"a\.npz: became shorter"):
        list(found.batches(torch.arange(9).split(3)))


def test_a_folder_is_read_by_the_evaluation_transform(tmp_path: Path) -> None:
    Image.fromarray(PICTURES[0]).save(tmp_path / "fits.png")
    Image.fromarray(oracles.random_pictures(1, 1, (40, 33))[0]).save(tmp_path / "other.png")
    found = SourcePictures(open_pictures(tmp_path), (16, 24))
    (batch,) = found.batches([torch.arange(2)])
    assert np.array_equal(batch[0], PICTURES[0])
    assert torch.equal(batch[1], to_uint8(read_image(tmp_path / "other.png", (16, 24))))
    (warning,) = found.warnings()
    assert "1 of 2 pictures looked at are not 24 x 16 pixels" in warning
    (tmp_path / "other.png").unlink()
    assert SourcePictures(open_pictures(tmp_path), (16, 24)).warnings() == []
