"""Finding pictures: which files and folders count, links, and what is said to be left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from titok.data.images import find_images, list_images, read_image


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "notes.txt", "deep/d.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)]
    assert found == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert find_images(tmp_path / "b.png") == [tmp_path / "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no picture here"):
        find_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        find_images(tmp_path / "none")


@pytest.mark.parametrize(
    "kind", ["PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX", "DDS", "WEBP", "QOI", "MPO", "SGI"]
)
def test_every_format_that_pillow_reads_is_found(kind: str, tmp_path: Path) -> None:
    suffixes = [suffix for suffix, name in Image.registered_extensions().items() if name == kind]
    if kind not in Image.SAVE or not suffixes:
        pytest.skip(f"this Pillow does not write {kind}")
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    picture.save(tmp_path / f"a{suffixes[-1].upper()}", format=kind)
    (path,) = find_images(tmp_path)
    assert read_image(path, (16, 16)).shape == (3, 16, 16)


def test_files_that_pillow_only_recognises_are_not_found(tmp_path: Path) -> None:
    for suffix in (".h5", ".hdf", ".grib", ".mpg", ".eps", ".ps", ".wmf", ".pdf", ".npz"):
        (tmp_path / f"a{suffix}").touch()
    with pytest.raises(FileNotFoundError, match="no picture here"):
        find_images(tmp_path)


JUNK = [
    ".ipynb_checkpoints/a.png",
    "__MACOSX/a.png",
    ".thumbnails/a.png",
    "@eaDir/a.png",
    "._a.png",
    ".titok-0f.tmp",
]
JUNK += ["$RECYCLE.BIN/a.png", ".a.png.0123456789abcdef.png", ".git/x/a.png"]


@pytest.mark.parametrize("depth", ["", "cat/"])
def test_hidden_files_and_those_of_programs_are_no_pictures(depth: str, tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", *(depth + name for name in JUNK)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images = list_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in images.paths] == ["cat/1.png", "dog/1.png"]
    assert images.left_out == {"hidden": 6, "__MACOSX": 1, "@eaDir": 1, "$RECYCLE.BIN": 1}
    assert images.describe_left_out() == "left out: 1 $RECYCLE.BIN, 1 @eaDir, 1 __MACOSX, 6 hidden"
    hidden_root = tmp_path / ".cache"
    hidden_root.mkdir()
    (hidden_root / "a.png").touch()
    assert find_images(hidden_root) == [hidden_root / "a.png"], "the folder that is asked for may be hidden"


def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    for name in ("data/eel/1.png", "store/cat/1.png", "store/one.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path / "data"
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "tom").symlink_to(tmp_path / "store" / "cat")  # a second link to the same folder is another class
    (root / "eel" / "2.png").symlink_to(tmp_path / "store" / "one.png")
    (root / "eel" / "up").symlink_to("..")
    (root / "eel" / "self").symlink_to(root / "eel")
    (root / "eel" / "gone.png").symlink_to("nowhere.png")
    (root / "eel" / "own.png").symlink_to("own.png")
    images = list_images(root)
    names = [p.relative_to(root).as_posix() for p in images.paths]
    assert names == ["cat/1.png", "eel/1.png", "eel/2.png", "tom/1.png"]
    assert images.left_out == {"link to a folder above it": 2, "broken link": 2}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuses(path: Path) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(PermissionError, match="secret"):
        find_images(tmp_path)
