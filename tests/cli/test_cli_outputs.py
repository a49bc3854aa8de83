"""What commands write: never over an input, never over a file that exists unless --overwrite is given."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli_runner import pixels, refused, titok
from titok import Pipeline, TiTok
from titok.cli.commands import app
from titok.training.folder import RunFolder

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


# ---------------------------------------------------------------------------------------------------------------
# Names of outputs


@pytest.mark.parametrize("name", ["r.png", "r.PNG", "r.jpg", "r.JPeG", "r.webp"])
@pytest.mark.parametrize("source", ["cat.png", "photos"])
def test_the_suffix_in_any_case_decides_the_format(name: str, source: str) -> None:
    titok("reconstruct", source, "-t", "tok", "-o", name)
    with Image.open(name) as picture:
        assert picture.format == {".jpg": "JPEG", ".jpeg": "JPEG"}.get(
            Path(name).suffix.lower(), Path(name).suffix[1:].upper()
        )
        assert picture.size == ((50, 16) if source == "cat.png" else (3 * 50 + 2 * 8, 2 * 16 + 8))


def test_upper_case_tokens_and_sets() -> None:
    for name in ("T.NPZ", "T.SafeTensors"):
        titok("tokenize", "photos", "-t", "tok", "-o", name)
        assert titok("detokenize", name, "-t", "tok", "-o", f"from {Path(name).suffix[1:]}")[-1].endswith(
            "5 pictures"
        )
    titok("generate", *MODELS, "-o", "A.NPZ", "-o", "A.PNG")
    with np.load("A.NPZ") as file:
        assert file["arr_0"].shape == (16, 16, 24, 3)
    assert pixels(Path("A.PNG")).shape[-1] == 3


@pytest.mark.parametrize("name", ["r.gif", "r.TIFF", "r.npz"])
def test_a_folder_with_the_name_of_a_file_is_taken_for_a_mistake(name: str) -> None:
    expected = f"{name}: expected the name of a folder, got one that ends in {Path(name).suffix}"
    assert refused("reconstruct", "photos", "-t", "tok", "-o", name) == expected
    assert refused("detokenize", "tokens.npz", "-t", "tok", "-o", name) == expected
    assert refused("train", "tokenizer", "photos", "-o", name) == expected
    Path(name).mkdir()
    titok("detokenize", "tokens.npz", "-t", "tok", "-o", name)


LONG = ["y" * 251 + ".png", "y" * 251 + ".bmp", "z" * 252 + ".bw", "é" * 125 + ".jpg", "é" * 125 + ".bmp"]


@pytest.mark.parametrize("names", [LONG[:1], LONG], ids=["one", "twins"])
def test_names_that_can_be_read_can_be_written(names: list[str]) -> None:
    """Also where the name of a PNG would be longer than that of the picture, which is as long as the disk takes."""
    Path("long").mkdir()
    with Image.open("cat.png") as picture:
        for name in names:
            picture.save(Path("long", name), format="PNG")
    titok("tokenize", "long", "-t", "tok", "-o", "t.npz")
    titok("detokenize", "t.npz", "-t", "tok", "-o", "decoded")
    titok("reconstruct", "long", "-t", "tok", "-o", "pairs")
    written = os.listdir("decoded")
    assert len(written) == len(os.listdir("pairs")) == len(np.load("t.npz")["names"])
    assert all(name.endswith(".png") for name in written)


def test_a_file_may_have_the_longest_name() -> None:
    stem = "x" * 251
    titok("reconstruct", "cat.png", "-t", "tok", "-o", f"{stem}.png")
    titok("tokenize", "photos", "-t", "tok", "-o", f"{stem}.npz")


def test_a_name_is_a_file_and_a_folder() -> None:
    Path("both/a.png").mkdir(parents=True)
    shutil.copy("cat.png", "both/a.jpg")
    shutil.copy("cat.png", "both/a.png/b.png")
    titok("reconstruct", "both", "-t", "tok", "-o", "pairs")
    assert sorted(os.listdir("pairs")) == ["a.jpg.png", "a.png"]


@pytest.mark.slow
def test_what_cannot_be_written_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiTok, "encode", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr(Pipeline, "generate", lambda *_: pytest.fail("the work began"))
    Path("file").touch()
    Path("afile").mkdir()
    Path("afile/cats").touch()
    for path in ("file/x", "x" * 256, "new/" + "x" * 256 + "/x"):
        refused("reconstruct", "photos", "-t", "tok", "-o", path)
        refused("tokenize", "photos", "-t", "tok", "-o", f"{path}.npz")
        refused("generate", *MODELS, "-o", f"{path}.png")
        refused("generate", *MODELS, "-o", f"{path}.npz")
        refused("detokenize", "tokens.npz", "-t", "tok", "-o", path)
    refused("generate", *MODELS, "-o", "x" * 251 + ".npz")  # its folder of parts would have a name too long
    refused("reconstruct", "photos", "-t", "tok", "-o", "afile")  # afile/cats should be a folder

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", no_space)
    assert refused("tokenize", "photos", "-t", "tok", "-o", "t.npz").endswith(
        "cannot be written (Read-only file system)"
    )


def test_a_link_as_output_stays_a_link_with_the_mode_of_its_target() -> None:
    Path("real.npz").touch(0o600)
    Path("link.npz").symlink_to("real.npz")
    titok("tokenize", "photos", "-t", "tok", "-o", "link.npz", "--overwrite")
    assert Path("link.npz").is_symlink()
    assert Path("real.npz").stat().st_mode & 0o777 == 0o600
    assert len(np.load("real.npz")["tokens"]) == 5


def test_grey_sets_are_rgb(models: Path) -> None:
    """Tools that compute FID read three channels."""
    grey = ("-t", models / "grey", "-g", "gen", "--num", 4)
    titok("generate", *grey, "-o", "s.npz", "-o", "s.png")
    titok("generate", *grey, "-o", "alone.png")
    with np.load("s.npz") as file:
        pictures = file["arr_0"]
    assert pictures.shape == (4, 8, 8, 3)
    assert (pictures == pictures[..., :1]).all()
    assert np.array_equal(pixels(Path("alone.png"))[:8, :8], pictures[0, ..., 0])
    assert np.array_equal(pixels(Path("alone.png")), pixels(Path("s.png")))


TRAINED = "run/training.safetensors"
TRAIN = ("--width", "64", "--layers", "1", "--batch-size", "2", "--steps", "2")


@pytest.mark.parametrize(
    ("arguments", "file", "limit"),
    [
        (("tokenize", "photos", "-t", "tok", "-o", "t.npz"), "t.npz", 300),
        (("tokenize", "photos", "-t", "tok", "-o", "t.npz"), "t.npz", 1100),
        (("tokenize", "photos", "-t", "tok", "-o", "t.safetensors"), "t.safetensors", 300),
        (("detokenize", "tokens.npz", "-t", "tok", "-o", "new"), "new/a.png", 300),
        (("reconstruct", "photos", "-t", "tok", "-o", "r.jpg"), "r.jpg", 300),
        (("reconstruct", "photos", "-t", "tok", "-o", "new"), "new/a.png", 300),
        (("generate", *MODELS, "-o", "s.png"), "s.png", 300),
        (("generate", *MODELS, "-o", "s.npz"), "s.npz.parts/settings.json", 300),
        (("generate", *MODELS, "-o", "s.npz"), "s.npz.parts/000000000000-000000000016.u8", 3000),
        (("generate", *MODELS, "-o", "s.npz"), "s.npz", 18_600),
        (("generate", *MODELS, "-o", "s.npz"), "s.npz", 18_900),
        (("train", "tokenizer", "photos/cats/old", "-o", "run", "--image-size", "16", *TRAIN), TRAINED, 10_000),
        (("train", "generator", "photos/cats/old", "-t", "tok", "-o", "run", *TRAIN), TRAINED, 10_000),
    ],
)
def test_a_file_that_cannot_be_completed_is_named(arguments: tuple[str, ...], file: str, limit: int) -> None:
    """A limit of the size of files takes the place of a full disk: Python ignores the signal, and writing fails."""
    before = contents()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith(f"error: {file}: "), errors
    assert "File too large" in errors[0]
    left = {
        name: content
        for name, content in contents().items()
        # Finished parts and finished tokens stay, so that the same command goes on with them.
        if not re.search(r"\.parts/|training\.tokens/", name) and Path(name).name != "metrics.jsonl"
    }
    assert left == before
    assert not list(Path.cwd().rglob(".titok-*"))
    titok(*arguments)


def test_training_shows_no_progress_bar_where_stderr_is_no_terminal() -> None:
    small = ("--width", 64, "--layers", 1, "--batch-size", 2, "--steps", 2, "--image-size", 16, "--tokens", 4)
    arguments = ["train", "tokenizer", "photos/cats/old", "-o", "run", *small]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["tokenizer", "generator"])
def test_training_locks_its_folder_before_it_reads_a_picture(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*_: Any) -> None:
        with pytest.raises(ValueError, match="run: another training run is at work here"):
            RunFolder("run", resume=False)
        raise ValueError("checked")

    monkeypatch.setattr("titok.data.folders.Pictures.find_unreadable", reads)
    options = ["-t", "tok"] if command == "generator" else []
    arguments = ["train", command, "photos/cats/old", *options, "-o", "run"]
    assert refused(*arguments) == "checked"
    monkeypatch.setattr("titok.data.folders.Pictures.find_unreadable", lambda *_: pytest.fail("read"))
    with RunFolder("run", resume=False):
        assert refused(*arguments) == "run: another training run is at work here"
    Path("run").mkdir()
    Path("run/training.safetensors").touch()
    assert refused(*arguments).startswith(
        "run: a training run is here already: resume it, or choose another folder"
    )
    Path("run/training.safetensors").rename("run/model.safetensors")
    assert refused(*arguments).startswith("run/model.safetensors: exists already, and no training run is there")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra 'quickstart'")
def test_two_quickstarts_in_one_folder() -> None:
    """The second one does not remove the checkpoint of the first one, which is at work."""
    Path("run/tokenizer").mkdir(parents=True)
    Path("run/tokenizer/training.safetensors").touch()
    with RunFolder("run/tokenizer", resume=True):
        assert refused("quickstart", "-o", "run") == "run/tokenizer: another training run is at work here"
    assert Path("run/tokenizer/training.safetensors").exists()
