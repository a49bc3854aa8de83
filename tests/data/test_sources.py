"""Folders, shards and datasets of Hugging Face: the same bytes, labels and names, and what is left out or refused."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from titok.data import shards, sources
from titok.data.folders import ImageFolder, Pictures
from titok.data.opening import open_pictures
from titok.data.shards import ShardSource, find_shards
from titok.data.sources import FolderSource, PictureSource, read_class_names, read_labels_file

RNG = np.random.default_rng(0)
CLASSES = ["ant", "bee", "cat"]


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned_photo() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def on_nothing() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 30), (0, 0, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


CONTENTS = [("0.png", encoded("PNG"), 0), ("1.jpg", encoded("JPEG"), 0), ("2.webp", encoded("WEBP"), 1)]
CONTENTS += [("3.jpeg", turned_photo(), 2), ("4.png", on_nothing(), 2), ("5.bmp", encoded("BMP"), 1)]


def add(archive: tarfile.TarFile, name: str, content: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path: Path, samples: list[tuple[str, bytes, int]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content, label in samples:
            add(archive, name, content)
            add(archive, f"{name.partition('.')[0]}.cls", str(label).encode())
    return path


def by_folder(root: Path) -> PictureSource:
    for name, content, label in CONTENTS:
        (root / "photos" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (root / "photos" / CLASSES[label] / name).write_bytes(content)
    return open_pictures(root / "photos")


def by_labels_file(root: Path) -> PictureSource:
    (root / "flat").mkdir()
    for name, content, _ in CONTENTS:
        (root / "flat" / name).write_bytes(content)
    (root / "labels.csv").write_text("".join(f"{name},{CLASSES[label]}\n" for name, _, label in CONTENTS))
    return open_pictures(root / "flat", labels_file=root / "labels.csv")


def by_shards(root: Path) -> PictureSource:
    (root / "shards").mkdir()
    write_shard(root / "shards" / "a-0.tar", CONTENTS[:4])
    write_shard(root / "shards" / "a-1.tar", CONTENTS[4:])
    return open_pictures(root / "shards", classes=CLASSES)


def by_webdataset(root: Path) -> PictureSource:
    webdataset = pytest.importorskip("webdataset")
    (root / "wds").mkdir()
    with webdataset.ShardWriter(str(root / "wds" / "b-%03d.tar"), maxcount=2, verbose=0) as writer:
        for name, content, label in CONTENTS:
            key, _, kind = name.partition(".")
            writer.write({"__key__": key, kind: content, "cls": label})
    return open_pictures(f"{root}/wds/b-{{000..002}}.tar", classes=CLASSES)


def by_huggingface(root: Path) -> PictureSource:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=CLASSES)}
    )
    rows = {
        "image": [{"bytes": content, "path": None} for _, content, _ in CONTENTS],
        "text": ["a"] * len(CONTENTS),
        "label": [label for *_, label in CONTENTS],
    }
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split.select([1, 0])}).save_to_disk(str(root / "hf"))
    return open_pictures(f"hf:{root}/hf:train")


READERS: list[Callable[[Path], PictureSource]] = [
    by_folder, by_labels_file, by_shards, by_webdataset, by_huggingface,
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_all_readers_give_the_same(reader: Callable[[Path], PictureSource], tmp_path: Path) -> None:
    source = reader(tmp_path)
    assert len(source) == len(CONTENTS)
    assert source.classes == CLASSES
    order = sorted(range(len(source)), key=lambda index: source.names[index].rpartition("/")[2])
    pictures = Pictures(source, (8, 12))
    folder = tmp_path / "plain"
    folder.mkdir()
    for index, (name, content, label) in zip(order, CONTENTS, strict=True):
        picture = source[index]
        assert (picture.content, picture.label) == (content, label)
        assert picture.name == source.names[index]
        assert int(source.labels[index]) == label == int(pictures.labels[index])
        (folder / name).write_bytes(content)
    plain = ImageFolder(folder, (8, 12))
    for number, index in enumerate(order):
        assert torch.equal(pictures[index], plain[number]), "EXIF orientation and transparency count everywhere"
    assert pictures[order[4]].min() == 1, "transparent pixels are white"
    assert all(path.is_file() for path in pictures.paths)


@pytest.mark.parametrize("reader", [by_folder, by_shards, by_huggingface])
def test_damaged_pictures_are_named_by_every_reader(
    reader: Callable[[Path], PictureSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "CONTENTS", [*CONTENTS[:1], ("1.jpg", CONTENTS[1][1][:300], 0), *CONTENTS[2:]])
    pictures = Pictures(reader(tmp_path), 8)
    damaged = next(i for i in range(len(pictures)) if len(pictures.source[i].content) == 300)
    assert list(pictures.find_unreadable()) == [damaged]
    with pytest.raises(ValueError, match=r"(1\.jpg|row 1): not a readable picture"):
        pictures[damaged]
    monkeypatch.setattr(sources, "MAX_PICTURE_BYTES", 299)
    with pytest.raises(ValueError, match=r"not a readable picture \(\d+ bytes, more than 299\)"):
        pictures[damaged]
    pictures.remove([damaged])
    assert len(pictures) == 5 == len(pictures.labels) == len(pictures.names)


# ---------------------------------------------------------------------------------------------------------------
# Classes and labels


def test_order_of_classes(tmp_path: Path) -> None:
    for name in ("c10", "c2", "c1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(CONTENTS[0][1])
    assert open_pictures(tmp_path).classes == ["c1", "c10", "c2"]
    natural = open_pictures(tmp_path, classes="natural")
    assert natural.classes == ["c1", "c2", "c10"]
    assert dict(zip(natural.names, natural.labels.tolist(), strict=True))["c10/a.png"] == 2
    given = open_pictures(tmp_path, classes=["c2", "unseen", "c10", "c1"])
    assert dict(zip(given.names, given.labels.tolist(), strict=True)) == {
        "c1/a.png": 3,
        "c10/a.png": 2,
        "c2/a.png": 0,
    }
    for classes, words in (
        (["c1", "c2"], "'c10' is not among them"),
        (["c1", "c1", "c2", "c10"], "'c1' twice"),
        ("random", "expected 'sorted', 'natural' or a list of names, got 'random'"),
    ):
        with pytest.raises(ValueError, match=f"classes: .*{words}"):
            _ = FolderSource(tmp_path, classes=classes).labels


def test_files_of_classes(tmp_path: Path) -> None:
    for text in ("b\n\na\n", '["b", "a"]'):
        (tmp_path / "classes").write_text(text)
        assert read_class_names(tmp_path / "classes") == ["b", "a"]
    for text in ("[1]", "[" * 10**5):
        (tmp_path / "classes").write_text(text)
        with pytest.raises(ValueError, match=r"classes: (expected a|not a readable) list of"):
            read_class_names(tmp_path / "classes")


@pytest.mark.parametrize(
    "text",
    [
        "a.png,dog\nb/c.png,cat\n",
        "a.png\tdog\nb/c.png\tcat",
        "a.png dog\n\nb/c.png  cat\n",
        '"a.png",dog\nb/c.png,cat',
    ],
)
def test_files_of_labels(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    assert read_labels_file(tmp_path / "labels") == {"a.png": "dog", "b/c.png": "cat"}


def test_files_of_labels_in_json(tmp_path: Path) -> None:
    for value in ({"labels": [["a.png", 3], ["b/c.png", 0]]}, {"a.png": "3", "b/c.png": 0}):
        (tmp_path / "dataset.json").write_text(json.dumps(value))
        assert read_labels_file(tmp_path / "dataset.json") == {"a.png": "3", "b/c.png": "0"}


def test_labels_of_a_flat_folder(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png", ".d.png"):
        (folder / name).write_bytes(CONTENTS[0][1])
    (tmp_path / "labels").write_text("c.png 10\na.png 2\nz.png 0\n")
    source = open_pictures(folder, labels_file=tmp_path / "labels")
    assert source.names == ["a.png", "c.png"]
    assert source.labels.tolist() == [2, 10]
    assert source.classes == [str(number) for number in range(11)], "numbers are labels already"
    assert source.left_out == "left out: 1 hidden, 1 label without a picture, 1 picture without a label"
    for text, words in (
        ("a.png", "expected a name and a class on each line"),
        ("a.png,1,2", "expected a name and a class on each line"),
        ("x.png 1", r"names none of the 3 pictures in .*flat"),
        ('{"labels": 3', "not a readable file of labels"),
    ):
        (tmp_path / "labels").write_text(text)
        with pytest.raises(ValueError, match=f"labels: {words}"):
            open_pictures(folder, labels_file=tmp_path / "labels")


# ---------------------------------------------------------------------------------------------------------------
# Shards


def test_what_a_shard_holds_besides_pictures(tmp_path: Path) -> None:
    picture = CONTENTS[0][1]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "__MACOSX/x.png", picture)
        add(archive, "data/._1.png", picture)
        add(archive, "data", b"", type=tarfile.DIRTYPE)
        add(archive, "data/link.png", b"", type=tarfile.SYMTYPE, linkname="1.png")
        add(archive, "data/1.v2.PNG", picture)  # the extension is what follows the first dot
        add(archive, "data/1.png", picture)
        add(archive, "data/1.jpg", picture)
        add(archive, "data/1.json", b"{}")
        add(archive, "data/2.cls", b"7\n")
        add(archive, "data/2.JPG", CONTENTS[1][1])
    with pytest.raises(ValueError, match=r"a\.tar: data/1\.png: expected a \.cls file beside it, as others have"):
        ShardSource([tmp_path / "a.tar"])
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        add(archive, "data/3.bmp", CONTENTS[5][1])
        add(archive, "data/3.cls", b"0")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name in ("1.png", "2.png"):
            add(archive, name, picture)
    source = ShardSource([tmp_path / "b.tar"])
    assert source.classes == ["0"]
    assert source.labels.tolist() == [0, 0], "without any .cls there is one class"
    write_shard(tmp_path / "c.tar", [("x/2.JPG", CONTENTS[1][1], 7)])
    with tarfile.open(tmp_path / "c.tar", "a") as archive:
        add(archive, "__MACOSX/x.png", picture)
        add(archive, "x/3.png", picture)
        add(archive, "x/3.jpg", picture)
        add(archive, "x/3.cls", b"1")
        add(archive, "x/3.json", b"{}")
    source = ShardSource([tmp_path / "c.tar"])
    assert source.names == ["x/2.JPG", "x/3.png"]
    assert source.labels.tolist() == [7, 1]
    assert source.left_out == "left out: 1 .json, 1 further picture of a sample, 1 hidden"
    with pytest.raises(ValueError, match="classes: expected 8 names or more, got 2"):
        ShardSource([tmp_path / "c.tar"], classes=["a", "b"])


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", CONTENTS[:3]).read_bytes()
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        add(archive, "1.png", CONTENTS[0][1])
    for name, content in {"cut": whole[: len(whole) // 3], "text": b"text" * 999, "empty": b""}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    for name in ("cut", "text", "z", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.tar: (not a readable \.tar file|no picture here)"):
            ShardSource([tmp_path / f"{name}.tar"])
    with pytest.raises(FileNotFoundError, match=r"none\.tar: no such file"):
        ShardSource([tmp_path / "none.tar"])
    write_shard(tmp_path / "b.tar", CONTENTS[:1])
    with pytest.raises(ValueError, match=r"b\.tar: 0\.png: expected each name once in all shards"):
        ShardSource([tmp_path / "a.tar", tmp_path / "b.tar"])
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        add(archive, "1.png", CONTENTS[0][1])
        add(archive, "1.cls", b"cat")
    with pytest.raises(ValueError, match=r"b\.tar: 1\.cls: expected the number of a class, got 'cat'"):
        ShardSource([tmp_path / "b.tar"])


def test_a_shard_that_was_written_meanwhile_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", CONTENTS)
    source = ShardSource([path])
    with path.open("ab") as file:
        file.write(bytes(10240))
    with pytest.raises(ValueError, match=r"a\.tar: 0\.png: the shard was written since it was opened"):
        source[0]


def test_the_index_is_kept_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_shard(tmp_path / "a.tar", CONTENTS[:4]), write_shard(tmp_path / "b.tar", CONTENTS[4:])]
    index = tmp_path / "kept" / "index.npz"
    first = ShardSource(paths, index=index)
    with monkeypatch.context() as patch:
        patch.setattr(shards.tarfile, "open", lambda *_: pytest.fail("indexed again"))
        again = ShardSource(paths, index=index)
    assert [again[number] for number in range(len(again))] == [first[number] for number in range(len(first))]
    assert again.left_out == first.left_out
    write_shard(tmp_path / "b.tar", [("9.png", CONTENTS[0][1], 0)])
    os.utime(tmp_path / "b.tar", ns=(1, 1))
    assert len(ShardSource(paths, index=index)) == 5
    index.write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"index\.npz: not a readable \.npz file"):
        ShardSource(paths, index=index)


def test_names_of_shards(tmp_path: Path) -> None:
    for name in ("t-08.tar", "t-09.tar", "t-10.tar", ".hidden.tar"):
        write_shard(tmp_path / name, CONTENTS[:1])
    names = [path.name for path in find_shards(f"{tmp_path}/t-{{08..10}}.tar")]
    assert names == ["t-08.tar", "t-09.tar", "t-10.tar"]
    assert [path.name for path in find_shards(str(tmp_path))] == names
    assert find_shards(f"{tmp_path}/t-08.tar") == [tmp_path / "t-08.tar"]
    (tmp_path / "a.png").write_bytes(CONTENTS[0][1])
    source = open_pictures(tmp_path)
    assert source.names == ["a.png"], "a folder with pictures is a folder of pictures"
    assert source.left_out == "left out: 3 .tar, 1 hidden"


def test_a_pattern_is_not_a_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "t-0.tar", CONTENTS[:2])
    write_shard(tmp_path / "t-1.tar", CONTENTS[2:])
    source = open_pictures(f"{tmp_path}/t-{{0..1}}.tar")
    assert len(source) == len(CONTENTS)
    assert source.where == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"t-2\.tar: no such file"):
        open_pictures(f"{tmp_path}/t-{{0..2}}.tar")


def test_options_of_another_kind_of_source_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", CONTENTS)
    with pytest.raises(ValueError, match=r"--labels: expected other pictures than those of .*a.tar"):
        open_pictures(tmp_path / "a.tar", labels_file="labels")
    by_folder(tmp_path)
    with pytest.raises(ValueError, match=r"--index: expected other pictures than those of .*photos"):
        open_pictures(tmp_path / "photos", index="index.npz")
    with pytest.raises(ValueError, match="--classes: expected other pictures than those of hf:photos"):
        open_pictures("hf:photos", classes="natural")


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face


def test_huggingface_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"titok-kernels\[hf\]"):
        open_pictures("hf:folder")


def test_splits_and_columns_of_huggingface(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = by_huggingface(tmp_path)
    assert source.left_out == "left out: the columns text"
    assert source.names[3] == "00000003"
    assert [open_pictures(f"hf:{tmp_path}/hf:test")[i].content for i in (0, 1)] == [CONTENTS[1][1], CONTENTS[0][1]]
    with pytest.raises(ValueError, match=r"expected a split, as in .*:train; there are train, test"):
        open_pictures(f"hf:{tmp_path}/hf")
    with pytest.raises(ValueError, match="there are train, test"):
        open_pictures(f"hf:{tmp_path}/hf:valid")
    datasets.Dataset.from_dict({"label": [1]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="expected a column of images, got label"):
        open_pictures(f"hf:{tmp_path}/numbers")
    rows = {"picture": [{"bytes": CONTENTS[0][1], "path": None}] * 2, "label": [3, 0]}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int32")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "plain"))
    source = open_pictures(f"hf:{tmp_path}/plain")
    assert source.classes == ["0", "1", "2", "3"]
    assert source.labels.tolist() == [3, 0]
