"""The benchmark commands from end to end, on models so small that a call takes milliseconds.

This file is longer than 400 lines because all commands are run on the same small models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import bench_dispatch, engine, memory, precision, roofline, speedup, waiting
from benchmarks.baselines import dit, few_steps
from benchmarks.harness import ceilings, comparison, ladder, measures, rivals, sides, tables
from benchmarks.harness.models import Models
from benchmarks.harness.results import Results, read
from titok import MaskGITVQGAN, config
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig
from titok.inference import int8


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Presets "tiny-8" and "tiny-64", with so many steps, for pictures of 64 pixels."""
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
    torch.set_num_threads(1)  # on a busy machine, waking a second thread takes longer than these products
    monkeypatch.setitem(ceilings.SIZES, "cpu", (64, 1 << 10))
    monkeypatch.setitem(sides.PRESETS, 512, ("tiny-8", "tiny-64"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT of one layer, and narrow VAE, MaskGIT and VQGAN; all of them for 64 pixels, whatever is asked for."""
    pytest.importorskip("diffusers")
    real_dit, real_maskgit = dit.DiT, rivals.maskgit_side
    monkeypatch.setattr(dit, "TRANSFORMER", {**dit.TRANSFORMER, "num_layers": 1, "attention_head_dim": 4})
    monkeypatch.setattr(dit, "VAE", {**dit.VAE, "block_out_channels": [32] * 4, "layers_per_block": 1})
    monkeypatch.setattr(dit, "DiT", lambda resolution, *rest, **more: real_dit(64, *rest, **more))
    monkeypatch.setitem(sides.PAPER, ("maskgit", 64), None)

    def maskgit(name: str, resolution: int, *rest: Any, **more: Any) -> sides.Side:
        size = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32}
        with monkeypatch.context() as narrow:
            narrow.setattr(rivals, "GeneratorConfig", partial(GeneratorConfig, **size))
            narrow.setattr(rivals, "MaskGITVQGAN", lambda: MaskGITVQGAN(VQGANConfig(hidden_channels=32)))
            return real_maskgit(name, 64, *rest, **more)

    monkeypatch.setattr(rivals, "maskgit_side", maskgit)


def rows(path: Path, bench: str) -> list[dict[str, Any]]:
    return measures.select(read([path]), bench)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_engine_against_published(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine, int8):  # every CPU computes in 8 bits, though not fast
        monkeypatch.setattr(module, "why_no_int8", lambda device: None)
    path = tmp_path / "r.jsonl"
    common = ["--preset", "tiny-8", "--device", "cpu", "--dtype", dtype, "--seconds", "0.01", "--out", str(path)]
    engine.main([*common, "--batch", "1", "3"])
    engine.main([*common, "--batch", "2", "--stages"])
    one, three, stages = rows(path, "engine")
    names = ["native", "autocast", "titok", "titok, int8"] if dtype == "bf16" else ["native", "titok"]
    assert list(three["samples_s"]) == ["mm", "copy", *names]
    assert {len(samples) for samples in one["samples_s"].values()} >= {3}
    assert [name for name in stages["work"] if ": " in name] == [
        f"{s}: {stage}" for s in names for stage in engine.STAGES
    ]
    for name in names:
        parts = [stages["work"][f"{name}: {stage}"] for stage in ("generator", "both decoders")]
        assert sum(parts) == one["work"][name]
    header, cells = tables.engine_table(three)
    assert [line[-1] == "" for line in cells] == [name == "titok" for name in names]
    assert all(line[-1].endswith(")") for line in cells if line[0] != "titok")
    assert {len(line) for line in cells} == {len(header)}
    assert "fastest matrix product in the same rounds" in capsys.readouterr().out
    written = tables.all_tables(read([path]))
    assert f"tiny-8, {dtype}, batch 3" in written
    assert "| titok: both decoders |" in written


def test_ratio_is_the_median_of_the_rounds() -> None:
    samples = {"mm": [1.0] * 3, "native": [2.0, 8.0, 3.0], "titok": [1.0, 2.0, 2.0]}
    record = {"samples_s": samples, "case": {"batch": 4}, "work": {"mm": 8.0, "native": 3.0, "titok": 2.0}}
    native, ours = tables.engine_table(record)[1]
    assert native[1:] == ["1.33", "0.5-2", "750", "0", "50%", "2.00x (1.50-4.00)"]
    assert ours[1:] == ["2", "2-4", "500", "0", "50%", ""]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_rivals")
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "tf32"])
def test_headline(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    rows_of = "=DiT-XL/2 bf16, SDPA,as published,=MaskGIT + MaskGIT-VQGAN,tiny"
    common = ["--device", "cpu", "--dtype", dtype, "--seconds", "0.01", "--batches", "1,2", "--out", str(path)]
    speedup.main([*common, "--rows", rows_of])
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
    assert {row["case"]["name"]: tables.checked_cell(row) for row in found} == {
        row["case"]["name"]: "yes" for row in found
    }
    for row in found[3:]:
        exact = row["case"]["name"].endswith("eager")
        assert row["flops_counted"] == pytest.approx(row["flops"], rel=1e-9 if exact else 0.1), row["case"]["name"]
    shown = capsys.readouterr().out
    assert "of mm" in shown
    assert "64 x one step" in shown
    assert ("a CPU computes fp32" in shown) == (dtype == "tf32")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_rivals")
def test_all_steps_can_be_run_and_rows_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    common = ["--device", "cpu", "--seconds", "0.01", "--batches", "1", "--out", str(path)]
    speedup.main([*common, "--whole", "--steps", "3", "--rows", "=DiT-XL/2 bf16, SDPA,tiny-64"])
    assert [(r["case"]["note"], max(r["calls"].values())) for r in rows(path, "speedup")] == [("", 1)] * 3
    monkeypatch.setattr(dit, "why_not", lambda: "diffusers is not installed")
    speedup.main([*common, "--rows", "=DiT-XL/2 bf16, SDPA,tiny-8"])
    assert "left out: DiT-XL/2 bf16, SDPA (diffusers is not installed)" in capsys.readouterr().out


@pytest.fixture
def tiny_few_steps(monkeypatch: pytest.MonkeyPatch, tiny_rivals: None) -> None:
    """The models of a few steps with narrow layers, for 64 or 128 pixels."""
    vq = {**few_steps.AMUSED_VQ, "block_out_channels": [32] * 5, "latent_channels": 8, "num_vq_embeddings": 40}
    uvit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    uvit |= {"in_channels": 24, "block_out_channels": 24, "block_num_heads": 2, "vocab_size": 48}
    uvit |= {"codebook_size": 40, "encoder_hidden_size": 20, "cond_embed_dim": 12, "micro_cond_embed_dim": 1280}
    dc = {**few_steps.DC_AE, "encoder_block_out_channels": [32] * 6, "decoder_block_out_channels": [32] * 6}
    narrow = {"num_layers": 1, "attention_head_dim": 4}
    for name, narrowed in {"DC_AE": dc, "UVIT": uvit, "AMUSED_VQ": vq}.items():
        monkeypatch.setattr(few_steps, name, narrowed)
    monkeypatch.setattr(few_steps, "PIXEL_STEP", {**few_steps.PIXEL_STEP, **narrow, "patch_size": 64})
    for name, pixels in {"one_latent_step": 128, "one_pixel_step": 64, "Amused": 64}.items():
        monkeypatch.setattr(few_steps, name, partial(_at, getattr(few_steps, name), pixels))


def _at(make: Any, pixels: int, resolution: int, *rest: Any, **more: Any) -> Any:
    return make(pixels, *rest, **more)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_few_steps")
def test_rivals_of_today(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each runs whole, its results are checked where that takes no longer than measuring, and sources are named."""
    path = tmp_path / "r.jsonl"
    names = [
        "DiT-XL/2, 20 DPM-Solver steps",
        "DiT-XL/2, 10 DPM-Solver steps",
        "one pass of DiT-XL/2",
        "one pass of DiT-XL/1, deep",
        "one pass over pixels",
        "aMUSEd",
        "MaskGIT + MaskGIT-VQGAN, unguided",
    ]
    common = ["--device", "cpu", "--dtype", "fp32", "--batches", "1", "--out", str(path)]
    speedup.main([*common, "--seconds", "0.01", "--rows", "dpm,one pass,amused,unguided"])
    found = {row["case"]["name"]: row for row in rows(path, "speedup")}
    assert list(found) == names
    for name, row in found.items():
        assert set(row["calls"].values()) == {1}
        assert tables.checked_cell(row) == ("pixels" if "DPM" in name else "yes"), name
        assert (row["case"]["fid"] is None) == (row["case"]["fid_source"] is None)
    assert found["one pass over pixels"]["case"]["fid_of"] == "pMF-L/32"
    assert "published FID" in capsys.readouterr().out


@pytest.mark.slow
def test_sustain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    common = ["--device", "cpu", "--batches", "1", "--out", str(path), "--rows", "=tiny-8,=tiny-64"]
    speedup.main([*common, "--sustain", "0.2"])
    (row,) = rows(path, "sustain")
    assert row["case"]["name"] == "tiny-8"
    assert row["p50"] <= row["p90"] <= row["p99"] == max(row["samples_s"]["image"])
    assert sum(row["samples_s"]["image"]) <= row["conditions"]["seconds"]
    shown = capsys.readouterr().out
    assert "left out: tiny-64 (a step of it is timed and multiplied; --whole runs all steps)" in shown
    assert "images per joule" in shown


@pytest.mark.slow
def test_a_side_with_wrong_results_is_named_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ours = tmp_path / "r.jsonl", Models.ours

    def cheating(self: Models, name: str, **options: Any) -> sides.Side:
        """Returns the pictures of its first call for ever."""
        side = ours(self, name, **options)
        whole = side.parts["generate"]

        def prepare(batch: int) -> Any:
            checked = whole.prepare(batch)
            first = checked()
            return dataclasses.replace(checked, run=lambda *arguments: first)

        side.parts["generate"] = dataclasses.replace(whole, prepare=prepare)
        return side

    monkeypatch.setattr(Models, "ours", cheating)
    common = ["--device", "cpu", "--dtype", "fp32", "--seconds", "0.01", "--batches", "1", "--out", str(path)]
    with pytest.raises(SystemExit, match="failed: tiny-8"):
        speedup.main([*common, "--rows", "tiny-8"])
    (row,) = rows(path, "speedup")
    assert row["case"]["name"] == "tiny-8 eager"
    (note,) = row["environment"]["notes"]
    assert note == "left out tiny-8: not timed, it returns the same result for different inputs"


@pytest.mark.slow
def test_every_batch_is_written_at_once_and_a_side_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a side must be compiled: here one is not."""
    path = tmp_path / "r.jsonl"
    ours, seen = Models.ours, []

    def uncompiled(self: Models, name: str, **options: Any) -> sides.Side:
        side = ours(self, name, **options)
        side.must_be_compiled = name == "tiny-64"
        return side

    def take_turns(self: comparison.Comparison, *arguments: Any) -> None:
        seen.extend(row["case"]["batch"] for row in rows(path, "sweep"))
        raise KeyboardInterrupt

    monkeypatch.setattr(Models, "ours", uncompiled)
    common = [
        "--device",
        "cpu",
        "--seconds",
        "0.01",
        "--batches",
        "1",
        "--rows",
        "=tiny-64,=tiny-8",
        "--out",
        str(path),
    ]
    with pytest.raises(SystemExit, match="failed: tiny-64"):
        speedup.main(common)
    assert [row["case"]["name"] for row in rows(path, "speedup")] == ["tiny-8"]
    (row,) = rows(path, "speedup")
    (note,) = row["environment"]["notes"]
    assert note.endswith("tiny-64: step does not run what torch.compile made")
    path.unlink()
    monkeypatch.setattr(comparison.Comparison, "_take_turns", take_turns)
    common[common.index("1")] = "1,2"
    with pytest.raises(KeyboardInterrupt):
        speedup.main([*common, "--rows", "=tiny-8"])
    assert seen[:1] == [1]


@pytest.mark.slow
def test_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    speedup.main(["--device", "cpu", "--ladder", "tiny-64", "--seconds", "0.01", "--out", str(path)])
    found = rows(path, "ladder")
    assert [r["case"]["name"] for r in found][-1] == "prepared weights: titok"
    assert {r["calls"]["step"] for r in found} == {64}
    shown = capsys.readouterr().out
    assert all(row["case"]["name"] in shown for row in found)
    assert len(found) == 8


@pytest.mark.slow
def test_every_rung_runs_and_costs_what_the_formula_says() -> None:
    def models(preset: str, dtype: torch.dtype) -> Models:
        return Models(preset, dtype, "cpu", all_steps=True)

    for name, make in ladder.rungs("tiny-8", torch.bfloat16, models).items():
        side = make()
        pictures = side.parts["generate"].prepare(2)()
        assert (pictures.shape, pictures.dtype) == ((2, 64, 64, 3), torch.uint8), name
        counted = side.count_flops()
        side.choose_formula(counted)
        # Folded upsampling computes one more row and column than the map has, which matters for maps of 4 to 32
        # pixels.
        assert counted == pytest.approx(side.flops, rel=0.1 if side.folded_flops == side.flops else 1e-9), name


@pytest.mark.slow
def test_only_the_last_rung_prepares_weights() -> None:
    models = Models("tiny-8", torch.float32, "cpu", all_steps=True)
    for make in ladder.rungs("tiny-8", torch.float32, lambda *_: models).values():
        assert not models.tokenizer.prepared
        assert not models.generator.prepared
        make().parts["generate"].prepare(1)()
    assert all(model.prepared for model in models.prepared)
    assert not models.tokenizer.prepared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds_a_call", "tried"),
    [
        ({1: 1.0, 2: 1.5, 4: 3.0, 8: 6.0}, [1, 2, 4]),  # batch 4 is no faster than batch 2
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.4}, [1, 2, 4, 8]),
        ({1: 16.0, 2: 16.0, 4: 16.0, 8: 16.0}, [1]),  # a call at batch 2 might take 32 s, more than half of 60 s
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

    monkeypatch.setattr(comparison.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    arguments = speedup.parser().parse_args(["--device", "cpu", "--seconds", "60"])
    compared = comparison.Comparison(arguments, Results(tmp_path / "r.jsonl"), Console())
    side = sides.Side("s", "f", 1, 1, 1, 1, 1, {"all": sides.Part(prepare)}, [])
    best = compared.best_batch(side)
    assert asked == tried
    assert best == max(tried, key=lambda batch: batch / seconds_a_call[batch])


def test_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    roofline.main(["--preset", "tiny-8", "--device", "cpu", "--seconds", "0.01", "--out", str(path)])
    (row,) = rows(path, "roofline")
    parts, (total,) = measures.stages(row)[:-1], measures.stages(row)[-1:]
    assert [stage["stage"] for stage in parts] == ["encoder", "generator", "decoder", "pixel decoder"]
    assert total["flops"] == sum(stage["flops"] for stage in parts[1:])
    assert "could save, ms" in capsys.readouterr().out


@pytest.mark.parametrize("op", bench_dispatch.cases("cpu"))
def test_dispatched_calls_reach_the_registered_op(op: str) -> None:
    call = bench_dispatch.cases("cpu")[op]

    def through_dispatcher(run: Any) -> bool:
        with torch.no_grad(), torch.profiler.profile() as profile:
            run()
        return any(event.name.startswith(f"titok::{op}") for event in profile.events())

    assert through_dispatcher(partial(bench_dispatch.dispatched, call))
    assert not through_dispatcher(call)


# ---------------------------------------------------------------------------------------------------------------
# Memory and waiting: their sides run in processes of their own, which know no preset of a test


@pytest.mark.slow
def test_memory_of_a_side(tmp_path: Path) -> None:
    weights = memory.write_models("tiny-8", torch.float32, tmp_path)
    assert weights > 100_000
    names = ["import torch", "as published", "titok"]
    if int8.why_no_int8("cpu") is None:
        names.append("titok, int8")
    sides = {name: memory.measure(name, str(tmp_path), torch.float32, 2) for name in names}
    for name, found in sides.items():
        assert found["loaded"] > 50e6
        if name != "import torch":
            assert found["loaded"] <= found["peak_loading"] <= found["peak_generating"]
    row = {"sides": sides, "weight_bytes": weights}
    header, lines = tables.memory_table(row)
    assert [line[0] for line in lines] == list(sides)
    assert {len(line) for line in lines} == {len(header)}


@pytest.mark.slow
def test_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (precision, int8):
        monkeypatch.setattr(module, "why_no_int8", lambda device: None)
    path = tmp_path / "r.jsonl"
    precision.main(["--preset", "tiny-8", "--batch", "2", "--out", str(path)])
    generator, tokenizer, golden = rows(path, "precision")
    for row in (generator, tokenizer, golden):
        assert list(row["figures"]) == ["float32", "bfloat16", "int8"]
        header, lines = tables.precision_table(row)
        assert [len(line) for line in lines] == [len(header)] * 3
    for name, row in (("logits", generator), ("head", tokenizer)):
        errors = [figures[name] for figures in row["figures"].values()]
        assert errors[0] < 1e-5 < errors[1] < errors[2] < 0.2
    shares = [figures["golden_tokens"] for figures in golden["figures"].values()]
    assert shares[0] == 1
    assert all(0.1 < share < 1 for share in shares[1:])
    assert "tokens of the official code" in capsys.readouterr().out


@pytest.mark.slow
def test_waiting_times_its_work(capsys: pytest.CaptureFixture[str]) -> None:
    for work in (waiting.TRAINING, waiting.GENERATION):
        waiting.main(
            ["--work", work, "--preset", "tiny-8", "--dtype", "fp32", "--seconds", "0.01", "--device", "cpu"]
        )
        samples = json.loads(capsys.readouterr().out)
        assert len(samples) >= 2
        assert min(samples) > 0
    with waiting.busy_processes(1):
        pass


def test_waiting_table() -> None:
    rows = [
        {
            "case": {"policy": policy, "busy": busy},
            "samples_s": {"training step": [0.01 * (1 + busy)], "generation": [1.0]},
        }
        for policy in ("a", "b")
        for busy in (0, 2)
    ]
    _, lines = tables.waiting_table(rows)
    assert lines == [[policy, "10.0", "30.0", "3.0", "1,000.0", "1,000.0", "1.0"] for policy in "ab"]


def test_a_side_of_titok_with_other_logits_is_not_built() -> None:
    """What the comparison of pictures cannot show, because it starts from titok's own tokens."""
    models = Models("tiny-8", torch.float32, "cpu")
    assert models.ours("as it is").name == "as it is"
    _, generator = models.prepared
    generator.unprepare()
    with torch.no_grad():
        generator.lm_head.weight.copy_(generator.lm_head.weight.flip(0))
    with pytest.raises(RuntimeError, match="tokens of a step"):
        models.ours("broken")
