"""Ctrl-C and SIGTERM: one line that says how to go on, the exit code 128 + signal, and no half-written file."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli_runner import titok
from titok import TiTok
from titok.cli.commands import app
from titok.data import digits
from titok.quickstart import run as quickstart

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("-t", "tok", "-g", "gen")
SMALL = ("--width", 64, "--layers", 1, "--batch-size", 2, "--steps", 2)
RESUME = "the same command with --resume goes on"
OVERWRITE = "the same command with --overwrite starts anew"
STARTS_ANEW = "the same command goes on with .tokens and .jsonl, and starts others anew"
GENERATE = "the same command goes on with a .npz, and starts a .png anew"
# Command, the first file that it writes, and how to go on after a signal.
COMMANDS = [
    (("tokenize", "photos", "-t", "tok", "-o", "t.npz"), "t.npz", STARTS_ANEW),
    (("tokenize", "photos", "-t", "tok", "-o", "t.safetensors"), "t.safetensors", STARTS_ANEW),
    (("detokenize", "tokens.npz", "-t", "tok", "-o", "out"), "out/a.png", OVERWRITE),
    (("reconstruct", "photos", "-t", "tok", "-o", "out"), "out/a.png", OVERWRITE),
    (("reconstruct", "photos", "-t", "tok", "-o", "r.png"), "r.png", OVERWRITE),
    (("generate", *MODELS, "-o", "s.png"), "s.png", GENERATE),
    (("generate", *MODELS, "-o", "s.npz"), "s.npz.parts/settings.json", GENERATE),
    (
        ("train", "tokenizer", "photos/cats/old", "-o", "run", "--image-size", 16, *SMALL),
        "run/training.safetensors",
        RESUME,
    ),
    (
        ("train", "generator", "photos/cats/old", "-t", "tok", "-o", "run", *SMALL),
        "run/training.safetensors",
        RESUME,
    ),
]


@pytest.fixture(autouse=True)
def _inputs(models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder: links to the folder photos and to the models tok and gen, and tokens.npz."""
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    Path("tok").symlink_to(models / "tokenizer")
    Path("gen").symlink_to(models / "generator")
    titok("tokenize", "photos", "-t", "tok", "-o", "tokens.npz")


@pytest.fixture(autouse=True)
def _ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C has Python's handler, also where a shell has started the tests in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("arguments", "file", "way"), COMMANDS, ids=[" ".join(map(str, c[0])) for c in COMMANDS])
def test_a_signal_in_the_middle_of_a_write(
    arguments: tuple[Any, ...], file: str, way: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files()
    chmod, handler = os.chmod, signal.getsignal(signal.SIGTERM)

    def signalled(path: Path, mode: int) -> None:
        """Takes the place of the last call before a complete file replaces the former one."""
        chmod(path, mode)
        os.kill(os.getpid(), number)
        time.sleep(0.1)  # the handler runs within

    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", signalled)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 128 + number, result.output
    assert result.stderr.splitlines()[-1] == f"interrupted: no file is half-written; {way}"
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not list(Path().rglob(".titok-*"))
    kept = {name: content for name, content in files().items() if not name.endswith(("lock", "metrics.jsonl"))}
    assert kept == before
    again = {RESUME: ["--resume"], OVERWRITE: ["--overwrite"]}.get(way, [])
    titok(*arguments, *again)
    assert Path(file).exists() or file.startswith("s.npz.parts")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra 'quickstart'")
@pytest.mark.slow
def test_a_signal_in_the_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    few = digits.Digits(*(values[:100] for values in digits.load_digits()))
    monkeypatch.setattr(quickstart, "load_digits", lambda: few)
    steps = {"tokenizer_steps": 3, "generator_steps": 3, "samples_per_class": 10}
    run = quickstart.run
    monkeypatch.setattr(quickstart, "run", lambda *args, **options: run(*args, **options, **steps))
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "measure", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1))
        result = CliRunner().invoke(app, ["quickstart", "-o", "run"])
    assert result.exit_code == 143, result.output
    assert result.stderr.splitlines()[-1] == f"interrupted: no file is half-written; {RESUME}"
    titok("quickstart", "-o", "run", "--resume")
    assert Path("run/report.html").exists()


class Signals:
    """Sends a signal to this process when it is deleted, which drops what the handler raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_an_object_is_deleted(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> None:
        held = [Signals(number)]
        held.clear()
        for _ in range(100):
            time.sleep(0.1)

    monkeypatch.setattr(TiTok, "encode", encode)
    result = CliRunner().invoke(app, ["tokenize", "photos", "-t", "tok", "-o", "t.npz"])
    assert result.exit_code == 128 + number
    assert "interrupted" in result.stderr


def test_a_handler_of_the_host_stays() -> None:
    """Where somebody has set a handler or ignores the signal, the command changes nothing."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        titok("tokenize", "photos", "-t", "tok", "-o", "t.npz")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_processes_of_a_launcher_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TiTok, "encode", interrupted)
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, ["tokenize", "photos", "-t", "tok", "-o", "t.npz"])
    assert result.exit_code == 130
    assert "interrupted" not in result.stderr


@pytest.mark.parametrize("command", ["tokenizer", "generator"])
def test_processes_without_a_launcher_are_refused(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["-t", "tok"] if command == "generator" else []
    result = CliRunner().invoke(app, ["train", command, "photos/cats/old", *options, "-o", "run"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set")
    assert not Path("run").exists()


WAITING = """
import sys, time
import titok.generation.sample_sets as sets
from titok.cli.commands import main
sets._Parts.join = lambda *_: print("joining", flush=True) or time.sleep(600)
sys.argv = ["titok", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_two_processes_end_while_one_waits_for_the_other() -> None:
    """The second process waits for the first one, which joins the parts. Both end at once."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TRITON_INTERPRET": "0"}
    arguments = ["generate", "-t", "tok", "-g", "gen", "-n", "8", "-o", "a.npz"]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address["MASTER_PORT"] = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, *arguments], env={**environment, **address, "RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        assert processes[0].stdout is not None
        assert processes[0].stdout.readline() == "joining\n", processes[0].communicate()
        began = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], errors
    assert errors[0].splitlines()[-1] == f"interrupted: no file is half-written; {GENERATE}"
    assert "Traceback" not in errors[1]
    assert time.monotonic() - began < 25, "a launcher kills what has not ended after 30 s"
