"""What commands write: never over an input, never over a file that exists unless --overwrite is given."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cli_runner import refused, titok

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _inputs(models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder: the folder photos, cat.png, tokens.npz, and the models tok and gen."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    shutil.copy(photos / "a.png", "cat.png")
    shutil.copytree(models / "tokenizer", "tok")
    shutil.copytree(models / "generator", "gen")
    titok("tokenize", "photos", "-t", "tok", "-o", "tokens.npz")
    Path("link.png").symlink_to("cat.png")
    Path("hard.png").hardlink_to("cat.png")
    Path("linked").symlink_to("photos")


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}


MODELS = ("-t", "tok", "-g", "gen")
COLLISIONS = [
    ("reconstruct", "cat.png", "-t", "tok", "-o", "cat.png"),
    ("reconstruct", "cat.png", "-t", "tok", "-o", "."),
    ("reconstruct", "cat.png", "-t", "tok", "-o", "photos/../cat.png"),
    ("reconstruct", "cat.png", "-t", "tok", "-o", "link.png"),
    ("reconstruct", "cat.png", "-t", "tok", "-o", "hard.png"),
    ("reconstruct", "link.png", "-t", "tok", "-o", "cat.png"),
    ("reconstruct", "photos", "-t", "tok", "-o", "photos"),
    ("reconstruct", "photos", "-t", "tok", "-o", "photos/a.png"),
    ("reconstruct", "photos", "-t", "tok", "-o", "photos/pairs"),
    ("reconstruct", "photos", "-t", "tok", "-o", "linked"),
    ("reconstruct", "photos", "-t", "tok", "-o", "linked/pairs"),
    ("reconstruct", "linked", "-t", "tok", "-o", "photos"),
    ("reconstruct", "photos/cats", "-t", "tok", "-o", "photos"),
    ("tokenize", "photos", "-t", "tok", "-o", "photos/tokens.npz"),
    ("tokenize", "photos", "-t", "tok", "-o", "tok/model.safetensors"),
    ("tokenize", "photos", "-t", "tok/model.safetensors", "-o", "tok/model.safetensors"),
    ("tokenize", ".", "-t", "tok"),
    ("detokenize", "tokens.npz", "-t", "tok", "-o", "."),
    ("detokenize", "tokens.npz", "-t", "tok", "-o", "tok"),
    ("generate", *MODELS, "-o", "gen/samples.png"),
    ("generate", *MODELS, "-o", "out.png", "-o", "tok/samples.npz"),
    ("train", "tokenizer", "photos", "-o", "photos"),
    ("train", "tokenizer", "photos/cats", "-o", "photos"),
    ("train", "generator", "photos/cats", "-t", "tok", "-o", "tok"),
]


@pytest.mark.parametrize("arguments", COLLISIONS, ids=" ".join)
def test_an_output_that_touches_an_input_is_refused(arguments: tuple[str, ...]) -> None:
    before = contents()
    flags = [()] if arguments[0] == "train" else [(), ("--overwrite",)]
    for flag in flags:
        assert refused(*arguments, *flag).startswith("--output: expected a place apart from all inputs, but ")
    assert contents() == before


def test_a_picture_behind_a_link_is_an_input_too() -> None:
    """The folder of links lies elsewhere, so only the files themselves tell that the output is an input."""
    Path("links").mkdir()
    for name in ("a.png", "b.png"):
        Path("links", name).symlink_to(Path("photos", name).resolve())
    before = contents()
    message = refused("reconstruct", "links", "-t", "tok", "-o", "photos", "--overwrite")
    assert message == "--output: expected a place apart from all inputs, but photos/a.png is the input links/a.png"
    assert contents() == before


WRITERS = [
    (("reconstruct", "cat.png", "-t", "tok", "-o", "new/x.png"), "x.png"),
    (("reconstruct", "photos", "-t", "tok", "-o", "new"), "cats/a.png"),
    (("tokenize", "photos", "-t", "tok", "-o", "new/x.npz"), "x.npz"),
    (("tokenize", "photos", "-t", "tok", "-o", "new/x.safetensors"), "x.safetensors"),
    (("detokenize", "tokens.npz", "-t", "tok", "-o", "new"), "cats/a.png"),
    (("generate", *MODELS, "-o", "new/x.png"), "x.png"),
    (("generate", *MODELS, "-o", "new/x.npz"), "x.npz"),
]


@pytest.mark.parametrize(("arguments", "file"), WRITERS, ids=[" ".join(arguments) for arguments, _ in WRITERS])
def test_a_file_that_exists_needs_overwrite(arguments: tuple[str, ...], file: str) -> None:
    path = Path("new", file)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"somebody's")
    assert refused(*arguments) == f"{path}: exists already; --overwrite replaces what exists"
    assert path.read_bytes() == b"somebody's"
    titok(*arguments, "--overwrite")
    written = path.read_bytes()
    assert written != b"somebody's"
    error = refused(*arguments)
    assert "exists already; --overwrite replaces what exists" in error
    assert path.read_bytes() == written
    path.unlink()
    path.symlink_to("nowhere")  # a broken link is somebody's file as well
    assert "exists already" in refused(*arguments)
    path.unlink()
    path.mkdir()
    assert "expected a file, got a folder" in refused(*arguments, "--overwrite")


def test_other_files_of_an_output_folder_stay() -> None:
    Path("new").mkdir()
    Image.new("RGB", (4, 4)).save("new/other.png")
    before = Path("new/other.png").read_bytes()
    titok("reconstruct", "photos", "-t", "tok", "-o", "new")
    assert Path("new/other.png").read_bytes() == before
    assert len(os.listdir("new")) == 5


def test_a_stopped_set_goes_on_without_overwrite() -> None:
    """A run may be stopped after its file is in place and before its parts are removed."""
    titok("generate", *MODELS, "-o", "a.npz")
    Path("a.npz.parts").mkdir()
    titok("generate", *MODELS, "-o", "a.npz")
    assert not Path("a.npz.parts").exists()
    assert "a.npz: exists already" in refused("generate", *MODELS, "-o", "a.npz")
