"""README.md is true: its Python blocks run, and the targets, commands, options and files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from titok import MaskGIT, TiTok

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With untrained models in the folders in which the quickstart saves trained ones."""
    from titok.quickstart.run import GENERATOR, TOKENIZER

    monkeypatch.chdir(tmp_path)
    TiTok(TOKENIZER).save_pretrained("runs/quickstart/tokenizer")
    MaskGIT(GENERATOR).save_pretrained("runs/quickstart/generator")
    codes = blocks("python")
    assert len(codes) >= 2
    for code in codes:
        names: dict[str, object] = {}
        exec(compile(code, "README.md", "exec"), names)
    first: dict[str, object] = {}
    exec(compile(codes[0], "README.md", "exec"), first)
    images, tokens = first["images"], first["tokens"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (10, 32, 32, 1)
    assert isinstance(tokens, torch.Tensor)
    assert tokens.shape == (10, 8)


def test_commands_exist() -> None:
    from titok.cli.commands import app

    text = "\n".join(blocks("sh"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    wanted = set(re.findall(r"^make ([a-z-]+)", text, flags=re.M))
    assert wanted >= {"quickstart", "test"}
    assert wanted <= targets
    commands = {tuple(c.split()) for c in re.findall(r"titok ((?:train )?[a-z]+)", text)}
    assert len(commands) >= 7
    for command in commands:
        shown = CliRunner().invoke(app, [*command, "--help"])
        assert shown.exit_code == 0, command
        options = set(re.findall(rf"titok {' '.join(command)}[^\n#&]*", text))
        for option in re.findall(r"--[a-z-]+", " ".join(options)):
            assert option in shown.output, (command, option)


def test_named_files_exist() -> None:
    named = set(re.findall(r"`((?:titok|kernels|csrc|docs|benchmarks)/[\w/.]*)`", README))
    named |= set(re.findall(r"\]\(([\w/.]+)\)", README))
    assert len(named) >= 15
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
