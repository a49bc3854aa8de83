"""`titok quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from titok.cli.outputs import check_files, check_output


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="For all that is written.")
    ] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of both runs and of the samples.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run was stopped; else models there are trained anew.")
    ] = False,
) -> None:
    """Train small models on handwritten digits, and generate.

    Minutes on a CPU; the digits come with scikit-learn. Writes tokenizer/, generator/, reconstructions.png,
    samples.png, metrics.json and report.html.

    \b
    titok quickstart
    titok quickstart -o runs/seed1 --seed 1
    """
    check_output(output)
    files = ("reconstructions.png", "samples.png", "metrics.json", "report.html")
    models = [f"{name}/model.safetensors" for name in ("tokenizer", "generator")]
    check_files([output / name for name in (*files, *models)], overwrite=True)
    from titok.processes import check_one_process
    from titok.quickstart.run import run

    check_one_process()
    run(output, seed, resume=resume)
