"""Kills commands at random moments, runs them again, and compares what they leave with that of a run left alone.

    python tests/kills.py --kills 200
    python tests/kills.py --kills 50 --signal TERM

Every trial starts a command, kills it with SIGKILL or another signal once or several times, each time after a random
share of the time that the command takes, and then lets it end. All files must then be, byte for byte, those of a run
that was never killed, but for the speed in metrics.jsonl, and there must be no other file. Commands are forked from
this process, which computes nothing itself and has imported what they need: importing takes many times as long as the
commands, so that most kills would hit the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1")  # before PyTorch is imported, which then starts no threads

import numpy as np
import torch
from PIL import Image

from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig
from titok.cli import commands
from titok.data import tokenizing
from titok.data.folders import ImageFolder
from titok.training import (
    GeneratorTraining,
    TokenizerTraining,
    tokenize_images,
    train_generator,
    train_tokenizer,
)
from titok.training.metrics import SPEED

MODELS = ["-t", "../inputs/tokenizer", "-g", "../inputs/generator"]
TOKENIZE = ["tokenize", "../inputs/photos", "-t", "../inputs/tokenizer", "--batch-size", "4", "--overwrite"]
TOKENIZE_SET = [*TOKENIZE, "--augment", "ten-crop"]
RECONSTRUCT = ["reconstruct", "../inputs/photos", "-t", "../inputs/tokenizer", "--batch-size", "2", "--overwrite"]
GENERATE = ["generate", *MODELS, "-n", "60", "--batch-size", "4", "--overwrite", "-o", "a.npz"]
tokenizing.BLOCK = 5  # pictures, so that a set takes several blocks
SECONDS = 120  # in which a command that nobody kills must end


class Scenario(NamedTuple):
    """What is run and killed.

    Attributes:
        work: runs in a process of its own, in the folder of the trial, and goes on with what is there.
        share: how often this scenario is chosen, relative to the others.
        processes: how many of them are started at the same time.
        launched: the processes form a group, as torchrun starts them; else all of them do the same.
        torchrun: `work` starts torchrun, and the kill hits torchrun alone or all its processes.
    """

    work: Callable[[], None]
    share: float = 1.0
    processes: int = 1
    launched: bool = False
    torchrun: bool = False


# ---------------------------------------------------------------------------------------------------------------
# Commands, each in a process of its own


def command(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        sys.argv = ["titok", *arguments]
        commands.main()

    return run


def make_inputs() -> None:
    """Makes the folder inputs: 24 pictures of two classes, a tokenizer and a generator with random weights."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = Path(f"inputs/photos/{'ab'[number % 2]}/{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    vit = ViTConfig(32, 1, 2, 8)
    TiTok(TokenizerConfig((16, 24), vit, vit, 4, 4, 16)).save_pretrained("inputs/tokenizer")
    generator = MaskGIT(GeneratorConfig(4, 16, num_classes=3, width=32, layers=1, heads=2, mlp_width=64))
    generator.save_pretrained("inputs/generator")


def train_a_tokenizer() -> None:
    vit = ViTConfig(16, 1, 2, 8)
    model = TokenizerConfig(16, vit, vit, 4, 4, 16, l2_normalize=True)
    config = TokenizerTraining(
        model=model, steps=40, batch_size=4, warmup_steps=2, checkpoint_every=4, restart_every=3, random_flip=True
    )
    train_tokenizer(ImageFolder("../inputs/photos", 16), config, "run", resume=True, progress=False)


def train_a_generator() -> None:
    tokenizer = TiTok.from_pretrained("../inputs/tokenizer")
    images = ImageFolder("../inputs/photos", tokenizer.config.image_size)
    model = GeneratorConfig(4, 16, num_classes=2, width=16, layers=1, heads=2, mlp_width=32)
    config = GeneratorTraining(model=model, steps=40, batch_size=8, warmup_steps=2, checkpoint_every=4)
    train_generator(tokenize_images(tokenizer, images), images.labels, config, "run", resume=True, progress=False)


def generate_under_torchrun() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titok"]
    os.execv(sys.executable, [sys.executable, *launcher, *GENERATE])


SCENARIOS = {
    "train tokenizer": Scenario(train_a_tokenizer, 1.5),
    "train generator": Scenario(train_a_generator, 1.5),
    "train tokenizer, two at once": Scenario(train_a_tokenizer, processes=2),
    "train generator, two at once": Scenario(train_a_generator, processes=2),
    "generate": Scenario(command(*GENERATE), 1.5),
    "generate, two processes": Scenario(command(*GENERATE), 1.5, processes=2, launched=True),
    "generate, torchrun": Scenario(generate_under_torchrun, 0.7, torchrun=True),
    "tokenize to .npz": Scenario(command(*TOKENIZE, "-o", "t.npz")),
    "tokenize to .safetensors": Scenario(command(*TOKENIZE, "-o", "t.safetensors")),
    "tokenize to .tokens": Scenario(command(*TOKENIZE_SET, "-o", "t.tokens")),
    "tokenize to .jsonl": Scenario(command(*TOKENIZE_SET, "-o", "t.jsonl")),
    "tokenize to .tokens, two processes": Scenario(
        command(*TOKENIZE_SET, "-o", "t.tokens"), processes=2, launched=True
    ),
    "reconstruct": Scenario(command(*RECONSTRUCT, "-o", "pairs")),
}


# ---------------------------------------------------------------------------------------------------------------
# Processes


def start(work: Callable[[], None], log: Path, folder: Path, environment: dict[str, str]) -> int:
    """Runs `work` in a new process; returns its number. What it prints is added to `log`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ.update(environment)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # ignored where a shell started all in the background
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except ValueError as error:  # as commands report it
        print(f"error: {error}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def import_modules_of(works: list[Callable[[], None]], log: Path, folder: Path) -> None:
    """Runs each command once in a process of its own, and imports in this process what it has imported."""
    for work in works:
        listed = folder / "modules"

        def run(work: Callable[[], None] = work, listed: Path = listed) -> None:
            try:
                work()
            finally:
                listed.write_text("\n".join(sys.modules))

        place = Path(tempfile.mkdtemp(dir=folder))
        assert wait(start(run, log, place, {}), SECONDS) == 0, log.read_text()
        for name in listed.read_text().splitlines():
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # a module that cannot be imported by its name alone
                    importlib.import_module(name)
        shutil.rmtree(place)


def start_all(scenario: Scenario, log: Path, folder: Path) -> list[int]:
    environment: dict[str, str] = {}
    if scenario.launched:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = {"WORLD_SIZE": str(scenario.processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = range(scenario.processes)
    return [
        start(scenario.work, log, folder, {**environment, "RANK": str(rank)} if environment else {})
        for rank in ranks
    ]


def wait(process: int, seconds: float) -> int | None:
    """The exit status of a process; None where it has not ended after this time."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def descendants(process: int) -> list[int]:
    """The process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def kill(processes: list[int], number: int = signal.SIGKILL) -> None:
    # Stopped first, so that none reacts to the end of another.
    for each in (signal.SIGSTOP, number, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, each)


# ---------------------------------------------------------------------------------------------------------------
# Trials


class Trials:
    """Runs trials in a folder of its own and counts kills.

    Attributes:
        number: of the signal.
        killed: signals that hit a command at work, by scenario.
        completed: trials that ended with the same files, by scenario.
    """

    def __init__(self, folder: Path, seed: int, number: int) -> None:
        self.folder, self.rng, self.number = folder, random.Random(seed), number
        self.log = folder / "log"
        self.killed: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self._references: dict[str, tuple[dict[str, bytes], float]] = {}
        os.environ.update(PYTHONPATH=str(Path(__file__).parents[1]))
        maker = start(make_inputs, self.log, folder, {})
        assert wait(maker, SECONDS) == 0, self.log.read_text()
        import_modules_of(
            [SCENARIOS[name].work for name in ("train tokenizer", "tokenize to .npz")], self.log, folder
        )

    def run(self, name: str, kills: int) -> None:
        """One trial of a scenario, with at most `kills` kills.

        Raises:
            AssertionError: the command did not end, or its files differ from those of a run that was left alone.
        """
        scenario = SCENARIOS[name]
        want, seconds = self._reference(name)
        folder = self._new_folder()
        survivors: list[int] = []
        for _ in range(kills):
            processes = start_all(scenario, self.log, folder)
            time.sleep(self.rng.uniform(0, 1.1 * seconds))
            survivors += self._kill_some(name, scenario, processes)
        self._complete(scenario, folder)
        kill([member for process in survivors for member in descendants(process)])
        for process in survivors:
            with contextlib.suppress(ChildProcessError):
                wait(process, SECONDS)
        self._compare(name, folder, want)
        self.completed[name] += 1
        shutil.rmtree(folder)

    def _kill_some(self, name: str, scenario: Scenario, processes: list[int]) -> list[int]:
        """Kills all processes or one of them. Returns those that may still be at work."""
        if scenario.torchrun:
            members = descendants(processes[0])
            chosen = members if self.rng.random() < 0.5 else members[:1]
        else:
            members = processes
            chosen = processes if self.rng.random() < 0.6 else [self.rng.choice(processes)]
        kill(chosen, self.number)
        statuses = [wait(process, SECONDS) for process in processes if process in chosen]
        # A command answers other signals than SIGKILL by an exit code, once it has begun.
        expected = (-self.number,) if self.number == signal.SIGKILL else (-self.number, 128 + self.number)
        unexpected = set(statuses) - {0, *expected}
        if self.number != signal.SIGKILL:
            assert not unexpected, f"{name}: exit codes {statuses}: {self.log.read_text()[-2000:]}"
        self.killed[name] += int(any(status in expected for status in statuses))
        return [member for member in members if member not in chosen]

    def _complete(self, scenario: Scenario, folder: Path) -> None:
        """Runs the command until it succeeds. It may be refused while a process that was not killed is at work."""
        deadline = time.monotonic() + SECONDS
        while True:
            mark = self.log.stat().st_size
            processes = start_all(scenario, self.log, folder)
            statuses = [wait(process, SECONDS) for process in processes]
            text = self.log.read_bytes()[mark:].decode(errors="replace")
            if statuses.count(0) == (len(processes) if scenario.launched else max(1, statuses.count(0))):
                return
            assert None not in statuses, f"{folder}: not ended after {SECONDS} s: {text}"
            assert "at work here" in text, f"{folder}: exit codes {statuses}: {text}"
            assert time.monotonic() < deadline, f"{folder}: still refused after {SECONDS} s"
            time.sleep(0.1)

    def _reference(self, name: str) -> tuple[dict[str, bytes], float]:
        """The files of a run that nobody kills, and how many seconds it takes."""
        if name not in self._references:
            folder, began = self._new_folder(), time.monotonic()
            self._complete(SCENARIOS[name], folder)
            self._references[name] = (_files(folder), time.monotonic() - began)
            assert self._references[name][0], f"{name} wrote nothing"
        return self._references[name]

    def _compare(self, name: str, folder: Path, want: dict[str, bytes]) -> None:
        found = _files(folder)
        assert sorted(found) == sorted(want), f"{name}: {folder}: expected {sorted(want)}, found {sorted(found)}"
        different = [file for file in want if found[file] != want[file]]
        assert not different, f"{name}: {folder}: other contents in {different}"

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder, prefix="trial-"))


def _files(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder; of a folder without files, b""."""
    return {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*")}


def _content(path: Path) -> bytes:
    if not path.is_file():
        return b""
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    entries = map(json.loads, path.read_text().splitlines())
    return json.dumps([{key: value for key, value in e.items() if key not in SPEED} for e in entries]).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="in all (default: %(default)s)")
    parser.add_argument(
        "--signal", choices=["KILL", "TERM", "INT"], default="KILL", help="TERM, INT: without training"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of commands and moments")
    parser.add_argument("--only", help="the name of one scenario")
    parser.add_argument(
        "--without-torchrun", action="store_true", help="leave out what takes 10 s and more a kill"
    )
    parser.add_argument("--verbose", action="store_true", help="print a line for each trial")
    options = parser.parse_args()
    chosen: dict[str, Any] = {
        name: scenario
        for name, scenario in SCENARIOS.items()
        if options.only in (None, name)
        and not (options.without_torchrun and scenario.torchrun)
        and (options.signal == "KILL" or (not name.startswith("train") and not scenario.torchrun))
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="titok-kills-") as folder:
        trials = Trials(Path(folder), options.seed, signal.Signals[f"SIG{options.signal}"])
        shares = [scenario.share for scenario in chosen.values()]
        while trials.killed.total() < options.kills:
            name = trials.rng.choices(list(chosen), shares)[0]
            kills = min(trials.rng.choice([1, 1, 2, 3]), options.kills - trials.killed.total())
            trials.run(name, kills)
            if options.verbose:
                print(f"{trials.killed.total()} kills, {time.monotonic() - began:.0f} s: {name}", flush=True)
    for name in chosen:
        print(f"{trials.killed[name]:4} kills, {trials.completed[name]:4} runs resumed to equal files: {name}")
    total, seconds = trials.killed.total(), time.monotonic() - began
    print(f"{total:4} kills in all, {trials.completed.total()} runs, {seconds:.0f} s, seed {options.seed}")


if __name__ == "__main__":
    main()
