"""`titok reconstruct` and `titok generate`: the pictures that they write, their options, the errors they raise."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli_runner import NAMES, SIZE, load, pixels, refused, titok
from titok import Pipeline, TiTok
from titok.cli.commands import app
from titok.config import TOKENIZER_PRESETS
from titok.data.images import read_image, to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# reconstruct


def ratio(pair: np.ndarray) -> float:
    """The PSNR in dB of two 16x24 pictures side by side, with a gap of 2 pixels between them."""
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


@pytest.mark.parametrize("option", ["--ignore-orientation", "--ignore-transparency"])
@pytest.mark.parametrize("command", ["reconstruct", "tokenize"])
def test_preprocessing_options_reach_the_reader(option: str, command: str, models: Path, photos: Path) -> None:
    with Image.open(photos / "b.png") as picture:
        exif = Image.Exif()
        exif[0x0112] = 3
        picture.putalpha(120)
        picture.save("a.png", exif=exif)
    results = []
    for i, flags in enumerate(((), (option,))):
        if command == "reconstruct":
            titok("reconstruct", "a.png", "-t", models / "tokenizer", "-o", f"{i}.png", *flags)
            results.append(pixels(Path(f"{i}.png"))[:, :24])
        else:
            titok("tokenize", "a.png", "-t", models / "vae", "-o", f"{i}.npz", *flags)
            results.append(np.load(f"{i}.npz")["latents"])
    assert not np.array_equal(*results)


def test_reconstruct_refuses(models: Path, photos: Path) -> None:
    Path("many").mkdir()
    for i in range(65):
        Path("many", f"{i}.png").symlink_to(photos / "a.png")
    assert "because 65 pictures are too many for one file (64)" in refused(
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
    assert grid.shape == (2 * 16 + 2, 3 * 24 + 4, 3), "one row for each class"
    for i, picture in enumerate(want):
        top, left = i // 3 * 18, i % 3 * 26
        assert np.array_equal(grid[top : top + 16, left : left + 24], picture)


def arrays(path: str = "a.npz") -> tuple[np.ndarray, list[int]]:
    with np.load(path) as file:
        return file["arr_0"].astype(int), file["arr_1"].tolist()


@pytest.mark.slow
def test_batch_size_changes_nothing_and_runs_can_be_cut(models: Path) -> None:
    generate(models, "--num", 7, "-o", "a.npz")
    whole, labels = arrays()
    assert labels == [0, 1, 2, 0, 1, 2, 0]
    for batch_size in (1, 3, "auto"):
        generate(models, "--num", 7, "-o", "b.npz", "--batch-size", batch_size, "--overwrite")
        assert np.abs(arrays("b.npz")[0] - whole).max() <= 1  # equal tokens; a pixel may round otherwise
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
        (("--labels", "3"), [3]),  # one past the last class stands for no class
    ],
)
def test_which_classes(arguments: tuple[Any, ...], labels: list[int], models: Path) -> None:
    generate(models, *arguments, "--steps", 1, "-o", "a.npz")
    pictures, got = arrays()
    assert got == labels
    assert len(pictures) == len(labels)


@pytest.mark.parametrize(
    "option",
    [
        ("--steps", 1),
        ("--guidance-scale", 40),
        ("--guidance-schedule", "constant"),
        ("--temperature", 0),
        ("--no-softmax-annealing",),
        ("--mask-schedule", "root"),
        ("--confidence", "maskgit"),
        ("--rounding", "truncate"),
    ],
)
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
        (("--batch-size", "all"), "--batch-size: expected auto or an integer >= 1, got 'all'"),
        (("--batch-size", 0), "--batch-size: expected auto or an integer >= 1, got '0'"),
        (("-o", "a.npz", "-o", "b.npz"), "--output: expected one .npz at most, got 2"),
    ],
)
def test_generate_refuses(arguments: tuple[Any, ...], message: str, models: Path) -> None:
    error = refused("generate", "-t", models / "tokenizer", "-g", models / "generator", *arguments)
    assert error.startswith(message)


def test_several_processes_write_a_set_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titok.processes.process_group", lambda: contextlib.nullcontext((1, 2)))
    message = "--output: expected a .npz, because several processes generate, got none"
    assert refused("generate", "-t", models / "tokenizer", "-g", models / "generator", "-o", "a.png") == message


def test_generate_refuses_a_pair_that_does_not_fit(models: Path) -> None:
    for tokenizer, message in (
        ("five_tokens", "tokenizer: expected 4 tokens of 16 codes, as the generator, got 5 of 16"),
        ("vae", "tokenizer: expected a vector-quantised one"),
    ):
        assert refused("generate", "-t", models / tokenizer, "-g", models / "generator").startswith(message)


@pytest.mark.slow
def test_generate_goes_on_where_it_failed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    decode = TiTok.decode_head

    def fails_later(self: TiTok, tokens: torch.Tensor) -> torch.Tensor:
        batches.append(len(tokens))
        if len(tokens) and sum(batches) == 8:
            raise OSError("No space left on device")
        return decode(self, tokens)

    monkeypatch.setattr(TiTok, "decode_head", fails_later)
    arguments = ["generate", "-t", models / "tokenizer", "-g", models / "generator", "--num", 8, "--batch-size", 4]
    outputs = ["-o", "a.png", "-o", "a.npz"]
    failed = CliRunner().invoke(app, [str(a) for a in arguments + outputs])
    assert (failed.exit_code, failed.stderr) == (2, "error: No space left on device\n")
    assert [p.name for p in Path.cwd().iterdir()] == ["a.npz.parts"]
    assert "a.npz.parts: expected seed 0" in refused(*arguments, *outputs, "--seed", 1)
    batches[:] = [100]
    titok(*arguments, *outputs)
    assert sum(batches) == 104
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["a.npz", "a.png"]
    titok(*arguments, "-o", "b.npz")
    assert np.array_equal(*(np.load(name)["arr_0"] for name in ("a.npz", "b.npz")))


def test_presets_have_random_weights_and_say_so(
    models: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENIZER_PRESETS, "tiny", load(models, "tokenizer").config)
    results = [
        CliRunner().invoke(app, ["reconstruct", str(photos), "-t", "preset:tiny", "-o", f"{i}.png"]) for i in "12"
    ]
    for result in results:
        assert result.exit_code == 0
        assert "\nWARNING: preset:tiny has random weights" in f"\n{result.stderr}"
    assert np.array_equal(pixels(Path("1.png")), pixels(Path("2.png"))), "the random weights are always the same"
    assert refused("reconstruct", photos, "-t", "preset:huge").startswith(
        "name: expected a tokenizer preset out of"
    )
