"""Tables, regression check, profiles and documented commands of the benchmarks, without timing anything."""

from __future__ import annotations

import importlib
import json
import mmap
import re
import shlex
import time
from pathlib import Path

import pytest

from benchmarks import _sides, _tables, plot, profile, regression, roofline, speedup
from benchmarks._memory import peak_growth
from benchmarks._results import Results
from titok import profiling
from titok.kernels import aot

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


def side_row(results: Results, name: str, family: str, samples, whole, **case):
    case = {
        "name": name, "family": family, "resolution": 512, "dtype": "bf16", "device": "cpu", "batch": 2, "tokens": 64,
        "steps": 8, "parameters": 10**6, "note": "", "paper": None, **case,
    }  # fmt: skip
    return results.row(
        "speedup", case, samples, whole=whole, bare={"step": whole["step"]}, flops=4e9, bare_flops=3e9,
        flops_counted=4e9, peak_bytes=2e9,
    )  # fmt: skip


@pytest.fixture
def file(tmp_path):
    """A result file of two sides, one "250 x one step", and of a stage table."""
    results = Results(tmp_path / "r.jsonl")
    results.row("ceiling", {"dtype": "bf16"}, {"mm": [0.5], "copy": [0.1]}, work={"mm": 1e12, "copy": 1e9})
    dit = side_row(
        results, "DiT-XL/2 bf16", "dit", {"step": [2.0, 2.0, 4.0], "pixels": [10.0] * 3}, {"step": 250, "pixels": 1},
        steps=250, tokens=1024,
    )  # fmt: skip
    results.write(_sides.fewer_steps(dit, 50))
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
    dit, fifty, ours = _tables.of(list(_tables.read([file])), "speedup")
    assert _tables.seconds(dit) == (250 * 2 + 10, 250 * 2 + 10, 250 * 4 + 10)
    assert _tables.rate(dit)[0] == 2 / 510
    assert _tables.rate(dit, "bare")[0] == 2 / 500
    assert _tables.rate(fifty)[0] == 2 / 110
    assert fifty["flops"] == 3e9 / 5 + 1e9
    assert _tables.rate(ours)[0] == 1.0


def test_headline_table_has_ratios_to_each_rival(file):
    header, cells = _tables.speedup_table(list(_tables.read([file])))
    assert [len(line) for line in cells] == [len(header)] * 3
    ours = dict(zip(header, cells[-1], strict=True))
    assert ours["x bf16 (250)"] == "255"
    assert ours["x bf16 (50)"] == "55"
    assert ours["of mm"] == "0%"  # 4 GFLOP a second of 2,000
    assert dict(zip(header, cells[0], strict=True))["x bf16 (250)"] == "1"
    assert "255" in plot.tables(list(_tables.read([file])))


def test_floors(file):
    (record,) = _tables.of(list(_tables.read([file])), "roofline")
    encoder, generator = roofline.rows(record)
    assert (encoder["floor_s"], encoder["bound"], encoder["gap"]) == (0.5, "arithmetic", 2.0)
    assert (generator["floor_s"], generator["bound"], generator["gap"]) == (1.0, "memory", 3.0)


def test_pictures_from_the_file_alone(file, tmp_path):
    written = plot.draw(list(_tables.read([file])), tmp_path / "figures")
    assert {path.stem for path in written} == {"speed_against_flops", "cost_against_tokens", "stages"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (409.6, "410"), (4.096, "4.1"), (0.04096, "0.041"), (12345, "12,300")],
)
def test_numbers(value, text):
    assert _tables.number(value) == text


def saved(path: Path, calibration: float, times: dict[str, float]) -> Path:
    rows = [{"fullname": n, "group": "models", "stats": {"min": t}} for n, t in times.items()]
    rows.append({"fullname": "c", "group": regression.CALIBRATION, "stats": {"min": calibration}})
    path.write_text(json.dumps({"benchmarks": rows}))
    return path


def test_regression_check_is_by_ratio_to_the_calibration(tmp_path, capsys):
    before = saved(tmp_path / "a.json", 1.0, {"decode": 10.0, "encode": 4.0, "gone": 1.0})
    twice_as_slow_a_machine = saved(tmp_path / "b.json", 2.0, {"decode": 20.0, "encode": 8.4})
    assert regression.main([str(before), str(twice_as_slow_a_machine)]) == 0
    slower = saved(tmp_path / "c.json", 2.0, {"decode": 20.0, "encode": 10.0})
    assert regression.main([str(before), str(slower)]) == 1
    assert "1.25x" in capsys.readouterr().out.splitlines()[3]
    empty = tmp_path / "empty.json"
    empty.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="calibration"):
        regression.calibrated(empty)


def test_memory_of_a_piece_of_work():
    growth = peak_growth(lambda: mmap.mmap(-1, 1 << 26).write(bytes(1 << 26)), "cpu")  # past the allocator's pools
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


def test_kernel_filter_names_our_kernels():
    names = profile.kernel_names()
    compiled = [v.kernel for module in aot.modules([]) for v in aot._module(module).aot_variants()]
    assert {kernel.__name__ for kernel in compiled} | {"maskgit_decode_kernel"} == set(names)
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
    """Whether `command` runs a benchmark; its arguments, and those of the profiler around it, must be known."""
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
    commands = {"engine", "plot", "profile", "regression", "roofline", "speedup"}
    assert words >= {"nsys", "ncu", *(f"benchmarks.{name}" for name in commands)}


def test_rows_can_be_chosen():
    arguments = speedup.parser().parse_args(
        ["--resolution", "256", "--rows", "DiT, l-32", "--device", "cpu", "--dtype", "fp32"]
    )
    assert list(speedup.rows(arguments)) == ["DiT-XL/2 as published, fp32", "titok-l-32 eager", "titok-l-32"]
    ladder = speedup.parser().parse_args(["--ladder", "titok-l-32", "--device", "cpu"])
    rungs = [
        "eager fp32",
        "bf16",
        "SDPA: as published",
        "channels-last",
        "folded upsampling",
        "fused ops",
        "fused decode",
        "weights laid out",
        "titok",
    ]
    assert list(speedup.rows(ladder)) == rungs
