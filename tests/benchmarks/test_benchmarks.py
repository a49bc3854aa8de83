"""Tables, plots, regression check, profiles and documented commands; nothing is measured.

This file is longer than 400 lines because its tests share the result files that they read.
"""

from __future__ import annotations

import ast
import importlib
import json
import mmap
import re
import shlex
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

from benchmarks import (
    bench_masked_attention,
    bench_maskgit_decode_step,
    bench_nearest_codebook,
    plot,
    profile,
    regression,
    session,
    speedup,
)
from benchmarks import flops as flops_command
from benchmarks.harness import figures, gpu_parts, measures, rival_tables, sides, tables
from benchmarks.harness.commands import Outcome
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.results import Results, read
from titok import profiling

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


def side_row(results: Results, name: str, family: str, samples, calls, **case):
    case = {
        "name": name, "family": family, "resolution": 512, "dtype": "bf16", "device": "cpu", "batch": 2,
        "tokens": 64, "steps": 8, "parameters": 10**6, "note": "", "paper": None, **case,
    }  # fmt: skip
    return results.row(
        "speedup", case, samples, calls=calls, calls_without_pixels={"step": calls["step"]}, flops=4e9,
        flops_without_pixels=3e9, flops_counted=4e9, peak_bytes=2e9,
    )  # fmt: skip


@pytest.fixture
def file(tmp_path):
    """A results file with DiT as 250 times one step, one side of titok, and the stages of a preset."""
    results = Results(tmp_path / "r.jsonl")
    results.row("ceiling", {"dtype": "bf16"}, {"mm": [0.5], "copy": [0.1]}, work={"mm": 1e12, "copy": 1e9})
    dit = side_row(
        results, "DiT-XL/2 bf16", "dit", {"step": [2.0, 2.0, 4.0], "pixels": [10.0] * 3},
        {"step": 250, "pixels": 1}, steps=250, tokens=1024,
    )  # fmt: skip
    results.write(sides.fewer_steps(dit, 50))
    side_row(
        results,
        "titok-l-64-512",
        "titok-l-64-512",
        {"step": [1.0] * 3, "pixels": [1.0] * 3},
        {"step": 1, "pixels": 1},
    )
    results.note("nothing was left out")
    case = {"preset": "titok-l-32", "dtype": "bf16", "device": "cpu", "batch": 1}
    stages = {"encoder": {"flops": 1e12, "bytes": 1}, "generator": {"flops": 1, "bytes": 1e10}}
    samples = {"mm": [0.5], "copy": [0.1], "encoder": [1.0], "generator": [3.0]}
    results.row("roofline", case, samples, work={"mm": 1e12, "copy": 1e9}, stages=stages)
    return tmp_path / "r.jsonl"


def test_repeated_parts_are_multiplied(file):
    dit, fifty, ours = measures.select(read([file]), "speedup")
    assert measures.seconds(dit) == (250 * 2 + 10, 250 * 2 + 10, 250 * 4 + 10)
    assert measures.rate(dit)[0] == 2 / 510
    assert measures.rate(dit, "calls_without_pixels")[0] == 2 / 500
    assert measures.rate(fifty)[0] == 2 / 110
    assert fifty["flops"] == 3e9 / 5 + 1e9
    assert measures.rate(ours)[0] == 1.0


def test_headline_table_has_ratios_to_each_rival(file):
    header, cells = tables.speedup_table(read([file]))
    assert [len(line) for line in cells] == [len(header)] * 3
    ours = dict(zip(header, cells[-1], strict=True))
    assert ours["x bf16 (250)"] == "255"
    assert ours["x bf16 (50)"] == "55"
    assert ours["of mm"] == "0%"  # 4 GFLOP a second of 2,000
    assert dict(zip(header, cells[0], strict=True))["x bf16 (250)"] == "1"
    assert "255" in tables.all_tables(read([file]))


def test_floors(file):
    (record,) = measures.select(read([file]), "roofline")
    encoder, generator = measures.stages(record)
    assert (encoder["floor_s"], encoder["bound"], encoder["gap"]) == (0.5, "arithmetic", 2.0)
    assert (generator["floor_s"], generator["bound"], generator["gap"]) == (1.0, "memory", 3.0)


