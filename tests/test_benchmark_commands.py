"""The benchmarks' commands from end to end, on models that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import _sides, _tables, engine, speedup
from titok import config
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "tiny-8" as the presets of 8 steps, "tiny-64" as those of 64; both 64 pixels wide."""
    vit = ViTConfig(width=32, layers=2, heads=2, patch_size=32)
    proxy = VQGANConfig(hidden_channels=32, channel_multipliers=(1, 1, 1, 1, 1), codebook_size=16, code_dim=8)
    tokenizer = TokenizerConfig(64, vit, vit, 5, 6, 20, head="proxy", proxy=proxy, pixel_decoder=True)
    size: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
    many = SamplingConfig(steps=64, guidance_schedule="power-cosine")
    for name, generator in {
        "tiny-8": GeneratorConfig(5, 20, **size),
        "tiny-64": GeneratorConfig(5, 20, architecture="uvit", **size, sampling=many),
    }.items():
        monkeypatch.setitem(config.TOKENIZER_PRESETS, name, tokenizer)
        monkeypatch.setitem(config.GENERATOR_PRESETS, name, generator)
    monkeypatch.setitem(speedup.CEILING_SIZES, "cpu", (64, 1 << 10))
    monkeypatch.setitem(_sides.PRESETS, 512, ("tiny-8", "tiny-64"))


def rows(path: Path, bench: str) -> list[dict[str, Any]]:
    return _tables.of(list(_tables.read([path])), bench)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_engine_against_published(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    common = ["--preset", "tiny-8", "--device", "cpu", "--dtype", dtype, "--seconds", "0.01", "--out", str(path)]
    engine.main([*common, "--batch", "1", "3"])
    engine.main([*common, "--batch", "2", "--stages"])
    one, three, stages = rows(path, "engine")
    sides = ["native", "autocast", "titok"] if dtype == "bf16" else ["native", "titok"]
    assert list(three["samples_s"]) == ["mm", "copy", *sides]
    assert {len(samples) for samples in one["samples_s"].values()} >= {3}
    assert [name for name in stages["work"] if ": " in name] == [
        f"{s}: {stage}" for s in sides for stage in engine.STAGES
    ]
    for name in sides:
        parts = [stages["work"][f"{name}: {stage}"] for stage in ("generator", "both decoders")]
        assert sum(parts) == one["work"][name]
    header, cells = engine.table(three)
    assert [line[-1] for line in cells][-1] == ""
    assert all(line[-1].endswith(")") for line in cells[:-1])
    assert {len(line) for line in cells} == {len(header)}
    assert "torch.mm in the same rounds" in capsys.readouterr().out


def test_ratio_is_the_median_of_the_rounds() -> None:
    samples = {"mm": [1.0] * 3, "native": [2.0, 8.0, 3.0], "titok": [1.0, 2.0, 2.0]}
    record = {"samples_s": samples, "case": {"batch": 4}, "work": {"mm": 8.0, "native": 3.0, "titok": 2.0}}
    native, ours = engine.table(record)[1]
    assert native[1:] == ["1.33", "0.5-2", "750", "0", "50%", "2.00x (1.50-4.00)"]
    assert ours[1:] == ["2", "2-4", "500", "0", "50%", ""]
