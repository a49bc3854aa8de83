"""`python -m benchmarks.training` from end to end, on models so small that a step takes milliseconds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import training
from benchmarks.harness import figures, measures
from benchmarks.harness.results import read
from titok import config
from titok.config import GeneratorConfig, TokenizerConfig, ViTConfig, VQGANConfig


def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m benchmarks.training ...` in this process, whose presets are the tiny ones."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        training.main(command[3:])
    return subprocess.CompletedProcess(command, 0, printed.getvalue())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_recipe_against_the_published_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = ViTConfig(width=32, layers=2, heads=2, patch_size=32)
    proxy = VQGANConfig(
        hidden_channels=32, channel_multipliers=(1, 1, 1, 1, 1), blocks_per_level=1, codebook_size=16, code_dim=8
    )
    two_stages = TokenizerConfig(64, vit, vit, 5, 6, 20, head="proxy", proxy=proxy, pixel_decoder=True)
    single = dataclasses.replace(two_stages, head="pixels", proxy=None, pixel_decoder=False, signed_pixels=True)
    monkeypatch.setitem(config.TOKENIZER_PRESETS, "tiny-two", two_stages)
    monkeypatch.setitem(config.TOKENIZER_PRESETS, "tiny-vq", single)
    vae = dataclasses.replace(single, bottleneck="vae", l2_normalize=False)
    monkeypatch.setitem(config.TOKENIZER_PRESETS, "tiny-vae", vae)
    generator = GeneratorConfig(5, 20, width=32, layers=2, heads=2, mlp_width=48)
    monkeypatch.setitem(config.GENERATOR_PRESETS, "tiny", generator)
    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run_here, PIPE=subprocess.PIPE))
    path = tmp_path / "r.jsonl"
    presets = ["--preset", "tiny-two", "--vq", "tiny-vq", "--vae", "tiny-vae", "--generator", "tiny"]
    training.main([*presets, "--device", "cpu", "--seconds", "0.01", "--out", str(path)])
    rows = measures.select(read([path]), "training")
    assert [row["case"]["recipe"] for row in rows] == [*training.CASES, training.CLAIM]
    for row in rows:
        sides = training.TOKENS if row["case"]["recipe"] == training.CLAIM else ("titok", "as published")
        assert tuple(row["samples_s"]) == tuple(row["peak_bytes"]) == sides
        assert all(peak is None or peak >= 0 for peak in row["peak_bytes"].values())
    printed = capsys.readouterr().out
    assert "32 tokens" in printed
    assert "as published" in printed
    text = figures.training(rows)["training_tables"]
    assert all(f"| {name} |" in text for name in (*training.CASES, training.CLAIM))
    training.main([*presets, "--device", "cpu", "--limit", "0", "--out", str(path)])
    assert "vqgan was left out: 0 seconds were over" in path.read_text()