@pytest.mark.slow
def test_plots_come_from_the_file_alone(file, tmp_path, capsys):
    everything = ["--plots", *plot.PLOTS, "--out", str(tmp_path / "plots")]
    plot.main([str(file), *everything])
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.stem for path in written} == {"speed", "tokens", "stages"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_plots_go_where_the_documents_show_them():
    arguments = plot.parser().parse_args([])
    shown = re.findall(r"!\[[^]]*\]\((\w+)\.png\)", (ROOT / "docs/performance.md").read_text())
    assert set(shown) <= set(arguments.plots)
    assert {"speed", "ladder", "stages"} <= set(shown)  # the others are shown as soon as a results file has them
    assert arguments.out == ROOT / "docs"


def quality_rows(path: Path) -> Path:
    """A results file with models of a few steps and one of titok, which a one-step model beats."""
    results = Results(path)
    for name, family, seconds, fid, of in (
        ("one pass over pixels", "one step", 2.0, 2.75, "pMF-L/32"),
        ("aMUSEd", "amused", 70.0, None, None),
        ("titok-l-64-512", "titok-l-64-512", 8.0, 2.74, ""),
    ):
        samples = {"step": [seconds, seconds, 1.5 * seconds]}
        about = {"batch": 1, "fid": fid, "fid_source": fid and "a paper", "fid_of": of}
        side_row(results, name, family, samples, {"step": 1}, **about)
    return path


def test_rivals_of_today_say_where_titok_loses(tmp_path):
    rows = read([quality_rows(tmp_path / "r.jsonl")])
    table = rival_tables.rivals(rows, 512)
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    ours, pixels, amused = cells[2:]
    assert [cell.rstrip("*") for cell in ours[:2]] == ["titok-l-64-512", "2.74"]  # * on a busy machine
    assert pixels[1] == "2.75 (pMF-L/32)"
    assert pixels[5] == "2 ± 25.0%"
    assert pixels[-1] == "loses: 4 times as slow"
    assert (amused[1], amused[-1]) == ("none found", "8.75 times as fast")
    assert rival_tables.rivals(rows, 256) == rival_tables.NOTHING
    assert rival_tables.today(rows)["quality_picture"] == rival_tables.PICTURE
    assert rival_tables.today([])["quality_picture"] == rival_tables.NOTHING


@pytest.mark.slow
def test_quality_is_drawn_from_result_lines(tmp_path):
    rows = read([quality_rows(tmp_path / "r.jsonl")])
    assert plot.draw(rows, tmp_path, ["quality"]) == [tmp_path / "quality.png"]
    figure = plot.plt.figure(layout="constrained")
    plot.quality(rows, figure)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("work of pMF-L/32") == texts.count("titok-l-64-512, 8 steps") == 2  # by time and by FLOP
    plot.plt.close(figure)


@pytest.mark.slow
def test_labels_and_footer_stay_clear_of_each_other(tmp_path):
    """Twelve points close to each other, and more commits than a line of the footer holds."""
    figure = plot.plt.figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(1 + i % 3 / 50, 1 + i / 40, f"a model with a long name {i}") for i in range(12)]
    for x, y, _ in points:
        axes.plot(x, y, "o")
    environments = [{"cpu": "a processor with a name", "torch": "2.13", "commit": f"{i:010d}"} for i in range(40)]
    plot._credit(figure, [{"environment": about} for about in environments])
    plot._label(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to their points
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    (footer,) = figure.texts
    page = figure.bbox
    box = footer.get_window_extent()
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1
    assert page.y0 <= box.y0
    assert box.y1 <= axes.get_tightbbox().y0
    plot.plt.close(figure)


def test_stage_that_was_timed_too_few_times_has_no_gap(tmp_path):
    case = {"preset": "titok-l-32", "dtype": "bf16", "device": "cpu", "batch": 1}
    stages = {"encoder": {"flops": 1e12, "bytes": 1}, "generator": {"flops": 1e12, "bytes": 1}}
    enough = {"mm": [0.5] * 5, "copy": [0.1] * 5, "encoder": [0.4] * 5, "generator": [0.1, 3.0, 9.0, 1.0, 0.5]}
    row = Results(None).row("roofline", case, enough, work={"mm": 1e12, "copy": 1e9}, stages=stages)
    encoder, generator = tables.stage_table(row)[1]
    assert encoder[-2:] == ["0.8", "nothing"]  # faster than the product: nothing to save
    assert generator[-2:] == ["too few calls", "unknown"]


def test_flops_command(capsys):
    flops_command.main(["--preset", "titok-l-32"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("encoder", "generator", "ViT decoder", "pixel decoder", "171"))
    with pytest.raises(SystemExit):
        flops_command.main(["--help"])
    assert "usage: python -m benchmarks.flops" in capsys.readouterr().out


def test_commands_of_the_session_parse():
    for dtype in ("fp32", "bf16"):
        steps = session.steps(dtype)
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            module = importlib.import_module(f"benchmarks.{step.module}")
            arguments = module.parser().parse_args([*step.arguments, step.out, "r.jsonl"])
            if step.module == "speedup" and not arguments.ladder:
                rows = list(speedup.rows(arguments))
                assert len(rows) >= 2 or "--whole" in step.arguments, step
                assert rows[-1].startswith("titok"), step


def test_session_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Steps that this commit has measured are left out; one that fails is named and measured again."""
    out, ran = tmp_path / "r.jsonl", []

    def run_limited(command, limit, *rest):
        ran.append(command[2])
        with out.open("a") as file:
            file.write('{"kind": "note", "text": "a line"}\n')
        return Outcome(1.0, 1 if command[2].endswith("memory") and len(ran) < 3 else 0)

    monkeypatch.setattr(session, "run_limited", run_limited)
    monkeypatch.setattr(session, "ROOT", tmp_path)
    common = ["--dtype", "fp32", "--out", str(out), "--only", "=memory l-32,=dispatch"]
    assert session.main(common) == 1
    assert "not measured: memory l-32" in capsys.readouterr().out
    assert session.main(common) == 0
    assert "dispatch: measured before" in capsys.readouterr().out
    assert ran == ["benchmarks.memory", "benchmarks.bench_dispatch", "benchmarks.memory"]
    assert session.main([*common[:-1], "=dispatch", "--dtype", "bf16"]) == 0
    assert ran[3:] == ["benchmarks.bench_dispatch"]
    assert session.main(["--out", str(tmp_path / "other.jsonl"), "--only", "=dispatch", "--limit", "5"]) == 1
    assert "left out, 5 s are left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (409.6, "410"), (4.096, "4.1"), (0.04096, "0.041"), (12345, "12,300")],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def saved(path: Path, calibration: float, times: dict[str, float]) -> Path:
    rows = [{"fullname": n, "group": "models", "stats": {"min": t}} for n, t in times.items()]
    rows.append({"fullname": "c", "group": regression.CALIBRATION, "stats": {"min": calibration}})
    path.write_text(json.dumps({"benchmarks": rows}))
    return path


def test_regression_check_is_by_ratio_to_the_calibration(tmp_path, capsys):
    before = saved(tmp_path / "a.json", 1.0, {"decode": 10.0, "encode": 4.0, "gone": 1.0})
    machine_of_half_the_speed = saved(tmp_path / "b.json", 2.0, {"decode": 20.0, "encode": 8.4})
    assert regression.main([str(before), str(machine_of_half_the_speed)]) == 0
    slower = saved(tmp_path / "c.json", 2.0, {"decode": 20.0, "encode": 10.0})
    assert regression.main([str(before), str(slower)]) == 1
    assert "1.25x" in capsys.readouterr().out.splitlines()[3]
    empty = tmp_path / "empty.json"
    empty.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="calibration"):
        regression.calibrated(empty)


def test_regression_check_says_what_is_wrong_with_a_file(tmp_path, capsys):
    fine, other = tmp_path / "fine.json", tmp_path / "other.json"
    fine.write_text(
        json.dumps({"benchmarks": [{"fullname": "c", "group": regression.CALIBRATION, "stats": {"min": 1}}]})
    )
    for text, problem in (
        (None, "other.json: expected a file of --benchmark-json"),
        ("{", "other.json: expected a file of --benchmark-json"),
        ("[]", "other.json: expected a file of --benchmark-json"),
        ('{"benchmarks": []}', "other.json: expected one benchmark of group"),
        (fine.read_text(), "fine.json: expected a benchmark that"),
    ):
        if text is not None:
            other.write_text(text)
        with pytest.raises(SystemExit) as ended:
            regression.main([str(other), str(fine)])
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err


def test_memory_of_a_piece_of_work():
    def work():
        mmap.mmap(-1, 1 << 26).write(bytes(1 << 26))  # a mapping of its own, so that no memory is reused

    growth = peak_growth(work, "cpu")
    assert growth is None or growth > 1 << 25


def test_own_time_of_ranges():
    def event(name, start, end):
        span = type("Span", (), {"start": start, "end": end})
        return type("Event", (), {"name": name, "time_range": span})

    events = [
        event("titok: generate", 0, 100e3), event("titok: step 0", 10e3, 40e3), event("titok: step 1", 40e3, 60e3),
        event("titok: op", 20e3, 30e3), event("aten::mm", 21e3, 22e3),
    ]  # fmt: skip
    found = {name: row for name, *row in profile.by_range(events)}
    assert found == {"generate": [1, 0.1, 0.05], "step": [2, 0.05, pytest.approx(0.04)], "op": [1, 0.01, 0.01]}


def test_profile_on_a_cpu_writes_a_trace(tmp_path):
    def run():
        with profiling.annotate("outer"):
            time.sleep(0.001)

    ranges = profile.on_cpu(run, 2, tmp_path / "new" / "trace.json")
    assert [(name, calls) for name, calls, *_ in ranges if name == "outer"] == [("outer", 2)]
    assert any(
        e.get("name") == "titok: outer"
        for e in json.loads((tmp_path / "new/trace.json").read_text())["traceEvents"]
    )


def test_kernel_filter_names_the_kernels_of_this_repository():
    pytest.importorskip("triton")
    from titok.kernels import aot

    names = profile.kernel_names()
    modules = [importlib.import_module(f"titok.kernels.{name}") for name in aot.modules([])]
    compiled = [variant.kernel for module in modules for variant in module.aot_variants()]
    in_cuda = {
        "maskgit_decode_kernel",
        *(f"masked_decode_{n}_kernel" for n in ("candidates", "stage", "find", "accept")),
    }
    assert {kernel.__name__ for kernel in compiled} | in_cuda == set(names)
    line = profile.command_lines(profile.parser().parse_args(["--target", "generate"]))["ncu"]
    (pattern,) = [word.removeprefix("--kernel-name=regex:") for word in line if word.startswith("--kernel-name")]
    for name in names:
        assert re.match(pattern, name)
    assert not re.match(pattern, "ampere_sgemm_128x64_tn")


OPTIONS = {
    "nsys": {
        "--trace",
        "--capture-range",
        "--capture-range-end",
        "--cuda-graph-trace",
        "--force-overwrite",
        "--output",
    },
    "ncu": {
        "--set",
        "--profile-from-start",
        "--nvtx",
        "--nvtx-include",
        "--kernel-name",
        "--force-overwrite",
        "--export",
    },
}


def parse(command: str) -> bool:
    """Whether `command` runs a benchmark. Fails if it, or a profiler around it, is given an unknown option."""
    words = shlex.split(command, comments=True)
    if words[:1] in (["nsys"], ["ncu"]) and "-m" in words:
        inner = words.index("python")
        tool = [word.partition("=")[0] for word in words[1:inner] if word.startswith("--")]
        assert set(tool) <= OPTIONS[words[0]], command
        words = words[inner:]
    if words[:2] != ["python", "-m"] or not words[2].startswith("benchmarks."):
        return False
    module = importlib.import_module(words[2])
    arguments = [word for word in words[3:] if word != "..."]
    if "--help" not in arguments:
        module.parser().parse_args(arguments)
    return True


@pytest.mark.parametrize("target", profile.TARGETS)
def test_printed_profiler_commands_parse(target):
    arguments = profile.parser().parse_args(["--target", target, "--preset", "titok-s-128", "--batch", "8"])
    for line in profile.command_lines(arguments).values():
        assert parse(shlex.join(line))


def test_documented_commands_parse():
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        found += re.findall(r"`((?:python -m benchmarks|nsys |ncu )[^`\n]*)`", text)
        found += re.findall(r"^\s*((?:python -m benchmarks|nsys |ncu )[^`\n]*)$", text, re.MULTILINE)
    own = [c for c in found if "<" not in c and "[" not in c and not re.search(r"\.bench_(?!models)", c)]
    checked = [command for command in own if parse(command)]
    words = {word for command in checked for word in shlex.split(command, comments=True)}
    commands = {
        "engine", "flops", "gpu", "gpu_report", "kernel_times", "memory", "plot", "profile", "regression", "report",
        "roofline", "session", "speedup", "tune", "waiting",
    }  # fmt: skip
    assert words >= {"nsys", "ncu", *(f"benchmarks.{name}" for name in commands)}


def test_rows_can_be_chosen():
    arguments = speedup.parser().parse_args(
        ["--resolution", "256", "--rows", "DiT, l-32", "--device", "cpu", "--dtype", "fp32"]
    )
    assert list(speedup.rows(arguments)) == [
        "DiT-XL/2 as published, fp32",
        "DiT-XL/2, 20 DPM-Solver steps",
        "DiT-XL/2, 10 DPM-Solver steps",
        "one pass of DiT-XL/2",
        "one pass of DiT-XL/1, deep",
        "titok-l-32 eager",
        "titok-l-32",
    ]
    headline = speedup.parser().parse_args(
        ["--resolution", "512", "--rows", "=titok-l-64-512,compiled,as published", "--device", "cuda"]
    )
    assert list(speedup.rows(headline)) == [
        "titok-l-64-512",
        "DiT-XL/2 bf16, compiled",
        "DiT-XL/2 as published, fp32",
    ]
    ladder = speedup.parser().parse_args(["--ladder", "titok-l-32", "--device", "cpu"])
    rungs = [
        "eager fp32",
        "bf16",
        "SDPA: as published",
        "channels-last",
        "folded upsampling",
        "fused ops",
        "fused decode",
        "prepared weights: titok",
    ]
    assert list(speedup.rows(ladder)) == rungs


def test_makefile_runs_every_op_benchmark():
    makefile = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"^OPS := (.*)$", makefile, re.MULTILINE)
    assert tuple(listed.split()) == gpu_parts.OPS
    others = {"bench_dispatch", "bench_masked_decode_step", "bench_models"}
    found = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} - others
    assert found == {f"bench_{op}" for op in gpu_parts.OPS}


def test_benchmarks_use_public_names_only():
    """No private module or name of titok or of another benchmark, and nothing that patches them."""
    found = []
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("titok", "benchmarks"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                assert "mock" not in [*module.split("."), *(alias.name for alias in node.names)], path
            found += [f"{path.name}: {name}" for name in names if re.match("_(?!_)", name)]
    assert not found


def test_strongest_rivals_of_ops_compute_the_same():
    """faiss finds the nearest codes, and every back end of SDPA attends; as the plain path does."""
    latents, codebook = bench_nearest_codebook.case(50, 30, 4, "cpu")
    if (search := bench_nearest_codebook.faiss_search(codebook)) is not None:
        assert torch.equal(search(latents, codebook), bench_nearest_codebook.official(latents, codebook))
    qkv, heads = bench_masked_attention.rotated(torch.randn(1, 5, 3 * 2 * 8), 2, seed=3)
    plain = bench_masked_attention.eager(qkv, heads)
    runs = [
        partial(bench_masked_attention.sdpa_by, backend) for backend in bench_masked_attention.BACKENDS.values()
    ]
    ran = [run(qkv, heads) for run in runs if bench_masked_attention.takes(run, qkv, heads)]
    assert len(ran) >= 2
    assert all(float((out - plain).abs().max()) < 1e-5 for out in ran)


@pytest.mark.slow
def test_scheduler_of_diffusers_masks_as_many_codes():
    pytest.importorskip("diffusers")
    step, codes = bench_maskgit_decode_step.diffusers_step(), bench_maskgit_decode_step.CODES
    inputs = bench_maskgit_decode_step.case(2, 4, torch.float32, "cpu")
    before, after = (int((tokens == codes).sum()) for tokens in (inputs[0], step(*inputs, 4)))
    assert 0 < after < before


def test_best_sdpa_is_the_fastest_back_end():
    row = {"samples_s": {"titok": [1.0], "sdpa": [4.0], "math": [9.0], "flash": [2.0], "views": [3.0]}}
    assert figures._ratios([row], "best SDPA") == "2"
    del row["samples_s"]["math"]  # results from before all back ends were timed say nothing of the best
    assert figures._peer_times(row, "best SDPA") == []
