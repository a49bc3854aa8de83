"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu` or `make gpu`.

It needs a Python with its own torch and Triton, and neither pip nor a network. It builds `titok._C` for this machine,
says what is there, and stops where the CUDA or the Triton kernels cannot run. Then it runs these parts:

    1  tests on the GPU, the decode step first
    2  TiTok against DiT-XL/2 as published, and in bfloat16 and compiled; TiTok first
    3  every op against its peers, at few shapes
    4  small cases under compute-sanitizer: memcheck and racecheck
    5  the ladder from eager PyTorch to titok, and the roofline
    6  the times of all kernels, tuning of the three slowest, what is off by default, and ncu on the slowest

Each part consists of commands with a time limit each. The time budget is divided among the commands that are left, so
that what one of them leaves over goes to the next. All results go to one file of JSON lines as they come: a cut loses
only what had not been measured. A failure stops no other command. `python -m benchmarks.gpu_report FILE` makes tables.

Exit status: 0; or the sum of 1, 2, 4, 8, 16 and 32 for failures in parts 1 to 6; or 64 where nothing could run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness.commands import Outcome, run_limited
from benchmarks.harness.gpu_parts import PARTS, Command, Context, LeftOut, Part

ROOT = Path(__file__).parents[1]
NOTHING_RAN = 64
BUILD_SECONDS, LOOK_SECONDS = 240.0, 90.0  # limits of the preparation


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--part",
        type=int,
        nargs="+",
        default=list(PARTS),
        choices=list(PARTS),
        help="the parts to run (default: all)",
    )
    p.add_argument(
        "--budget", type=float, default=900.0, help="seconds for everything, build included (default: %(default)s)"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        metavar="FOLDER",
        help="where gpu-<date>.jsonl and gpu-<date>.log go; made if missing (default: %(default)s)",
    )
    p.add_argument(
        "--diffusers",
        type=Path,
        metavar="PATH",
        help="DiT's package where it is not installed: a wheel, a folder of wheels, or a folder with the package",
    )
    p.add_argument("--commit", help="what the results name as the commit, where there is no git repository")
    p.add_argument("--no-build", action="store_true", help="take titok._C as it is")
    p.add_argument(
        "--dry", action="store_true", help="only check the arguments of every benchmark and collect the tests"
    )
    return p


def packages(path: Path, unpacked: Path) -> Path:
    """A folder for Python's path: `path` itself, or `unpacked` with the contents of its wheels.

    Raises:
        SystemExit: there is no such file or folder.
    """
    if not path.exists():
        stop(f"--diffusers: there is no {path}")
    wheels = sorted(path.glob("*.whl")) if path.is_dir() else [path]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    return unpacked if wheels else path.resolve()


def stop(text: str) -> NoReturn:
    print(f"benchmarks.gpu: {text}", file=sys.stderr)
    sys.exit(NOTHING_RAN)


class Session:
    """One run: its files, its time budget, and how each command ended."""

    def __init__(self, folder: Path, budget: float, environment: dict[str, str], *, dry: bool) -> None:
        self.end = time.monotonic() + budget
        folder.mkdir(parents=True, exist_ok=True)
        name = f"gpu-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        self.log = (folder / f"{name}.log").resolve()
        self.context = Context((folder / f"{name}.jsonl").resolve(), dry=dry)
        self.environment = environment
        self.verdicts: list[tuple[int, str, str, float]] = []  # part, name, verdict, seconds

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def write(self, **record: Any) -> None:
        """Appends a record to the results file, on a line of its own also where a killed command left half a line."""
        results = self.context.results
        half = results.exists() and not results.read_bytes().endswith(b"\n") and results.stat().st_size > 0
        with results.open("a") as file:
            file.write("\n" * half + json.dumps(record) + "\n")

    def run(self, line: list[str], limit: float, **variables: str) -> Outcome:
        """Runs a command line of this session."""
        text = f"\n$ {' '.join(line)}   # at most {limit:.0f} s"
        print(text, flush=True)
        with self.log.open("a") as file:
            file.write(text + "\n")
        return run_limited(line, limit, self.log, {**self.environment, **variables}, ROOT)

    def run_parts(self, parts: dict[int, Part]) -> None:
        """Runs all commands, dividing the time among those that are left."""
        todo = [(number, command) for number, part in parts.items() for command in part.commands]
        for index, (number, command) in enumerate(todo):
            weights = [later.weight for _, later in todo[index:]]
            self._run_command(number, command, self.left() * command.weight / sum(weights))

    def _run_command(self, part: int, command: Command, limit: float) -> None:
        verdict, seconds = "no time left", 0.0
        try:
            if limit >= command.least:
                line = command.line(self.context, limit)
                outcome = self.run(line, limit, **command.environment)
                verdict, seconds = outcome.verdict, outcome.seconds
        except LeftOut as reason:
            verdict = f"left out: {reason}"
        except Exception as error:  # an error of this program stops no other command either
            verdict = f"not started: {type(error).__name__}: {error}"
        self.verdicts.append((part, command.name, verdict, seconds))
        self.write(kind="command", part=part, name=command.name, verdict=verdict, seconds=round(seconds, 1))

    def status(self) -> int:
        """The exit status: a bit for each part with a command that was run or should have been, and did not succeed."""
        failed = {
            part for part, _, verdict, _ in self.verdicts if verdict != "ok" and not verdict.startswith("left out")
        }
        return sum(1 << (part - 1) for part in failed)

    def summary(self) -> str:
        lines = [
            f"part {part}  {name:32} {seconds:6.0f} s  {verdict}" for part, name, verdict, seconds in self.verdicts
        ]
        return "\n".join(lines)


def look(session: Session) -> dict[str, Any]:
    """What the machine has, as `benchmarks.harness.machine` finds it."""
    command = [sys.executable, "-m", "benchmarks.harness.machine"]
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LOOK_SECONDS,
            env=session.environment,
            cwd=ROOT,
            check=False,
        )
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"reasons": [f"looking at the machine took more than {LOOK_SECONDS:.0f} s"]}
    except (IndexError, ValueError):
        return {"reasons": [f"looking at the machine failed:\n{run.stderr[-2000:]}"]}
    return found


def child_environment(arguments: argparse.Namespace, unpacked: Path) -> dict[str, str]:
    """The environment of all commands."""
    path = [str(ROOT)]
    if arguments.diffusers is not None:
        path.append(str(packages(arguments.diffusers, unpacked)))
    environment = dict(os.environ)
    path += [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)  # kernels are to be compiled
    if arguments.commit:
        environment["TITOK_COMMIT"] = arguments.commit
    return environment


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(NOTHING_RAN))  # so that the running command is ended as well
    if importlib.util.find_spec("titok.kernels") is None:  # titok is not installed here
        (ROOT / "titok" / "kernels").symlink_to("../kernels")
    with tempfile.TemporaryDirectory() as unpacked:
        environment = child_environment(arguments, Path(unpacked))
        session = Session(arguments.out, arguments.budget, environment, dry=arguments.dry)
        if not arguments.no_build and not arguments.dry:
            session.run([sys.executable, "-m", "benchmarks.harness.build"], min(BUILD_SECONDS, session.left()))
        found = look(session)
        session.write(kind="machine", **found)
        for name, value in found.items():
            print(f"{name:20} {value}", flush=True)
        if found["reasons"] and not arguments.dry:
            stop("; ".join(found["reasons"]))
        session.run_parts({number: PARTS[number] for number in sorted(set(arguments.part))})
    print(f"\n{session.summary()}\nresults: {session.context.results}\noutput: {session.log}")
    sys.exit(session.status())


if __name__ == "__main__":
    main()
