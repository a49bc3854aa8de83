"""What a waiting policy of OpenMP costs and saves: `python -m benchmarks.waiting`.

Each policy runs the same work in a process of its own: training steps of the quickstart's tokenizer, and generation
with a preset. It does so on the machine as it is, and beside processes that keep as many cores busy as there are
threads. The policies take turns. See `titok/cli/waiting.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.harness import tables
from benchmarks.harness.models import Models
from benchmarks.harness.options import DTYPES, add_out, add_preset, command_parser, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import class_labels
from titok import Pipeline
from titok.cli.waiting import VARIABLES

POLICIES: dict[str, dict[str, str]] = {
    "GOMP_SPINCOUNT=300000, the default": {
        "GOMP_SPINCOUNT": "300000"
    },  # of libgomp; `benchmarks` sets another one
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}
TRAINING, GENERATION = "training step", "generation"


def parser() -> argparse.ArgumentParser:
    p = command_parser("waiting", __doc__)
    add_preset(p)
    p.add_argument("--rounds", type=int, default=3, help="processes of each policy (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=10, help="of each kind of work (default: %(default)s)")
    p.add_argument("--work", choices=[TRAINING, GENERATION], help="time it in this process and print JSON")
    add_out(p)
    return p


def time_work(work: str, preset: str, dtype: torch.dtype, seconds: float) -> list[float]:
    """Seconds of each training step or each picture in this process, for a time, after a warm-up."""
    if work == GENERATION:
        models = Models(preset, dtype, "cpu", all_steps=True)
        pipe = Pipeline(models.tokenizer, models.generator)

        def run() -> object:
            return pipe(class_labels(1))
    else:
        run = _training_step()
    run()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 2:
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return samples


def _training_step() -> Callable[[], object]:
    """Forward, backward and AdamW of the quickstart's tokenizer on a batch of random pictures."""
    from titok import TiTok
    from titok.quickstart.run import TOKENIZER

    torch.manual_seed(0)
    model = TiTok(TOKENIZER).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(32, TOKENIZER.channels, *TOKENIZER.image_size)

    def step() -> None:
        pictures, quantized = model(images)
        optimizer.zero_grad()
        ((pictures - images).square().mean() + quantized.loss).backward()
        optimizer.step()

    return step


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within, `count` processes compute without a pause, on one thread each."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    dtype = DTYPES[arguments.dtype]
    if arguments.work:
        print(json.dumps(time_work(arguments.work, arguments.preset, dtype, arguments.seconds)))
        return
    results, rows = Results(start(arguments)), []
    command = [
        sys.executable,
        "-m",
        "benchmarks.waiting",
        "--preset",
        arguments.preset,
        "--dtype",
        arguments.dtype,
    ]
    command += ["--seconds", str(arguments.seconds)]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    for busy in (0, torch.get_num_threads()):
        samples: dict[str, dict[str, list[float]]] = {
            policy: {TRAINING: [], GENERATION: []} for policy in POLICIES
        }
        with busy_processes(busy):
            for _ in range(arguments.rounds):
                for policy, settings in POLICIES.items():
                    for work in (TRAINING, GENERATION):
                        done = subprocess.run(
                            [*command, "--work", work],
                            env=environment | settings,
                            check=True,
                            capture_output=True,
                            text=True,
                        )
                        samples[policy][work] += json.loads(done.stdout)
        for policy in POLICIES:
            case = {"policy": policy, "busy": busy, "preset": arguments.preset, "dtype": arguments.dtype}
            rows.append(results.row("waiting", case, samples[policy]))
    tables.show(
        *tables.waiting_table(rows),
        f"{arguments.preset}, {arguments.dtype}; beside {torch.get_num_threads()} busy processes",
    )


if __name__ == "__main__":
    main()
