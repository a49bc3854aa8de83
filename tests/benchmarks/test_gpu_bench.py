"""`benchmarks.gpu` without a GPU: time limits, partial results, empty selections, its parts, and the report."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_report, kernel_times, tune
from benchmarks.harness import dry_run, gpu_parts, gpu_tables
from benchmarks.harness.commands import run_limited
from benchmarks.harness.compiled import compiled_parts
from benchmarks.harness.gpu_parts import PARTS, Command, Context, LeftOut, Part
from benchmarks.harness.results import Results, read, read_others

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def runs(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------
# Commands with time limits

SPAWNS = """
import subprocess, sys, time
code = "import signal, time; signal.signal(15, lambda *_: None); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
print(child.pid, flush=True)
{rest}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rest", "limit", "verdict"),
    [
        (
            "time.sleep(60)",
            1.5,
            "stopped after 2 s",
        ),  # the command is stopped, and its child, which ignores SIGTERM
        ("time.sleep(0.5)", 30, "ok"),  # the command ends, and leaves its child behind
    ],
)
def test_nothing_outlives_a_command(rest: str, limit: float, verdict: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = time.monotonic()
    outcome = run_limited(python(SPAWNS.format(rest=rest)), limit, log, os.environ, tmp_path)
    assert outcome.verdict == verdict
    assert time.monotonic() - started < 20
    assert not runs(int(log.read_text().split()[0]))


def test_output_is_kept_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    code = "import sys, time; print('first', flush=True); print('second', file=sys.stderr, flush=True); time.sleep(60)"
    assert run_limited(python(code), 1.0, log, os.environ, tmp_path).verdict == "stopped after 1 s"
    assert log.read_text().splitlines() == capsys.readouterr().out.splitlines() == ["first", "second"]
    assert run_limited(python("raise SystemExit(3)"), 30, log, os.environ, tmp_path).verdict == "exit status 3"
    assert run_limited(["/no/such/program"], 30, log, os.environ, tmp_path).verdict.startswith("not started: ")


@pytest.mark.slow
def test_a_killed_run_ends_its_command(tmp_path: Path) -> None:
    """As by `timeout`, which sends SIGTERM to the run alone."""
    code = f"""
import os, signal, sys
from pathlib import Path
from benchmarks.harness.commands import run_limited
signal.signal(signal.SIGTERM, lambda *_: sys.exit(64))
run_limited([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], 60,
            Path({str(tmp_path / "log")!r}), os.environ, Path("."))
"""
    process = subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.terminate()
    assert process.wait(20) == 64
    assert not runs(child)


# ---------------------------------------------------------------------------------------------------------------
# The session


def session_of(folder: Path, budget: float, commands: list[Command]) -> gpu.Session:
    session = gpu.Session(folder, budget, dict(os.environ), dry=False)
    session.run_parts({1: Part("one", tuple(commands[:2])), 3: Part("three", tuple(commands[2:]))})
    return session


def prints(name: str, code: str, **more: Any) -> Command:
    """A command that runs code in which `write` appends text to the results file."""

    def line(context: Context, seconds: float) -> list[str]:
        return python(f"def write(text): open({str(context.results)!r}, 'a').write(text)\n{code}")

    return Command(name, more.pop("weight", 1.0), line, least=0.0, **more)


def test_a_failure_stops_nothing_and_partial_results_survive(tmp_path: Path) -> None:
    def missing(context: Context, seconds: float) -> list[str]:
        raise LeftOut("the tool is not installed")

    row = json.dumps({"kind": "row", "bench": "x", "case": {}})
    environment = json.dumps({"kind": "environment", "time": "2026-01-01"})
    session = session_of(
        tmp_path,
        60.0,
        [
            prints("cut", f"write({environment + chr(10) + row + chr(10) + row[:9]!r}); raise SystemExit(1)"),
            Command("missing", 1.0, missing),
            prints("stopped", f"write({row[:12]!r}); import time; time.sleep(60)", weight=0.03),
            prints("fine", f"write({environment + chr(10) + row + chr(10)!r})"),
        ],
    )
    ended = read_others([session.context.results], "command")
    assert [(record["part"], record["name"]) for record in ended] == [
        (1, "cut"),
        (1, "missing"),
        (3, "stopped"),
        (3, "fine"),
    ]
    verdicts = [record["verdict"] for record in ended]
    assert verdicts[:2] == ["exit status 1", "left out: the tool is not installed"]
    assert verdicts[2].startswith("stopped after ")
    assert verdicts[3] == "ok"
    assert len(read([session.context.results])) == 2
    assert session.status() == 1 + 4
    assert "left out: the tool is not installed" in session.summary()
    assert "## Commands" in gpu_report.report([session.context.results])


def test_time_is_divided_by_weight_and_what_is_left_over_goes_on(tmp_path: Path) -> None:
    limits: list[float] = []

    def line(context: Context, seconds: float) -> list[str]:
        limits.append(seconds)
        return ["true"]

    commands = [Command(str(weight), weight, line) for weight in (3.0, 1.0, 1.0, 5.0)]
    session = session_of(tmp_path, 100.0, commands)
    assert limits == pytest.approx([30, 100 / 7, 100 / 6, 100], rel=0.1)
    assert session.status() == 0
    late = session_of(tmp_path, 9.0, commands)
    assert [verdict for _, _, verdict, _ in late.verdicts] == ["no time left"] * 3 + ["no time left"]
    assert late.status() == 1 + 4


def test_what_is_important_comes_first() -> None:
    """TiTok before DiT, the decode step before other tests, and every part has a name and commands."""
    assert list(PARTS) == [1, 2, 3, 4, 5, 6]
    context = Context(Path("r.jsonl"))
    first = PARTS[1].commands[0].line(context, 60.0)
    assert "tests/ops/test_maskgit_decode_gpu.py" in first
    assert first[first.index("-n") + 1] == "8"
    headline = PARTS[2].commands[0].line(context, 60.0)
    assert headline[headline.index("--rows") + 1].split(",") == ["=titok-l-64-512", "compiled", "as published"]
    for part in PARTS.values():
        assert sum(command.weight for command in part.commands) > 0
    assert [command.name for command in PARTS[3].commands] == list(gpu_parts.OPS)


def test_sanitizers_check_the_small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    memcheck, racecheck = PARTS[4].commands
    context = Context(Path("r.jsonl"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(LeftOut, match="compute-sanitizer is not installed"):
        memcheck.line(context, 60.0)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    for tool, command in (("memcheck", memcheck), ("racecheck", racecheck)):
        line = command.line(context, 60.0)
        assert line[:3] == ["/bin/compute-sanitizer", "--tool", tool]
        assert "-n" not in line  # one process, which the tool sees
        assert line[-1] == "tests/gpu/test_gpu_small_cases.py"
        assert (ROOT / line[-1]).exists()


@pytest.mark.parametrize("number", [2, 3, 5, 6])
def test_arguments_of_the_benchmarks_parse(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in PARTS[number].commands:
        line = command.line(Context(tmp_path / "r.jsonl", dry=True), 60.0)
        assert line[1:3] == ["-m", "benchmarks.harness.dry_run"]
        dry_run.main(line[3:])
        assert "would run: python -m benchmarks." in capsys.readouterr().out


def test_slowest_kernels_come_from_the_results(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(LeftOut, match="were not measured"):
        gpu_parts.slowest_kernels(path, 2)
    ours = {name: {"calls": 1.0, "seconds": seconds} for name, seconds in (("a", 1.0), ("b", 3.0), ("c", 2.0))}
    Results(path).row("kernel_times", {"preset": "p", "dtype": "bf16", "batch": 1}, {}, kernels=ours, ours=ours)
    with path.open("a") as file:
        file.write('{"kind": "ro')
    assert gpu_parts.slowest_kernels(path, 2) == ["b", "c"]


def test_a_package_comes_from_a_wheel_or_a_folder(tmp_path: Path) -> None:
    wheels, unpacked = tmp_path / "wheels", tmp_path / "unpacked"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("thing/__init__.py", "")
    for path in (wheels, wheels / "thing-1.0-py3-none-any.whl"):
        assert gpu.packages(path, unpacked) == unpacked
        assert (unpacked / "thing" / "__init__.py").exists()
    assert gpu.packages(unpacked, tmp_path / "other") == unpacked
    with pytest.raises(SystemExit) as error:
        gpu.packages(tmp_path / "missing", unpacked)
    assert error.value.code == gpu.NOTHING_RAN
    arguments = argparse.Namespace(diffusers=wheels, commit="abc")
    environment = gpu.child_environment(arguments, unpacked)
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(unpacked)]
    assert environment["TITOK_COMMIT"] == "abc"
    assert "TRITON_INTERPRET" not in environment


@pytest.mark.slow
def test_nothing_runs_without_cuda_kernels(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu", "--no-build", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == gpu.NOTHING_RAN
    assert "torch finds no CUDA device" in done.stderr
    (machine,) = read_others(tmp_path.glob("*.jsonl"), "machine")
    assert machine["reasons"]


# ---------------------------------------------------------------------------------------------------------------
# Lines of tests

TESTS = """
import pytest
@pytest.mark.parametrize("n", range(3))
def test_fine(n): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_broken(broken): pass
"""


def run_tests(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """The exit status of pytest, its lines, and its last line."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_some.py").write_text(TESTS)
    lines = folder / "lines.jsonl"
    lines.unlink(missing_ok=True)
    command = Context(lines).tests("some", *arguments, workers=0)
    done = subprocess.run(
        [*command, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    return done.returncode, read_others([lines], "test"), read_others([lines], "tests")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_each_test_has_a_line(workers: list[str], tmp_path: Path) -> None:
    status, lines, (last,) = run_tests(tmp_path, *workers)
    assert status == 1
    outcomes = {line["test"].partition("::")[2]: line["outcome"] for line in lines}
    assert outcomes == {
        **{f"test_fine[{n}]": "passed" for n in range(3)},
        "test_wrong": "failed",
        "test_skipped": "skipped",
        "test_broken": "failed",
    }
    messages = {line["test"].partition("::")[2]: line.get("message", "") for line in lines}
    assert "assert 1 == 2" in messages["test_wrong"]
    assert "no fixture" in messages["test_broken"]
    assert messages["test_skipped"] == "Skipped: not today"
    assert (last["passed"], last["failed"], last["skipped"]) == (3, 2, 1)
    shown = gpu_tables.tests(lines)
    assert "| some | 3 | 2 | 1 |" in shown
    assert "test_wrong`: assert 1 == 2" in shown


@pytest.mark.slow
def test_an_empty_selection_is_an_error(tmp_path: Path) -> None:
    for selection in ("nothing", "skipped"):
        status, _, (last,) = run_tests(tmp_path, "-k", selection)
        assert status == pytest.ExitCode.NO_TESTS_COLLECTED
        assert last["passed"] == 0
    assert run_tests(tmp_path, "-k", "fine")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("part", "number"), [(1, 0), (1, 1), (4, 0)])
def test_tests_are_selected(part: int, number: int, tmp_path: Path) -> None:
    """Collected as `make gpu DRY=1` does; a run of no tests would have another exit status."""
    line = PARTS[part].commands[number].line(Context(tmp_path / "r.jsonl", dry=True), 60.0)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert len(re.findall("^tests/.*::", done.stdout, re.MULTILINE)) >= 10


# ---------------------------------------------------------------------------------------------------------------
# Report


def on_a_gpu(path: Path, time: str) -> Results:
    """A results file whose environment is that of a GPU."""
    results = Results(None)
    results.path = path
    about = {
        "time": time,
        "gpu": "NVIDIA H200",
        "torch": "2.11.0",
        "commit": "0123456789ab",
        "command": "python -m x",
    }
    results.write({"kind": "environment", **about})
    return results


def comparison_row(results: Results, bench: str, name: str, family: str, batch: int, seconds: float) -> None:
    case = {
        "name": name, "family": family, "resolution": 512, "dtype": "bf16", "device": "cuda", "batch": batch,
        "tokens": 64, "steps": 250 if family == "dit" else 8, "parameters": 10**6, "note": "", "paper": None,
    }  # fmt: skip
    one = {"all": 1}
    results.row(
        bench, case, {"all": [seconds] * 3}, calls=one, calls_without_pixels=one, flops=1e12, flops_without_pixels=1e12,
        flops_counted=1e12, peak_bytes=2e9,
    )  # fmt: skip


def test_report_of_a_run_that_was_cut_off(tmp_path: Path) -> None:
    """The comparison has no row of "speedup" yet: the fastest batch size that was tried stands in the table."""
    path = tmp_path / "r.jsonl"
    results = on_a_gpu(path, "2026-01-01T00:00:00Z")
    for batch, seconds in ((1, 0.01), (64, 0.16), (128, 0.4)):
        comparison_row(results, "sweep", "titok-l-64-512", "titok-l-64-512", batch, seconds)
    comparison_row(results, "sweep", "DiT-XL/2 bf16, compiled", "dit", 32, 32.0)
    with path.open("a") as file:
        file.write('{"kind": "row", "bench": "swe')
    text = gpu_report.report([path])
    assert "### TiTok against DiT-XL/2, 512 pixels" in text
    assert "| img/s | 400 | 1 |" in text
    assert "| x bf16, compiled (250) | 400 | 1 |" in text
    assert "| titok-l-64-512 | 128 | 320 |" in text
    assert "NVIDIA H200" in text


def test_report_of_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results = on_a_gpu(path, "2026-01-01T00:00:00Z")
    work = {"copy": 4e9, "product": 1e12}
    results.row("ceilings", {"dtype": "bfloat16"}, {"copy": [1e-3], "product": [2e-3]}, work=work)
    samples = {"eager": [4e-3], "titok": [2e-3], "compiled": [3e-3]}
    case = {"B": 64, "C": 128, "px": 256, "residual": "no", "dtype": "bfloat16"}
    results.row("group_norm_silu", case, samples, num_bytes=4e9, flops=1e11)
    other = {"preset": "titok-l-32", "dtype": "bf16", "device": "cuda", "batch": 1}
    of_stages = {"mm": 1e12, "copy": 1e9}
    stages = {"generator": {"flops": 1e12, "bytes": 1e6}}
    timed = {"mm": [0.5], "copy": [0.1], "generator": [1.0]}
    results.row("roofline", other, timed, work=of_stages, stages=stages)
    results.row("engine", other, {"mm": [0.5], "copy": [0.1], "titok": [0.008]}, work={**of_stages, "titok": 1e11})
    comparison_row(results, "rung", "bf16", "titok-l-32", 32, 1.0)
    kernels = {"a_kernel": {"calls": 2.0, "seconds": 3e-3}, "another": {"calls": 1.0, "seconds": 1e-3}}
    results.row("kernel_times", other, {}, kernels=kernels, ours=kernels)
    tiles = {tune.CURRENT: [2e-3], "(64, 64, 8, 2)": [1e-3]}
    results.row("tuning", {"kernel": "a_kernel", "constant": "A", "shape": "B=1"}, tiles)
    text = gpu_report.report([path])
    assert "| B=64 C=128 px=256 residual=no | bfloat16 | 2 | 2,000 | 50% | 50 | 10% | 2.00x | 1.50x |" in text
    assert "| generator | 1,000 | 1 | 500 | arithmetic | 1,000 | 2 | 500 |" in text
    assert "| titok | 125 |" in text
    assert "### Ladder of titok-l-32" in text
    assert "| a_kernel | 2 | 3 | 75% |" in text
    assert "| a_kernel | B=1 | (64, 64, 8, 2) | 1 | 2.00x |" in text
    assert gpu_tables.measured([]) == gpu_tables.NOTHING


# ---------------------------------------------------------------------------------------------------------------
# Compiled peers, kernels and tiles


@pytest.mark.slow
def test_whether_a_call_is_compiled() -> None:
    module = torch.nn.Linear(4, 4)
    compiled, x = torch.compile(module, backend="aot_eager"), torch.randn(2, 4)
    compiled(x)
    assert compiled_parts(lambda: compiled(x)) >= 1
    assert compiled_parts(lambda: module(x)) == 0
    with torch.compiler.set_stance("force_eager"):
        assert compiled_parts(lambda: compiled(x)) == 0


def test_times_of_kernels() -> None:
    class Span:
        def __init__(self, microseconds: float) -> None:
            self.microseconds = microseconds

        def elapsed_us(self) -> float:
            return self.microseconds

    def event(name: str, microseconds: float, device: Any) -> Any:
        return argparse.Namespace(name=name, time_range=Span(microseconds), device_type=device)

    kinds = torch.autograd.DeviceType
    events = [event("group_norm_silu_sums", 30.0, kinds.CUDA)] * 4 + [event("aten::mm", 9.0, kinds.CPU)]
    times = kernel_times.kernel_times([*events, event("cutlass_gemm", 10.0, kinds.CUDA)], calls=2)
    assert times["group_norm_silu_sums"] == {"calls": 2.0, "seconds": pytest.approx(60e-6)}
    assert set(times) == {"group_norm_silu_sums", "cutlass_gemm"}
    assert set(kernel_times.ours(times)) == {"group_norm_silu_sums"}


SMALL = {
    "masked_attention_forward_tiled": lambda: tune.attention(((1, 180, 1, 64),), "cpu"),
    "masked_attention_forward_whole": lambda: tune.attention(((1, 33, 1, 48),), "cpu"),
    "group_norm_silu_sums": lambda: tune.group_norm(((1, 32, 40),), "cpu"),
    "group_norm_silu_normalise": lambda: tune.group_norm(((1, 32, 40),), "cpu"),
    "group_norm_silu_one_pass": lambda: tune.group_norm(((1, 64, 32),), "cpu"),
    "code_mixture_forward": lambda: tune.mixture(5, "cpu"),
    "add_layer_norm_forward": lambda: tune.add_norm(3, 512, "cpu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", list(tune.TUNABLES))
def test_tiles_take_the_place_of_those_of_the_table(kernel: str) -> None:
    """In Triton's interpreter: the launch changes, the result does not, and the table is as before afterwards."""
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    from titok.kernels._launch import record

    tunable = tune.TUNABLES[kernel]
    (call,) = SMALL[kernel]().values()
    with torch.no_grad():
        reference = call()
        current = getattr(tune.holders(tunable.constant)[0], tunable.constant)
        with record() as before:
            call()
        assert kernel in {launch.kernel.__name__ for launch in before}
        values = [tune.with_entry(current, tunable.key, candidate) for candidate in tunable.candidates]
        changed = []
        for value in values:
            with tune.in_place(tunable.constant, value), record() as after:
                call()
            changed.append(after != before)
        assert any(changed)
        with tune.in_place(tunable.constant, values[changed.index(True)]):
            assert tune.is_close(call(), reference)
    assert getattr(tune.holders(tunable.constant)[0], tunable.constant) is current


@pytest.mark.slow
def test_tuning_writes_a_row_for_each_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tunable = tune.TUNABLES["add_layer_norm_forward"]
    monkeypatch.setitem(
        tune.TUNABLES,
        "small",
        tunable._replace(calls=lambda device: tune.add_norm(3, 512, device), candidates=(128,)),
    )
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    tune.tune("small", Results(tmp_path / "r.jsonl"), "cpu", end=time.monotonic() + 60)
    tune.tune("small", Results(tmp_path / "r.jsonl"), "cpu", end=0.0)
    (row,) = read([tmp_path / "r.jsonl"])
    assert list(row["samples_s"]) == [tune.CURRENT, "128"]
    shown = capsys.readouterr().out
    assert "M=3 D=512" in shown
    assert "no time left" in shown
