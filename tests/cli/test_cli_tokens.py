"""`titok tokenize` and `titok detokenize`: the files that they write and read, and the errors they raise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli_runner import NAMES, SIZE, load, pixels, refused, titok
from titok.cli.commands import app
from titok.data.images import read_image, to_uint8
from titok.data.tokens import read_tokens
from titok.data.tokens import write_tokens as write_token_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tokens_file_holds_what_the_model_says(models: Path, photos: Path) -> None:
    model = load(models, "tokenizer")
    want = model.encode(torch.stack([read_image(photos / name, SIZE) for name in NAMES]))
    assert len(want.unique(dim=0)) > 3, "different pictures must have different tokens"
    for batch_size in (1, 2, 16):
        output = ("-o", "new/tokens.npz", "--overwrite")
        lines = titok("tokenize", photos, "-t", models / "tokenizer", *output, "--batch-size", batch_size)
        assert lines == ["new/tokens.npz: 5 pictures, 4 tokens each"]
        with np.load("new/tokens.npz", allow_pickle=False) as file:
            assert file["names"].tolist() == NAMES
            assert file["tokens"].dtype == np.int32
            assert file["tokens"].tolist() == want.tolist()
    titok("tokenize", photos, "-t", models / "tokenizer", "-o", "tokens.safetensors")
    with safetensors.safe_open("tokens.safetensors", framework="np") as file:
        assert file.get_tensor("tokens").tolist() == want.tolist()
        assert json.loads(file.metadata()["names"]) == NAMES


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("kind", ["tokenizer", "vae"])
def test_tokenize_and_detokenize(kind: str, suffix: str, models: Path, photos: Path) -> None:
    model = load(models, kind)
    printed = titok("tokenize", photos, "-t", models / kind, "-o", f"t{suffix}")
    assert printed == [f"t{suffix}: 5 pictures, {'4 x 4 latents' if kind == 'vae' else '4 tokens'} each"]
    assert titok("detokenize", f"t{suffix}", "-t", models / kind, "-o", "out", "--batch-size", 2) == [
        "out: 5 pictures"
    ]
    written = sorted(p.relative_to("out").as_posix() for p in Path("out").rglob("*.*"))
    assert written == ["a.png", "b.png", "cats/a.png", "cats/old/c.png", "d.png"]
    for name in NAMES:
        image = read_image(photos / name, SIZE)[None]
        want = to_uint8(model.decode(model.encode(image)))[0].numpy().astype(int)
        assert np.abs(pixels(Path("out", name).with_suffix(".png")) - want).max() <= 1


def test_rounding_is_passed_on(models: Path, photos: Path) -> None:
    titok("tokenize", photos / "a.png", "-t", models / "tokenizer")
    titok("detokenize", "tokens.npz", "-t", models / "tokenizer")
    titok("detokenize", "tokens.npz", "-t", models / "tokenizer", "-o", "cut", "--rounding", "truncate")
    nearest, truncated = pixels(Path("decoded/a.png")).astype(int), pixels(Path("cut/a.png"))
    assert set(np.unique(nearest - truncated)) == {0, 1}


def test_grey_pictures(models: Path, photos: Path) -> None:
    titok("tokenize", photos, "-t", models / "grey")
    titok("detokenize", "tokens.npz", "-t", models / "grey")
    assert pixels(Path("decoded/b.png")).shape == (8, 8)


def test_bfloat16_reads_what_float32_wrote(models: Path, photos: Path) -> None:
    for kind in ("tokenizer", "vae"):
        titok("tokenize", photos, "-t", models / kind, "-o", f"{kind}.npz")
        titok("detokenize", f"{kind}.npz", "-t", models / kind, "--dtype", "bfloat16", "-o", kind)


def test_names_that_differ_by_suffix_alone(models: Path, photos: Path) -> None:
    Path("twins").mkdir()
    for name in ("a.png", "a.bmp"):
        Image.open(photos / "b.png").save(Path("twins", name))
    titok("tokenize", "twins", "-t", models / "tokenizer")
    titok("detokenize", "tokens.npz", "-t", models / "tokenizer", "-o", "out")
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.bmp.png", "a.png.png"]


def test_damaged_picture(models: Path, photos: Path) -> None:
    Path("mixed").mkdir()
    whole = (photos / "b.png").read_bytes()
    for name, content in {"a.png": whole, "b.png": whole[:500], "c.jpg": b"", "d.png": whole}.items():
        Path("mixed", name).write_bytes(content)
    assert refused("tokenize", "mixed", "-t", models / "tokenizer").startswith(
        "mixed/b.png: not a readable picture"
    )
    arguments = ["tokenize", "mixed", "-t", str(models / "tokenizer"), "--skip-unreadable", "--overwrite"]
    for batch_size in ("1", "2", "16"):
        result = CliRunner().invoke(app, [*arguments, "--batch-size", batch_size])
        assert result.stdout == "tokens.npz: 2 pictures (2 left out), 4 tokens each\n"
        assert [line.split(":")[0] for line in sorted(result.stderr.splitlines())] == [
            "mixed/b.png",
            "mixed/c.jpg",
        ]
        with np.load("tokens.npz") as file:
            assert file["names"].tolist() == ["a.png", "d.png"]
            assert file["tokens"][0].tolist() == file["tokens"][1].tolist()
    Path("mixed/a.png").unlink()
    Path("mixed/d.png").unlink()
    Path("tokens.npz").unlink()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.endswith("error: mixed: none of its pictures is readable\n")
    assert not Path("tokens.npz").exists()


def test_tokenize_refuses(models: Path, photos: Path) -> None:
    model = models / "tokenizer"
    assert refused("tokenize", photos / "none", "-t", model) == f"{photos}/none: no such file or folder"
    Path("empty").mkdir()
    assert refused("tokenize", "empty", "-t", model).startswith("empty: no picture here (looked for .apng, ")
    assert "notes.txt: not a readable picture" in refused("tokenize", photos / "notes.txt", "-t", model)
    assert "got a 'MaskGIT'" in refused("tokenize", photos, "-t", models / "generator")
    assert refused("tokenize", photos, "-t", "empty").startswith("empty: neither of model.safetensors")
    wanted = "expected a name that ends in .npz or .safetensors or .jsonl or .tokens"
    assert refused("tokenize", photos, "-t", model, "-o", "tokens.txt") == f"tokens.txt: {wanted}"
    assert refused("tokenize", photos, "-t", model, "-o", "empty") == f"empty: {wanted}"
    Path("folder.npz").mkdir()
    assert (
        refused("tokenize", photos, "-t", model, "-o", "folder.npz") == "folder.npz: expected a file, got a folder"
    )
    assert refused("tokenize", photos, "-t", model, "--device", "tpu").startswith(
        "--device: expected auto or one of cpu"
    )
    assert "got 'int4'" in refused("tokenize", photos, "-t", model, "--dtype", "int4")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused("tokenize", photos, "-t", model, "--device", "cuda")


def test_tokens_of_another_model_are_refused(models: Path, photos: Path) -> None:
    titok("tokenize", photos, "-t", models / "tokenizer", "-o", "t.npz")
    titok("tokenize", photos, "-t", models / "vae", "-o", "v.npz")
    other_weights = "made by a tokenizer with other weights than the one given"
    assert refused("detokenize", "t.npz", "-t", models / "other") == f"t.npz: {other_weights}"
    assert "t.npz: tokens: expected shape (B, 5), got (5, 4)" in refused(
        "detokenize", "t.npz", "-t", models / "five_tokens"
    )
    assert "t.npz: expected an array 'latents'" in refused("detokenize", "t.npz", "-t", models / "vae")
    assert "v.npz: expected an array 'tokens'" in refused("detokenize", "v.npz", "-t", models / "tokenizer")


def write_tokens(path: str, **arrays: np.ndarray) -> None:
    if path.endswith(".npz"):
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["t.npz", "t.safetensors"])
def test_tokens_made_elsewhere(path: str, models: Path) -> None:
    tokens = np.array([[0, 1, 2, 15], [3, 3, 3, 3]])
    model, detokenize = models / "tokenizer", ("detokenize", path, "--overwrite", "-t")
    for dtype in (np.int64, np.uint16, np.uint8):
        write_tokens(path, tokens=tokens.astype(dtype))
        result = CliRunner().invoke(app, [*detokenize, str(model)])
        assert result.stderr == f"note: {path} does not tell which tokenizer made it\n"
        assert sorted(p.name for p in Path("decoded").iterdir()) == ["000000.png", "000001.png"]
    write_tokens(path, tokens=tokens[:0])
    assert titok(*detokenize, model) == ["decoded: 0 pictures"]
    write_tokens(path, tokens=tokens)
    assert refused(*detokenize, models / "eight_codes").startswith(
        f"{path}: tokens: expected ids in [0, 8), got 15"
    )
    write_tokens(path, tokens=tokens - 1)
    assert "got -1" in refused(*detokenize, model)
    write_tokens(path, tokens=tokens[0])
    assert "expected shape (B, 4), got (4,)" in refused(*detokenize, model)
    write_tokens(path, tokens=tokens / 2)
    assert "expected dtype int64, got float64" in refused(*detokenize, model)
    write_tokens(path, codes=tokens)
    assert refused(*detokenize, model).startswith(f"{path}: expected an array 'tokens'")
    latents = np.zeros((2, 4, 4), np.float32)
    latents[1, 2, 3] = np.nan
    write_tokens(path, latents=latents)
    assert refused(*detokenize, models / "vae").startswith(f"{path}: latents: expected finite values, got nan")


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i2", "uint16", "int32", ">i4", "uint32", "int64", ">u8"])
def test_tokens_of_every_integer_dtype(dtype: str, models: Path) -> None:
    tokens = np.array([[0, 1, 2, 15], [3, 3, 3, 3]])
    model = load(models, "tokenizer")
    np.savez("t.npz", tokens=tokens.astype(dtype))
    read = read_tokens("t.npz", model)
    assert read.tokens.dtype == torch.int64
    assert read.tokens.tolist() == tokens.tolist()
    if not dtype.startswith(">"):
        write_token_file("u.npz", torch.from_numpy(tokens.astype(dtype)), ["a", "b"], model)
        assert np.load("u.npz")["tokens"].tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_tokens_of_other_dtypes_are_refused(dtype: str, models: Path) -> None:
    tokens = np.ones((2, 4), dtype)
    model = load(models, "tokenizer")
    np.savez("t.npz", tokens=tokens)
    with pytest.raises(ValueError, match=r"t\.npz: tokens: expected dtype int64, got "):
        read_tokens("t.npz", model)
    with pytest.raises(TypeError, match="tokens: expected dtype int64, got "):
        write_token_file("u.npz", torch.from_numpy(tokens), ["a", "b"], model)


@pytest.mark.slow
def test_damaged_token_files(models: Path, photos: Path) -> None:
    model = models / "tokenizer"
    for path in ("t.npz", "t.safetensors"):
        assert refused("detokenize", path, "-t", model) == f"{path}: no such file"
        titok("tokenize", photos, "-t", model, "-o", path)
        whole = Path(path).read_bytes()
        for content in (b"", b"text", whole[: len(whole) // 2]):
            Path(path).write_bytes(content)
            assert refused("detokenize", path, "-t", model).startswith(
                f"{path}: not a readable {Path(path).suffix} file"
            )
    np.savez("t.npz", tokens=np.array([{"code": 1}]))  # an array of objects is stored as a pickle
    assert "t.npz: not a readable .npz file" in refused("detokenize", "t.npz", "-t", model)
    assert "expected a name that ends in" in refused("detokenize", "t.txt", "-t", model)


@pytest.mark.parametrize("name", ["../evil.png", "/tmp/evil.png", "a/../../evil.png", ""])
def test_names_that_leave_the_folder_are_refused(name: str, models: Path) -> None:
    np.savez("t.npz", tokens=np.zeros((1, 4), np.int64), names=np.array([name]))
    assert "names: expected paths below the output folder" in refused(
        "detokenize", "t.npz", "-t", models / "tokenizer"
    )


def test_names_must_match_the_tokens(models: Path) -> None:
    np.savez("t.npz", tokens=np.zeros((2, 4), np.int64), names=np.array(["a"]))
    assert "names: expected 2, one for each row of tokens, got 1" in refused(
        "detokenize", "t.npz", "-t", models / "tokenizer"
    )
    np.savez("t.npz", tokens=np.zeros((2, 4), np.int64), names=np.array(["a", "a"]))
    assert "names: expected one name for each picture" in refused(
        "detokenize", "t.npz", "-t", models / "tokenizer"
    )
    Path("file").touch()
    assert "file: expected a folder, got a file" in refused(
        "detokenize", "t.npz", "-t", models / "tokenizer", "-o", "file"
    )


def test_what_is_left_out_is_said_in_one_line(models: Path, photos: Path) -> None:
    Path("mixed/.hidden").mkdir(parents=True)
    for name in ("a.png", "b.ppm", "._a.png", ".hidden/c.png", "d.HEIC", "e.heic", "read me"):
        Image.open(photos / "b.png").save(Path("mixed", name), format="PNG")
    for command in ("tokenize", "reconstruct"):
        result = CliRunner().invoke(app, [command, "mixed", "-t", str(models / "tokenizer")])
        assert result.exit_code == 0
        assert result.stderr == "note: mixed: left out: 2 .heic, 1 file without a suffix, 2 hidden\n"
