"""Sets of tokens for training: what they hold, kills, several processes, damage, and generators trained from them.

This file is longer than 400 lines because its tests share the set that they read, damage and continue.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli_runner import refused, titok
from titok import GeneratorConfig, TiTok, TokenizerConfig, ViTConfig
from titok.cli.commands import app
from titok.data import tokenizing
from titok.data.crops import COPIES
from titok.data.folders import FolderSource, ImageFolder, Pictures
from titok.data.images import read_image
from titok.data.token_sets import is_token_set, open_tokens
from titok.data.tokenizing import tokenize_set
from titok.training import GeneratorTraining, tokenize_images, train_generator

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (16, 24)
NAMES = [f"{'ab'[number % 2]}/{number:02}.png" for number in range(11)]


@pytest.fixture(autouse=True)
def _inputs(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with `pictures`, two classes, and the tokenizer `tok`. A block has four pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizing, "BLOCK", 4)
    monkeypatch.setattr("titok.checkpoints.writing.flush", lambda _: None)
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        Path("pictures", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + number, 50, 3), dtype=np.uint8)).save(Path("pictures", name))
    Path("tok").symlink_to(models / "tokenizer")


def sorted_names() -> list[str]:
    return sorted(NAMES)


def contents(path: str = "t.tokens") -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def wanted(copies: str) -> torch.Tensor:
    """The tokens (n, copies, K), picture by picture."""
    model, transform = TiTok.from_pretrained("tok"), COPIES[copies][0]
    pictures = Pictures(FolderSource("pictures"), SIZE, transform=transform)
    with torch.no_grad():
        return torch.stack([model.encode(pictures[index]) for index in range(len(pictures))])


@pytest.mark.parametrize("copies", ["none", "flip", "ten-crop"])
def test_a_set_holds_what_the_model_says(copies: str) -> None:
    number = COPIES[copies][1]
    printed = titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens", "--augment", copies, "--batch-size", 20)
    assert printed == [f"t.tokens: 11 pictures, {f'{number} x ' if number > 1 else ''}4 tokens each"]
    assert sorted(file.name for file in Path("t.tokens").iterdir()) == [
        "info.json", "labels.npy", "names.jsonl", "tokens.npy",
    ]  # fmt: skip
    tokens = open_tokens("t.tokens")
    assert tokens.tokens.dtype == torch.uint16
    assert tokens.tokens.shape == (11, number, 4)
    assert tokens.names == sorted_names()
    assert tokens.classes == ["a", "b"]
    assert tokens.labels.tolist() == ["ab".index(name[0]) for name in sorted_names()]
    assert torch.equal(tokens.tokens.long(), wanted(copies))
    assert tokens.check(TiTok.from_pretrained("tok"))
    row = tokens[3]
    assert (row.tokens.tolist(), row.label, row.name) == (tokens.tokens[3].tolist(), 0, sorted_names()[3])
    if copies == "none":
        model = TiTok.from_pretrained("tok")
        plain = torch.stack([read_image(Path("pictures", name), SIZE) for name in sorted_names()])
        assert torch.equal(tokens.tokens[:, 0].long(), model.encode(plain))
    array = np.load("t.tokens/tokens.npy", mmap_mode="r")  # anyone can read it
    assert array.dtype == np.uint16


def test_the_official_lines(models: Path) -> None:
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens", "--augment", "flip")
    assert titok("tokenize", "pictures", "-t", "tok", "-o", "t.jsonl", "--augment", "flip") == [
        "t.jsonl: 11 pictures, 2 x 4 tokens each"
    ]
    assert not Path("t.jsonl.parts").exists()
    folder = open_tokens("t.tokens")
    lines = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"class_id", "tokens"}] * 22
    assert [line["tokens"] for line in lines] == folder.tokens.flatten(0, 1).tolist()
    assert [line["class_id"] for line in lines] == folder.labels.repeat_interleave(2).tolist()
    read = open_tokens("t.jsonl")
    assert torch.equal(read.tokens[:, 0], folder.tokens.flatten(0, 1))
    assert read.classes == ["0", "1"]
    assert not read.check(TiTok.from_pretrained("tok")), "it does not tell who made it"
    message = "t.jsonl: expected 5 tokens a picture, got 4 tokens a picture"
    assert refused("detokenize", "t.jsonl", "-t", models / "five_tokens") == message


def test_a_set_is_turned_back_into_pictures(models: Path) -> None:
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens", "--augment", "flip")
    assert titok("detokenize", "t.tokens", "-t", "tok") == ["decoded: 22 pictures"]
    assert sorted(os.listdir("decoded/b"))[:3] == ["01-0.png", "01-1.png", "03-0.png"]
    other = "t.tokens: made by a tokenizer with other weights than the one given"
    assert refused("detokenize", "t.tokens", "-t", models / "other") == other


class Killed(BaseException):
    """Ends a command in place of the end of the process."""


def killed_before(change: int, work: Callable[[], Any]) -> bool:
    """Ends `work` before the file system is changed for the time `change`, from 0. False where it ends by itself."""
    count = itertools.count()

    def until(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(count) >= change:
                raise Killed
            return function(*arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", until(os.replace))
        patch.setattr(Path, "unlink", until(Path.unlink))
        patch.setattr(Path, "touch", until(Path.touch))
        patch.setattr(Path, "rmdir", until(Path.rmdir))
        patch.setattr(tokenizing._Work, "close", lambda self: os.close(self._lock) if self._lock else None)
        try:
            work()
        except Killed:
            return True
    return False


def tokenise(output: str, **options: Any) -> int:
    model = TiTok.from_pretrained("tok")
    transform, copies = COPIES["flip"]
    pictures = Pictures(FolderSource("pictures"), SIZE, transform=transform)
    return tokenize_set(
        model, pictures, output, copies=copies, made_of={"augment": "flip"}, batch_size=4, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("output", ["t.tokens", "t.jsonl"])
def test_a_run_that_dies_at_any_moment_goes_on(output: str) -> None:
    assert tokenise("whole" + Path(output).suffix) == 11
    want = {name.replace("whole", "t"): data for name, data in contents(".").items() if name.startswith("whole")}
    for change in range(100):
        killed = killed_before(change, lambda: tokenise(output))
        assert tokenise(output) == 11
        found = {name: data for name, data in contents(".").items() if name.startswith("t.")}
        assert found == want, change
        assert not list(Path().glob("**/*parts")), change
        if not killed:
            break
        for path in Path().glob("t.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert change > 8


def test_finished_blocks_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_before(5, lambda: tokenise("t.tokens"))  # the lock, info.json, the settings and two blocks
    assert sorted(os.listdir("t.tokens/parts")) == ["00000000.npz", "00000001.npz", "lock", "settings.json"]
    encoded = []
    encode = TiTok.encode
    monkeypatch.setattr(TiTok, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images))
    Path("t.tokens/parts/00000000.npz").write_bytes(b"damaged")
    tokenise("t.tokens")
    assert sum(encoded) == 2 * (4 + 3), "the damaged and the missing block"
    encoded.clear()
    assert tokenise("t.tokens") == 11
    assert not encoded, "the set is finished"
    with pytest.raises(ValueError, match=r"info\.json: what is there was made with another value of 'augment'"):
        tokenize_set(
            TiTok.from_pretrained("tok"), Pictures(FolderSource("pictures"), SIZE, transform=COPIES["flip"][0]),
            "t.tokens", copies=2, made_of={"augment": "other"},
        )  # fmt: skip


def test_other_settings_and_outputs_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("tokenize", "pictures", "-t", "tok", "-o", "t.tokens")
    titok(*command)
    before = contents()
    assert refused(*command) == "t.tokens/info.json: exists already; --overwrite replaces what exists"
    titok(*command, "--overwrite")
    assert contents() == before
    blocks = tokenizing._Encoder.blocks

    def two_blocks(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(blocks(*arguments), 2)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing._Encoder, "blocks", two_blocks)
        with pytest.raises(Killed):
            CliRunner().invoke(app, [*command, "--overwrite"])
    assert not is_token_set("t.tokens"), "it is not taken for finished"
    message = refused(*command, "--augment", "flip")
    assert message.startswith(
        "t.tokens/parts/settings.json: what is there was made with another value of 'copies', "
    )
    assert titok(*command) == ["t.tokens: 11 pictures, 4 tokens each"]
    assert contents() == before
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing._Encoder, "blocks", two_blocks)
        with pytest.raises(Killed):
            CliRunner().invoke(app, [*command, "--overwrite"])
    titok(*command, "--augment", "flip", "--overwrite")
    assert open_tokens("t.tokens").tokens.shape == (11, 2, 4)
    titok(*command, "--overwrite")
    assert contents() == before


def test_wrong_arguments(models: Path) -> None:
    command = ("tokenize", "pictures", "-t", "tok", "-o")
    assert refused(*command, "t.npz", "--augment", "flip") == (
        "t.npz: expected a name that ends in .jsonl or .tokens, which take --augment"
    )
    assert refused(*command, "t.tokens", "--augment", "five").startswith(
        "--augment: expected none, flip, ten-crop"
    )
    Path("file.tokens").touch()
    assert refused(*command, "file.tokens") == "file.tokens: expected a folder, got a file"
    assert "got a VAE" in refused("tokenize", "pictures", "-t", models / "vae", "-o", "t.tokens")
    Image.new("RGB", (20, 20)).save("pictures/loose.png")
    assert "loose.png: expected every picture in a sub-folder" in refused(*command, "t.tokens")


@pytest.mark.parametrize("suffix", [".tokens", ".jsonl"])
def test_damaged_pictures(suffix: str) -> None:
    whole = wanted("none")
    for name in ("a/02.png", "b/09.png"):
        Path("pictures", name).write_bytes(b"no picture")
    command = ("tokenize", "pictures", "-t", "tok", "-o", f"t{suffix}", "--batch-size", "3")
    assert "02.png: not a readable picture" in refused(*command)
    result = CliRunner().invoke(app, [*command, "--skip-unreadable"])
    assert result.stdout == f"t{suffix}: 9 pictures (2 left out), 4 tokens each\n"
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        "pictures/a/02.png",
        "pictures/b/09.png",
    ]
    kept = [index for index, name in enumerate(sorted_names()) if name not in ("a/02.png", "b/09.png")]
    assert torch.equal(open_tokens(f"t{suffix}").tokens[:, 0].long(), whole[kept][:, 0])
    for file in Path("pictures").rglob("*.png"):
        file.write_bytes(b"no picture")
    result = CliRunner().invoke(
        app, ["tokenize", "pictures", "-t", "tok", "-o", f"u{suffix}", "--skip-unreadable"]
    )
    assert result.exit_code == 2
    assert result.stderr.endswith("error: pictures: none of its pictures is readable\n")
    assert not list(Path().glob("u*"))


def test_large_codebooks_take_four_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = ViTConfig(16, 1, 2, 8)
    model = TiTok(TokenizerConfig(SIZE, vit, vit, 4, code_dim=2, codebook_size=70_000))
    monkeypatch.setattr(TiTok, "encode", lambda self, images: torch.full((len(images), 4), 69_999))
    pictures = Pictures(FolderSource("pictures"), SIZE, transform=COPIES["none"][0])
    tokenize_set(model, pictures, "t.tokens", copies=1, made_of={})
    assert np.load("t.tokens/tokens.npy").dtype == np.uint32
    assert set(open_tokens("t.tokens").tokens.flatten().tolist()) == {69_999}
    tokenize_set(model, pictures, "t.jsonl", copies=1, made_of={})
    assert open_tokens("t.jsonl").tokens.dtype == torch.uint32


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"class_id": 1}', "line 2: expected"),
        ('{"class_id": 1, "tokens": [1, 2.5]}', "line 2: expected"),
        ('{"class_id": true, "tokens": [1, 2]}', "line 2: expected"),
        ("[" * 10**5, "line 2: expected"),
        ('{"class_id": 1, "tokens": [1, 2, 3]}', "the same number of tokens on each line"),
        ('{"class_id": -1, "tokens": [1, 2]}', r"labels and tokens in \[0, 2\^32\)"),
        ('{"class_id": 1, "tokens": [1, 4294967296]}', r"labels and tokens in \[0, 2\^32\)"),
        ('{"class_id": 9999999, "tokens": [1, 2]}', r"classes in \[0, 2\^20\), got 9999999"),
    ],
)
def test_damaged_lines(line: str, words: str) -> None:
    Path("t.jsonl").write_text('{"class_id": 0, "tokens": [1, 2]}\n' + line)
    with pytest.raises(ValueError, match=rf"^t\.jsonl: .*{words}"):
        open_tokens("t.jsonl")


def test_damaged_sets() -> None:
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens")
    for name, data in contents().items():
        for changed in (data[: len(data) // 2], b"text", b""):
            Path(name).write_bytes(changed)
            with pytest.raises(ValueError, match=r"^t\.tokens"):
                _ = open_tokens("t.tokens").names
        Path(name).write_bytes(data)
    np.save("t.tokens/labels.npy", np.full(11, 2))
    with pytest.raises(ValueError, match=r"labels\.npy: expected labels in \[0, 2\)"):
        open_tokens("t.tokens")
    np.save("t.tokens/labels.npy", np.zeros(10, np.int64))
    with pytest.raises(ValueError, match="expected a label for each of 11 rows, got 10"):
        open_tokens("t.tokens")
    with pytest.raises(FileNotFoundError, match=r"none\.tokens: no such file or folder"):
        open_tokens("none.tokens")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        open_tokens("none.jsonl")


# ---------------------------------------------------------------------------------------------------------------
# Generators


def training(**changes: Any) -> GeneratorTraining:
    model = GeneratorConfig(4, 16, num_classes=2, width=16, layers=1, heads=2, mlp_width=32)
    return GeneratorTraining(model=model, **{"steps": 6, "batch_size": 6, "warmup_steps": 1, **changes})


def model_files(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in ("model.safetensors", "training.safetensors")}


def test_a_generator_trained_from_a_set_is_the_one_trained_from_memory() -> None:
    tokenise("t.tokens")
    tokens = open_tokens("t.tokens")
    assert tokens.tokens.dtype == torch.uint16
    train_generator(tokens.tokens, tokens.labels, training(), "file", progress=False)
    memory = wanted("flip")
    assert memory.dtype == torch.int64
    train_generator(memory, tokens.labels.clone(), training(), "memory", progress=False)
    assert model_files("file") == model_files("memory")
    train_generator(memory.to(torch.int16), tokens.labels, training(), "file", resume=True, progress=False)


SMALL = ("--width", 64, "--layers", 1, "--steps", 4, "--batch-size", 4, "--set", "checkpoint_every=2")


def test_the_command_reads_sets_and_never_tokenises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens")
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.jsonl")
    titok("train", "generator", "pictures", "-t", "tok", "-o", "from_pictures", *SMALL)
    monkeypatch.setattr(TiTok, "encode", lambda *_: pytest.fail("tokenised"))
    for source in ("t.tokens", "t.jsonl"):
        titok("train", "generator", source, "-t", "tok", "-o", f"from_{source}", *SMALL)
        assert model_files(f"from_{source}") == model_files("from_pictures")
    printed = titok("train", "generator", "t.tokens", "-o", "without", *SMALL)
    assert printed[-1].startswith("without: a generator of 2 classes, step 4, loss ")
    assert model_files("without") == model_files("from_pictures")
    assert json.loads(Path("without/classes.json").read_text()) == ["a", "b"]
    titok("train", "generator", "pictures", "-t", "tok", "-o", "from_pictures", *SMALL, "--resume")


def test_the_command_refuses(models: Path) -> None:
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens")
    titok("train", "generator", "pictures", "-t", "tok", "-o", "run", *SMALL)
    assert "expected the tokenizer for the pictures" in refused("train", "generator", "pictures", *SMALL)
    assert refused("train", "generator", "t.tokens", "--flip", *SMALL).startswith("--flip: expected pictures, got")
    message = refused("train", "generator", "t.tokens", "-t", models / "other", *SMALL)
    assert message == "t.tokens: made by a tokenizer with other weights than the one given"
    Image.new("RGB", (30, 30)).save("pictures/a/02.png")
    message = refused("train", "generator", "pictures", "-t", "tok", "-o", "run", *SMALL, "--resume")
    assert "made with another value of 'pictures'" in message


def test_flip_gives_the_tokens_of_the_centre_and_its_mirror_image() -> None:
    titok("train", "generator", "pictures", "-t", "tok", "-o", "run", "--flip", *SMALL)
    want = tokenize_images(TiTok.from_pretrained("tok"), ImageFolder("pictures", SIZE), flip=True)
    assert torch.equal(open_tokens("run/training.tokens").tokens.long(), want)


@pytest.mark.slow
def test_two_processes_write_the_same_set() -> None:
    """As torchrun starts them. They tokenise half of the blocks each."""
    titok("tokenize", "pictures", "-t", "tok", "-o", "one.tokens", "--augment", "flip")
    code = (
        "import sys; import torch; torch.set_num_threads(1); from titok.data import tokenizing; tokenizing.BLOCK = 4; "
        "from titok import TiTok; encode = TiTok.encode; sizes = []\n"
        "TiTok.encode = lambda self, images: sizes.append(len(images)) or encode(self, images)\n"
        "from titok.cli import commands\n"
        "try: commands.main()\n"
        "finally: print(sum(sizes), file=sys.stderr)"
    )
    Path("command.py").write_text(code)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "command.py",
    ]
    run = subprocess.run(
        [*launcher, "tokenize", "pictures", "-t", "tok", "-o", "two.tokens", "--augment", "flip"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == "two.tokens: 11 pictures, 2 x 4 tokens each\n"
    assert sorted(int(line) for line in run.stderr.split() if line.isdigit()) == [8, 14]
    one, two = contents("one.tokens"), contents("two.tokens")
    assert list(two.values()) == list(one.values())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set() -> None:
    """A set of 128 MB is checked, hashed and read batch by batch."""
    titok("tokenize", "pictures", "-t", "tok", "-o", "t.tokens")
    rows = 1_600_000
    array = np.lib.format.open_memmap("t.tokens/tokens.npy", "w+", np.uint16, (rows, 10, 4))
    array[:] = np.arange(4)
    array.flush()
    np.save("t.tokens/labels.npy", np.arange(rows) % 2)
    code = (
        "import re, torch\nfrom pathlib import Path\nfrom titok.data.token_sets import open_tokens\n"
        "from titok.training import fingerprint\nfrom titok.training.generator import _check_rows\n"
        "used = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        "torch.set_num_threads(1); torch.ones(1 << 20); before = used()\n"
        "tokens = open_tokens('t.tokens'); flat = tokens.tokens.flatten(0, 1)\n"
        "_check_rows(flat, 4, 16); fingerprint.of_integers(flat); flat[torch.randint(len(flat), (64,))]\n"
        "print(used() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60, "MiB: 12 of labels, the rest of chunks"
