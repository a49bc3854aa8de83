"""The command line, as a user meets it: files in, files out, one line for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from titok import Pipeline, TiTok, __version__
from titok.cli import app
from titok.config import TOKENIZER_PRESETS
from titok.images import read_image, to_uint8

Make = Callable[..., Any]
COMMANDS = [["tokenize"], ["detokenize"], ["reconstruct"], ["generate"], ["info"]]
SIZE = (16, 24)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def titok(*arguments: str | Path | int) -> list[str]:
    """Runs a command that must work; the lines that it prints."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refused(*arguments: str | Path | int) -> str:
    """Runs a command that must refuse its input, in one line and leaving no file; that line."""
    before = sorted(Path.cwd().rglob("*"))
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert sorted(Path.cwd().rglob("*")) == before
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("WARNING: ", "note: "))]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


@pytest.fixture(scope="session")
def models(tiny_tokenizer: Make, tiny_generator: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved: tokenizer, another, a VAE, generator."""
    folder = tmp_path_factory.mktemp("models")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_tokenizer(seed=1).save_pretrained(folder / "other")
    tiny_tokenizer(num_latent_tokens=5).save_pretrained(folder / "five_tokens")
    tiny_tokenizer(codebook_size=8).save_pretrained(folder / "eight_codes")
    tiny_tokenizer(bottleneck="vae").save_pretrained(folder / "vae")
    tiny_tokenizer(channels=1, image_size=(8, 8)).save_pretrained(folder / "grey")
    tiny_generator().save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of several sizes, two of them in sub-folders, and a text."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, shape in {"a.png": (16, 24), "b.png": (40, 33), "cats/a.png": (20, 50), "cats/old/c.jpg": (16, 24),
                        "d.bmp": (30, 30)}.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


NAMES = ["a.png", "b.png", "cats/a.png", "cats/old/c.jpg", "d.bmp"]


def load(models: Path, name: str) -> TiTok:
    return TiTok.from_pretrained(models / name).requires_grad_(False)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


# ---------------------------------------------------------------------------------------------------------------
# Help, version, errors


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_explains_every_option(command: list[str]) -> None:
    lines = titok(*command, "--help")
    assert any(line.strip().startswith(f"titok {' '.join(command)}") for line in lines), "no example"
    text = " ".join(lines)
    for parameter in [p for p in walk(command).params if p.name != "help"]:
        assert parameter.help, f"{parameter.name} is not explained"
        required = parameter.required or parameter.is_flag or parameter.default is None
        assert required or "[default:" in text


def walk(command: list[str]) -> Any:
    import typer.main

    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    return found


def test_every_command_is_tested_for_its_help() -> None:
    def leaves(command: Any, path: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", None)
        return [path] if inner is None else [leaf for name in inner for leaf in leaves(inner[name], [*path, name])]

    assert sorted(leaves(walk([]), [])) == sorted(COMMANDS)


def test_version_and_help_do_without_torch() -> None:
    """`titok --help` has to answer at once."""
    code = "import sys, titok.cli as cli; sys.argv[0] = 'titok'; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    for option, expected in (("--help", "Usage: titok"), ("--version", f"titok {__version__}")):
        run = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert run.stdout.startswith(expected)
        assert run.stdout.endswith("False\n")
        assert run.stderr == ""


def test_python_dash_m() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "titok", "tokenize", "nowhere", "-t", "x"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "error: nowhere: no such file or folder\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        CliRunner().invoke(app, ["--debug", "tokenize", "nowhere", "-t", "x"], catch_exceptions=False)


def test_unknown_options_and_missing_ones() -> None:
    for arguments in (["tokenize"], ["tokenize", "x"], ["paint"], ["generate", "--num", "0"], ["info", "--xml"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr


def test_interrupt(models: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TiTok, "encode", interrupted)
    result = CliRunner().invoke(app, ["tokenize", str(photos), "-t", str(models / "tokenizer")])
    assert result.exit_code == 130
    assert result.stderr == "interrupted: no file is half-written\n"
    assert not list(Path.cwd().iterdir())


@pytest.mark.slow
def test_control_c_in_the_middle_of_a_run(models: Path, tmp_path: Path) -> None:
    arguments = ["generate", "-t", models / "tokenizer", "-g", models / "generator", "--num", 10**6, "-o", "a.npz"]
    run = subprocess.Popen(
        [sys.executable, "-m", "titok", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size > 100_000 for p in tmp_path.iterdir()):  # pictures are being written
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert errors == "interrupted: no file is half-written\n"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------
# tokenize, detokenize


def test_tokens_file_holds_what_the_model_says(models: Path, photos: Path) -> None:
    model = load(models, "tokenizer")
    want = model.encode(torch.stack([read_image(photos / name, SIZE) for name in NAMES]))
    assert len(want.unique(dim=0)) > 3, "pictures must differ in their tokens"
    for batch_size in (1, 2, 16):
        lines = titok(
            "tokenize", photos, "-t", models / "tokenizer", "-o", "new/tokens.npz", "--batch-size", batch_size
        )
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
def test_there_and_back(kind: str, suffix: str, models: Path, photos: Path) -> None:
    model = load(models, kind)
    said = titok("tokenize", photos, "-t", models / kind, "-o", f"t{suffix}")
    assert said == [f"t{suffix}: 5 pictures, {'4 x 4 latents' if kind == 'vae' else '4 tokens'} each"]
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
        titok("tokenize", photos, "-t", models / kind)
        titok("detokenize", "tokens.npz", "-t", models / kind, "--dtype", "bfloat16")


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
    arguments = ["tokenize", "mixed", "-t", str(models / "tokenizer"), "--skip-unreadable"]
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
    assert refused("tokenize", "empty", "-t", model).startswith("empty: no picture here (looked for .bmp, ")
    assert "notes.txt: not a readable picture" in refused("tokenize", photos / "notes.txt", "-t", model)
    assert "got a 'MaskGIT'" in refused("tokenize", photos, "-t", models / "generator")
    assert refused("tokenize", photos, "-t", "empty").startswith("empty: neither of model.safetensors")
    wanted = "expected a name that ends in .npz or .safetensors"
    assert refused("tokenize", photos, "-t", model, "-o", "tokens.txt") == f"tokens.txt: {wanted}"
    assert refused("tokenize", photos, "-t", model, "-o", "empty") == f"empty: {wanted}"
    Path("folder.npz").mkdir()
    assert (
        refused("tokenize", photos, "-t", model, "-o", "folder.npz") == "folder.npz: expected a file, got a folder"
    )
    assert refused("tokenize", photos, "-t", model, "--device", "tpu").startswith(
        "--device: expected auto or one of cpu"
    )
    assert "got 'int8'" in refused("tokenize", photos, "-t", model, "--dtype", "int8")
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


@pytest.mark.parametrize("path", ["t.npz", "t.safetensors"])
def test_tokens_made_elsewhere(path: str, models: Path) -> None:
    tokens = np.array([[0, 1, 2, 15], [3, 3, 3, 3]])
    model, detokenize = models / "tokenizer", ("detokenize", path, "-t")
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
    np.savez("t.npz", tokens=np.array([{"code": 1}]))  # a pickle
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


# ---------------------------------------------------------------------------------------------------------------
# reconstruct


def ratio(pair: np.ndarray) -> float:
    """The PSNR of two pictures of 16x24 with a gap of 2 between."""
    left, right = pair[:, :24].astype(float), pair[:, 26:].astype(float)
    return float(10 * np.log10(255**2 / ((left - right) ** 2).mean()))


def test_reconstruct_one_png_each(models: Path, photos: Path) -> None:
    lines = titok("reconstruct", photos, "-t", models / "tokenizer", "-o", "pairs", "--batch-size", 2)
    pairs = [pixels(Path("pairs", name).with_suffix(".png")) for name in NAMES]
    for name, pair, line in zip(NAMES, pairs, lines, strict=False):
        assert pair.shape == (16, 50, 3)
        assert np.array_equal(pair[:, :24], to_uint8(read_image(photos / name, SIZE)).numpy())
        assert line == f"{ratio(pair):6.2f} dB  {name}"
    assert lines[5:] == [
        f"{np.mean([ratio(pair) for pair in pairs]):6.2f} dB  mean of 5",
        "pairs: originals left, reconstructions right",
    ]


def test_reconstruct_one_png_for_all(models: Path, photos: Path) -> None:
    titok("reconstruct", photos, "-t", models / "tokenizer", "-o", "pairs")
    titok("reconstruct", photos, "-t", models / "tokenizer", "-o", "all/of_them.png")
    picture = pixels(Path("all/of_them.png"))
    assert picture.shape == (2 * 16 + 8, 3 * 50 + 2 * 8, 3)
    for i, name in enumerate(NAMES):
        top, left = i // 3 * 24, i % 3 * 58
        got = picture[top : top + 16, left : left + 50].astype(int)
        assert np.abs(got - pixels(Path("pairs", name).with_suffix(".png"))).max() <= 1


def test_reconstruct_refuses(models: Path, photos: Path) -> None:
    Path("many").mkdir()
    for i in range(65):
        Path("many", f"{i}.png").symlink_to(photos / "a.png")
    assert "because 65 pictures are too many for one PNG (64)" in refused(
        "reconstruct", "many", "-t", models / "tokenizer"
    )


# ---------------------------------------------------------------------------------------------------------------
# generate


def generate(models: Path, *arguments: str | int) -> list[str]:
    return titok("generate", "-t", models / "tokenizer", "-g", models / "generator", *arguments)


def test_generate_writes_grid_and_adm_set(models: Path) -> None:
    lines = generate(
        models, "--labels", "2,0", "--per-class", 3, "--seed", 5, "-o", "out/a.png", "-o", "out/a.npz"
    )
    assert lines == [f"out/a.{suffix}: 6 pictures of 2 classes, seed 5" for suffix in ("png", "npz")]
    pipe = Pipeline.from_pretrained(models / "tokenizer", models / "generator")
    want = pipe([2, 2, 2, 0, 0, 0], seed=5).numpy()
    with np.load("out/a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], want)
        assert file["arr_1"].tolist() == [2, 2, 2, 0, 0, 0]
    grid = pixels(Path("out/a.png"))
    assert grid.shape == (2 * 16 + 2, 3 * 24 + 4, 3), "one row a class"
    for i, picture in enumerate(want):
        top, left = i // 3 * 18, i % 3 * 26
        assert np.array_equal(grid[top : top + 16, left : left + 24], picture)


def arrays(path: str = "a.npz") -> tuple[np.ndarray, list[int]]:
    with np.load(path) as file:
        return file["arr_0"].astype(int), file["arr_1"].tolist()


def test_batch_size_changes_nothing_and_runs_can_be_cut(models: Path) -> None:
    generate(models, "--num", 7, "-o", "a.npz")
    whole, labels = arrays()
    assert labels == [0, 1, 2, 0, 1, 2, 0]
    for batch_size in (1, 3):
        generate(models, "--num", 7, "-o", "b.npz", "--batch-size", batch_size)
        assert np.abs(arrays("b.npz")[0] - whole).max() <= 1  # the same tokens; pixels rounded from other batches
    generate(models, "--labels", "2,0,1,2,0", "--first-sample", 2, "-o", "c.npz")
    assert np.abs(arrays("c.npz")[0] - whole[2:]).max() <= 1
    generate(models, "--num", 7, "--seed", 1, "-o", "d.npz")
    assert np.abs(arrays("d.npz")[0] - whole).max() > 5


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        ((), [0, 1, 2] * 5 + [0]),
        (("--num", 4), [0, 1, 2, 0]),
        (("--per-class", 2), [0, 0, 1, 1, 2, 2]),
        (("--labels", "2,1"), [2, 1]),
        (("--labels", "2,1", "--num", 3), [2, 1, 2]),
        (("--labels", "1", "--per-class", 3), [1, 1, 1]),
        (("--labels", "3"), [3]),  # one past the last: the class dropped
    ],
)
def test_which_classes(arguments: tuple[Any, ...], labels: list[int], models: Path) -> None:
    generate(models, *arguments, "--steps", 1, "-o", "a.npz")
    pictures, got = arrays()
    assert got == labels
    assert len(pictures) == len(labels)


@pytest.mark.parametrize(
    "option",
    [("--steps", 1), ("--guidance-scale", 40), ("--guidance-schedule", "constant"), ("--temperature", 0),
     ("--no-softmax-annealing",), ("--mask-schedule", "square"), ("--confidence", "maskgit"),
     ("--rounding", "truncate")],
)  # fmt: skip
def test_every_sampling_option_reaches_the_sampler(option: tuple[Any, ...], models: Path) -> None:
    generate(models, "--num", 12, "-o", "a.npz")
    generate(models, "--num", 12, "-o", "b.npz", *option)
    assert not np.array_equal(arrays("a.npz")[0], arrays("b.npz")[0])


def test_guidance_power(models: Path) -> None:
    for name, power in (("a", 1), ("b", 9)):
        schedule = ("--guidance-schedule", "power-cosine", "--guidance-scale", 30)
        generate(models, "--num", 12, "-o", f"{name}.npz", *schedule, "--guidance-power", power)
    assert not np.array_equal(arrays("a.npz")[0], arrays("b.npz")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "0,4"), "labels: expected classes in [0, 3], got 4"),
        (("--labels", "-1"), "labels: expected classes in [0, 3], got -1"),
        (("--labels", "cat"), "--labels: expected integers with commas between, got 'cat'"),
        (("--labels", ""), "--labels: expected integers with commas between, got ''"),
        (("--num", 2, "--per-class", 2), "--per-class, --num: expected one of them, got both"),
        (("--num", 1025), "samples.png: expected 1024 pictures at most, got 1025: write a .npz"),
        (("--steps", 0), "SamplingConfig.steps: expected an int >= 1, got 0"),
        (("--temperature", -1), "SamplingConfig.temperature: expected a finite number >= 0, got -1.0"),
        (("--guidance-scale", "nan"), "SamplingConfig.guidance_scale: expected a finite number >= 0, got nan"),
        (("--mask-schedule", "sine"), "SamplingConfig.mask_schedule: expected one of"),
        (("--confidence", "mine"), "SamplingConfig.confidence: expected one of"),
        (("--rounding", "up"), "--rounding: expected nearest or truncate, got 'up'"),
        (("-o", "samples.jpg"), "samples.jpg: expected a name that ends in .png or .npz"),
        (("--seed", 2**64), "seed: expected an int in [0, 2^64)"),
    ],
)
def test_generate_refuses(arguments: tuple[Any, ...], message: str, models: Path) -> None:
    said = refused("generate", "-t", models / "tokenizer", "-g", models / "generator", *arguments)
    assert said.startswith(message)


def test_generate_refuses_a_pair_that_does_not_fit(models: Path) -> None:
    for tokenizer, message in (
        ("five_tokens", "tokenizer: expected 4 tokens of 16 codes, as the generator, got 5 of 16"),
        ("vae", "tokenizer: expected a vector-quantised one"),
    ):
        assert refused("generate", "-t", models / tokenizer, "-g", models / "generator").startswith(message)


def test_generate_leaves_nothing_when_it_fails(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails_later(self: TiTok, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 2:
            raise OSError("No space left on device")
        return torch.zeros(len(tokens), 3, *SIZE)

    monkeypatch.setattr(TiTok, "decode", fails_later)
    arguments = ("generate", "-t", models / "tokenizer", "-g", models / "generator", "--batch-size", 4)
    assert refused(*arguments, "-o", "a.npz", "-o", "a.png") == "No space left on device"
    assert calls == [4, 4]


def test_presets_have_random_weights_and_say_so(
    models: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENIZER_PRESETS, "tiny", load(models, "tokenizer").config)
    results = [
        CliRunner().invoke(app, ["reconstruct", str(photos), "-t", "preset:tiny", "-o", f"{i}.png"]) for i in "12"
    ]
    for result in results:
        assert result.exit_code == 0
        assert result.stderr.startswith("WARNING: preset:tiny has random weights")
    assert np.array_equal(pixels(Path("1.png")), pixels(Path("2.png"))), "random, but the same every time"
    assert refused("reconstruct", photos, "-t", "preset:huge").startswith(
        "name: expected a tokenizer preset out of"
    )


# ---------------------------------------------------------------------------------------------------------------
# info


def test_info() -> None:
    facts = json.loads("\n".join(titok("info", "--json")))
    assert facts["versions"]["titok"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["backends"]) == {"plain", "cpp", "cuda", "triton", "sdpa", "flash-attn"}
    assert facts["backends"]["plain"] == "available"
    assert facts["presets"]["tokenizers"] == list(TOKENIZER_PRESETS)
    assert "cpu" in facts["devices"]
    text = "\n".join(titok("info"))
    for section, values in facts.items():
        assert section in text
        for name, value in values.items():
            assert name in text
            assert (" ".join(value) if isinstance(value, list) else value) in text
    if not torch.cuda.is_available():
        assert facts["backends"]["cuda"] != "available"


def test_info_without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process in which titok._C is broken: the reason is told in one line."""
    code = "import sys; sys.modules['titok._C'] = None; sys.argv = ['titok', 'info', '--json']; "
    code += "import titok.cli; titok.cli.main()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    facts = json.loads(run.stdout)
    assert facts["devices"]["cpu"].endswith("no compiled kernels")
    assert facts["backends"]["cpp"].startswith("titok._C does not import here")
