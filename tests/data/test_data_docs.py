"""docs/data.md is true: its Python runs, its commands run, and every command reads every kind of source."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cli_runner import titok
from titok.data.token_sets import open_tokens

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SMALL = ("--width", "64", "--layers", "1", "--steps", "2", "--batch-size", "2")


@pytest.fixture(autouse=True)
def _inputs(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with pictures of two classes, the same as a shard, and the tokenizer of the documentation."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/tokenizer").symlink_to(models / "tokenizer")
    with tarfile.open("photos.tar", "w") as archive:
        for number in range(4):
            path = Path("photos", "ab"[number % 2], f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20 + number), (60 * number, 9, 9)).save(path)
            label = Path(f"{number}.cls")
            label.write_text(str(number % 2))
            archive.add(path, path.name)
            archive.add(label, label.name)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.S)


def test_what_the_documentation_shows() -> None:
    for code in blocks("python"):
        exec(compile(code, "data.md", "exec"), {})
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        arguments = line.partition("titok ")[2].split()
        titok(*arguments, *(SMALL if arguments[0] == "train" else ()))
    assert open_tokens("photos.tokens").tokens.shape == (4, 10, 4)
    assert Path("runs/generator/model.safetensors").exists()


def test_commands_read_shards_as_they_read_folders() -> None:
    tokenizer = ("-t", "runs/tokenizer")
    for source in ("photos", "photos.tar"):
        titok("tokenize", source, *tokenizer, "-o", f"{source}.tokens")
        titok("reconstruct", source, *tokenizer, "-o", f"pairs-{source}")
        titok("train", "generator", source, *tokenizer, "-o", f"generator-{source}", *SMALL)
        assert len(list(Path(f"pairs-{source}").rglob("*.png"))) == 4
    by_name = [
        dict(zip([name.rpartition("/")[2] for name in tokens.names], tokens.tokens.tolist(), strict=True))
        for tokens in (open_tokens("photos.tokens"), open_tokens("photos.tar.tokens"))
    ]
    assert by_name[0] == by_name[1]
    Path("names").write_text("b\na\n")
    titok("tokenize", "photos", *tokenizer, "-o", "given.tokens", "--classes", "names")
    assert open_tokens("given.tokens").classes == ["b", "a"]
    titok("tokenize", "photos.tar", *tokenizer, "-o", "kept.tokens", "--index", "index.npz")
    assert Path("index.npz").exists()
