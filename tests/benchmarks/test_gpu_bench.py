"""`benchmarks.gpu` without a GPU: time limits, partial results, empty selections, and its parts."""

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

from benchmarks import gpu, gpu_report
from benchmarks.harness import dry_run, gpu_parts, gpu_tables
from benchmarks.harness.commands import run_limited
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_build_says_what_it_leaves_out() -> None:
    """By the script of the package, without pip."""
    command = [sys.executable, "-m", "benchmarks.harness.build"]
    environment = {**os.environ, "TITOK_BUILD": "none"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "built without titok._C: TITOK_BUILD=none" in done.stderr


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
    if line[-1] == "tests":  # of which these stand for all: to collect every test takes a minute
        line[-1:] = ["tests/gpu", "tests/ops/test_masked_attention.py"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert len(re.findall("^tests/.*::", done.stdout, re.MULTILINE)) >= 10
