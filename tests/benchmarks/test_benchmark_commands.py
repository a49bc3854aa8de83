"""The benchmarks' commands from end to end, on models that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import _ladder, _sides, _tables, dit, engine, plot, speedup
from benchmarks._results import Results
from titok import MaskGITVQGAN, config
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take longer than such products, on a busy machine
    monkeypatch.setitem(speedup.CEILING_SIZES, "cpu", (64, 1 << 10))
    monkeypatch.setitem(_sides.PRESETS, 512, ("tiny-8", "tiny-64"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of DiT and a narrow VAE, a narrow MaskGIT and VQGAN, all at 64 pixels whatever is asked for."""
    pytest.importorskip("diffusers")
    real_dit, real_maskgit = dit.DiT, _sides.maskgit
    monkeypatch.setattr(dit, "TRANSFORMER", {**dit.TRANSFORMER, "num_layers": 1, "attention_head_dim": 4})
    monkeypatch.setattr(dit, "VAE", {**dit.VAE, "block_out_channels": [32] * 4, "layers_per_block": 1})
    monkeypatch.setattr(dit, "DiT", lambda resolution, *rest, **more: real_dit(64, *rest, **more))
    monkeypatch.setitem(_sides.PAPER, ("maskgit", 64), None)

    def maskgit(resolution: int, *rest: Any) -> _sides.Side:
        size = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32}
        with monkeypatch.context() as narrow:
            narrow.setattr(_sides, "GeneratorConfig", partial(GeneratorConfig, **size))
            narrow.setattr(_sides, "MaskGITVQGAN", lambda: MaskGITVQGAN(VQGANConfig(hidden_channels=32)))
            return real_maskgit(64, *rest)

    monkeypatch.setattr(_sides, "maskgit", maskgit)


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
    written = plot.tables(list(_tables.read([path])))
    assert f"tiny-8, {dtype}, batch 3" in written
    assert "| titok: both decoders |" in written


def test_ratio_is_the_median_of_the_rounds() -> None:
    samples = {"mm": [1.0] * 3, "native": [2.0, 8.0, 3.0], "titok": [1.0, 2.0, 2.0]}
    record = {"samples_s": samples, "case": {"batch": 4}, "work": {"mm": 8.0, "native": 3.0, "titok": 2.0}}
    native, ours = engine.table(record)[1]
    assert native[1:] == ["1.33", "0.5-2", "750", "0", "50%", "2.00x (1.50-4.00)"]
    assert ours[1:] == ["2", "2-4", "500", "0", "50%", ""]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_rivals")
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "tf32"])
def test_headline(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    speedup.main(
        ["--device", "cpu", "--dtype", dtype, "--seconds", "0.01", "--batches", "1,2", "--out", str(path)]
    )
    rival = "DiT-XL/2 bf16, SDPA" if dtype == "bf16" else "DiT-XL/2 as published, fp32"
    titok = ["tiny-8 eager", "tiny-8", "tiny-64 eager", "tiny-64"]
    found = rows(path, "speedup")
    assert [r["case"]["name"] for r in found] == [rival, rival, "MaskGIT + MaskGIT-VQGAN", *titok]
    assert [r["case"]["note"] for r in found] == [
        "250 x one step",
        "50 x one step",
        "titok's code",
        "",
        "",
    ] + 2 * ["64 x one step"]
    assert {r["case"]["dtype"] for r in found} == {"bf16" if dtype == "bf16" else "fp32"}
    for row in found[3:]:
        exact = row["case"]["name"].endswith("eager")
        assert row["flops_counted"] == pytest.approx(row["flops"], rel=1e-9 if exact else 0.1), row["case"]["name"]
    shown = capsys.readouterr().out
    assert "of mm" in shown
    assert "64 x one step" in shown
    assert ("a CPU computes fp32" in shown) == (dtype == "tf32")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_rivals")
def test_steps_can_be_run_whole_and_rows_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    common = ["--device", "cpu", "--seconds", "0.01", "--batches", "1", "--out", str(path)]
    speedup.main([*common, "--whole", "--steps", "3", "--rows", "dit,tiny-64"])
    assert [(r["case"]["note"], max(r["whole"].values())) for r in rows(path, "speedup")] == [("", 1)] * 3
    monkeypatch.setattr(dit, "why_not", lambda: "diffusers is not installed")
    speedup.main([*common, "--rows", "dit,tiny-8"])
    assert "left out: DiT-XL/2 bf16, SDPA (diffusers is not installed)" in capsys.readouterr().out


def test_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    speedup.main(["--device", "cpu", "--ladder", "tiny-64", "--seconds", "0.01", "--out", str(path)])
    found = rows(path, "ladder")
    assert [r["case"]["name"] for r in found][-1] == "titok"
    assert {r["whole"]["step"] for r in found} == {64}
    shown = capsys.readouterr().out
    assert all(row["case"]["name"] in shown for row in found)
    assert len(found) == 9


def test_every_rung_runs_and_costs_what_the_formula_says() -> None:
    def models(preset: str, dtype: torch.dtype) -> _sides.Models:
        return _sides.Models(preset, dtype, "cpu", whole=True)

    for name, make in _ladder.rungs("tiny-8", torch.bfloat16, models).items():
        side = make()
        pictures = side.parts["generate"].prepare(2)()
        assert (pictures.shape, pictures.dtype) == ((2, 64, 64, 3), torch.uint8), name
        counted = speedup.count(side)
        side.settle(counted)
        # Folded upsampling computes a row and a column too many, which counts on maps of 4 to 32 pixels.
        assert counted == pytest.approx(side.flops, rel=0.1 if side.folded_flops == side.flops else 1e-9), name


@pytest.mark.parametrize(
    ("seconds_a_call", "tried"),
    [
        ({1: 1.0, 2: 1.5, 4: 3.0, 8: 6.0}, [1, 2, 4]),  # 4 brings nothing
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.4}, [1, 2, 4, 8]),
        ({1: 16.0, 2: 16.0, 4: 16.0, 8: 16.0}, [1]),  # a call at batch 2 may take 32 s of the 60
    ],
)
def test_sweep_ends_by_itself(
    seconds_a_call: dict[int, float], tried: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [0.0]
    asked = []

    def prepare(batch: int) -> Any:
        asked.append(batch)

        def call() -> None:
            clock[0] += seconds_a_call[batch]

        return call

    monkeypatch.setattr(speedup.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(speedup.time, "perf_counter", lambda: clock[0])
    arguments = speedup.parser().parse_args(["--device", "cpu", "--seconds", "60"])
    bench = speedup.Bench(arguments, Results(tmp_path / "r.jsonl"), Console())
    bench.progress, bench.task = Progress(console=bench.console), 0
    bench.task = bench.progress.add_task("", total=None)
    side = _sides.Side("s", "f", 1, 1, 1, 1, 1, {"all": _sides.Part(prepare)}, [])
    best = bench._sweep(side, {})
    assert asked == tried
    assert best == max(tried, key=lambda batch: batch / seconds_a_call[batch])
