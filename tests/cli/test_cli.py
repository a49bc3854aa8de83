"""The command line: help, errors, `titok train`, `titok quickstart` and `titok info`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli_runner import NAMES, pixels, refused, titok
from titok import TiTok, __version__
from titok.cli.commands import app
from titok.config import TOKENIZER_PRESETS

COMMANDS = [["quickstart"], ["tokenize"], ["detokenize"], ["reconstruct"], ["generate"], ["demo"], ["info"]]
COMMANDS += [["train", recipe] for recipe in ("vqgan", "proxy", "decoder", "tokenizer", "generator")]
COMMANDS += [["evaluate", "reconstruction"], ["evaluate", "samples"], ["probe"]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Help, version, errors


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_explains_every_option(command: list[str]) -> None:
    lines = titok(*command, "--help")
    assert any(line.strip().startswith(f"titok {' '.join(command)}") for line in lines), "no example"
    text = " ".join(lines)
    for parameter in [p for p in find_command(command).params if p.name != "help"]:
        assert parameter.help, f"{parameter.name} is not explained"
        required = parameter.required or parameter.is_flag or parameter.default is None
        assert required or "[default:" in text


def find_command(command: list[str]) -> Any:
    """The object of click for a command, such as ["train", "tokenizer"]."""
    import typer.main

    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    return found


def test_short_help_and_completion() -> None:
    assert titok("-h") == titok("--help")
    assert titok("train", "tokenizer", "-h") == titok("train", "tokenizer", "--help")
    assert any("--install-completion" in line for line in titok("--help"))


def test_quiet_shows_errors_alone() -> None:
    command = ["generate", "-t", "preset:titok-s-128", "-g", "preset:none", "-o", "a.png"]
    loud, quiet = (CliRunner().invoke(app, [*flags, *command]) for flags in ([], ["--quiet"]))
    assert "WARNING: " in loud.stderr
    assert quiet.exit_code == 2
    assert quiet.stderr == "".join(
        line for line in loud.stderr.splitlines(keepends=True) if line.startswith("error: ")
    )


def test_verbose_shows_what_the_library_logs_and_quiet_nothing(models: Path, photos: Path) -> None:
    command = ["tokenize", str(photos / "a.png"), "-t", str(models / "tokenizer"), "-o", "a.npz", "--overwrite"]
    usual, verbose, quiet = (CliRunner().invoke(app, [*flags, *command]) for flags in ([], ["-v"], ["-q"]))
    assert (usual.exit_code, verbose.exit_code, quiet.exit_code) == (0, 0, 0)
    assert verbose.stdout == usual.stdout == quiet.stdout
    assert re.search(r"^debug: \S+model\.safetensors: read a TiTok of \d+ parameters$", verbose.stderr, flags=re.M)
    assert "debug: " not in usual.stderr
    assert quiet.stderr == ""
    logger = logging.getLogger("titok")
    assert (logger.handlers, logger.level) == ([], logging.NOTSET), "the host's logging is as it was"


def test_what_is_logged_has_the_prefix_of_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def log() -> dict[str, Any]:
        logger = logging.getLogger("titok.somewhere")
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)("%d pictures", 2)
        return {}

    monkeypatch.setattr("titok.cli.info.collect_facts", log)
    lines = ["note: 2 pictures", "WARNING: 2 pictures", "error: 2 pictures"]
    assert CliRunner().invoke(app, ["info"]).stderr.splitlines() == lines
    assert CliRunner().invoke(app, ["-v", "info"]).stderr.splitlines() == ["debug: 2 pictures", *lines]
    assert CliRunner().invoke(app, ["-q", "info"]).stderr.splitlines() == lines[-1:]
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(app, ["info"]).stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_on_terminals_without_quiet(quiet: bool, models: Path, photos: Path) -> None:
    """With a pseudo-terminal as stderr. Without a terminal: the stderr of other tests."""
    pair = ["-t", str(models / "tokenizer"), "-g", str(models / "generator")]
    small = [
        "--width",
        "64",
        "--layers",
        "1",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--image-size",
        "16",
        "--tokens",
        "4",
    ]
    for command in (
        ["tokenize", str(photos), *pair[:2], "-o", "a.npz"],
        ["generate", *pair, "-o", "a.png", "--num", "2"],
        ["train", "tokenizer", str(photos / "cats" / "old"), "-o", "run", *small],
    ):
        controller, terminal = os.openpty()
        fcntl.ioctl(
            terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0)
        )  # tqdm draws no bar without width
        arguments = [sys.executable, "-m", "titok", *(["--quiet"] if quiet else []), *command]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=terminal) as process:
            os.close(terminal)
            shown = b""
            with (
                contextlib.suppress(OSError),
                open(controller, "rb", buffering=0) as screen,
            ):  # Linux ends it with EIO
                while part := screen.read(1 << 16):
                    shown += part
        assert process.returncode == 0, shown
        assert (b"%|" in shown) is not quiet
        assert shown == b"" or not quiet


@pytest.mark.slow
def test_the_shell_completes_commands() -> None:
    asked = {"_TITOK_COMPLETE": "complete_bash", "COMP_WORDS": "titok gen", "COMP_CWORD": "1"}
    code = "import sys, titok.cli.commands as cli; sys.argv = ['titok']; cli.main()"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert run.stdout.split() == ["generate"]


def test_every_command_is_tested_for_its_help() -> None:
    def leaves(command: Any, path: list[str]) -> list[list[str]]:
        """The paths of all commands below `command` that have no commands below themselves."""
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            return [path]
        return [leaf for name in subcommands for leaf in leaves(subcommands[name], [*path, name])]

    assert sorted(leaves(find_command([]), [])) == sorted(COMMANDS)


@pytest.mark.slow
def test_version_and_help_do_without_torch() -> None:
    """Loading PyTorch takes seconds, and `titok --help` should answer at once."""
    code = "import sys, titok.cli.commands as cli; sys.argv[0] = 'titok'; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    for option, expected in (("--help", "Usage: titok"), ("--version", f"titok {__version__}")):
        run = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert run.stdout.startswith(expected)
        assert run.stdout.endswith("False\n")
        assert run.stderr == ""


@pytest.mark.slow
def test_python_dash_m() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "titok", "tokenize", "nowhere", "-t", "x"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "error: nowhere: no such file or folder\n"


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(photos: Path) -> None:
    Path("runs").mkdir()
    for path in ("tokenizer", "runs/tokenizer", "runs/quickstart/tokenizer", "/tokenizer", "./tokenizer"):
        assert "no such file or folder (a repository is called owner/name)" in refused(
            "tokenize", photos, "-t", path
        )


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        CliRunner().invoke(app, ["--debug", "tokenize", "nowhere", "-t", "x"], catch_exceptions=False)


def test_unknown_options_and_missing_ones() -> None:
    for arguments in (["tokenize"], ["tokenize", "x"], ["paint"], ["generate", "--num", "0"], ["info", "--xml"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr


@pytest.mark.slow
def test_control_c_in_the_middle_of_a_run(models: Path, tmp_path: Path) -> None:
    arguments = ["generate", "-t", models / "tokenizer", "-g", models / "generator", "--num", 10**6, "-o", "a.npz"]
    run = subprocess.Popen(
        [sys.executable, "-m", "titok", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        # If a shell runs the tests in the background, child processes ignore Ctrl-C by default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("a.npz.parts/*.u8")):  # pictures are being written
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert errors.startswith("interrupted: no file is half-written; the same command goes on")
    assert errors.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz.parts"], "the same command continues from it"


# ---------------------------------------------------------------------------------------------------------------
# train, quickstart

SMALL = ("--width", 64, "--layers", 1, "--batch-size", 4, "--steps", 3)


@pytest.fixture
def classes(photos: Path) -> Path:
    """A folder with two classes of two pictures each."""
    sources = {"dog/1.png": "a.png", "dog/2.png": "b.png", "cat/1.png": "d.bmp", "cat/2.jpg": NAMES[3]}
    for name, source in sources.items():
        path = Path("classes", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(photos / source)
    return Path("classes")


@pytest.mark.slow
def test_train_both_and_generate(classes: Path) -> None:
    tokenizer = ("train", "tokenizer", classes, *SMALL, "--image-size", 16, "--tokens", 4, "--codebook-size", 16)
    assert titok(*tokenizer)[-1].startswith("runs/tokenizer: a tokenizer of 4 pictures, 4 tokens each")
    model = TiTok.from_pretrained("runs/tokenizer")
    assert model.config.image_size == (16, 16)
    assert model.config.num_latent_tokens == 4
    assert model.config.codebook_size == 16
    printed = titok("train", "generator", classes, "-t", "runs/tokenizer", *SMALL)
    assert printed[-1].startswith("runs/generator: a generator of 2 classes")
    assert json.loads(Path("runs/generator/classes.json").read_text()) == ["cat", "dog"]
    titok("generate", "-t", "runs/tokenizer", "-g", "runs/generator", "--per-class", 2)
    assert pixels(Path("samples.png")).shape == (34, 34, 3)

    weights = Path("runs/tokenizer/model.safetensors").read_bytes()
    assert "runs/tokenizer: a training run is here already" in refused(*tokenizer)
    titok(*tokenizer, "--resume")
    assert Path("runs/tokenizer/model.safetensors").read_bytes() == weights, "all steps were done already"
    assert "cannot be resumed with another config: seed was 0, is 1" in refused(
        *tokenizer, "--resume", "--seed", 1
    )


def test_train_refuses(classes: Path, models: Path) -> None:
    assert "none: no such file or folder" in refused("train", "tokenizer", "none")
    assert "multiples of the patch size 8, got (20, 20)" in refused(
        "train", "tokenizer", classes, "--image-size", 20
    )
    assert "--width: expected a multiple of 64, got 100" in refused("train", "tokenizer", classes, "--width", 100)
    assert "got nan" in refused("train", "tokenizer", classes, "--learning-rate", "nan")
    assert "expected a vector-quantised one" in refused("train", "generator", classes, "-t", models / "vae")
    Path("classes/loose.png").symlink_to((classes / "dog/1.png").resolve())
    assert "loose.png: expected every picture in a sub-folder" in refused("train", "tokenizer", classes)
    Path("classes/loose.png").unlink()
    (classes / "dog/3.png").write_text("no picture")
    assert "3.png: not a readable picture" in refused("train", "generator", classes, "-t", models / "tokenizer")


def test_quickstart_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import titok.quickstart.run as quickstart

    calls: list[Any] = []
    record = lambda out, seed, *, resume, progress: calls.append((out, seed, resume, progress))  # noqa: E731
    monkeypatch.setattr(quickstart, "run", record)
    titok("quickstart")
    titok("--quiet", "quickstart", "-o", "here", "--seed", 3, "--resume")
    assert calls == [(Path("runs/quickstart"), 0, False, True), (Path("here"), 3, True, False)]
    import titok.quickstart.colour as colour

    calls.clear()
    monkeypatch.setattr(colour, "run", record)
    titok("quickstart", "--colour")
    titok("--quiet", "quickstart", "--colour", "-o", "here", "--seed", 3, "--resume")
    assert calls == [(Path("runs/colour"), 0, False, True), (Path("here"), 3, True, False)]

    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("the quickstart needs scikit-learn: pip install 'titok-kernels[quickstart]'")

    monkeypatch.setattr(quickstart, "run", missing)
    assert refused("quickstart") == "the quickstart needs scikit-learn: pip install 'titok-kernels[quickstart]'"


# ---------------------------------------------------------------------------------------------------------------
# info


def test_info() -> None:
    facts = json.loads("\n".join(titok("info", "--json")))
    assert facts["versions"]["titok"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["backends"]) == {"plain", "cpp", "cuda", "triton", "sdpa", "flash-attn"}
    assert facts["backends"]["plain"] == "available"
    assert facts["presets"]["tokenizers"] == list(TOKENIZER_PRESETS)
    assert "cpu" in facts["devices"]
    text = "\n".join(titok("info"))
    for section, values in facts.items():
        assert section in text
        for name, value in values.items():
            assert name in text
            assert (" ".join(value) if isinstance(value, list) else value) in text
    if not torch.cuda.is_available():
        assert facts["backends"]["cuda"] != "available"


@pytest.mark.slow
def test_info_without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that cannot import titok._C, `titok info` gives the reason in one line."""
    code = "import sys; sys.modules['titok._C'] = None; sys.argv = ['titok', 'info', '--json']; "
    code += "import titok.cli.commands; titok.cli.commands.main()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    facts = json.loads(run.stdout)
    assert facts["devices"]["cpu"].endswith("no compiled kernels")
    assert facts["backends"]["cpp"].startswith("titok._C does not import here")
