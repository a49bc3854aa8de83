"""`titok quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from titok.cli.errors import is_quiet
from titok.cli.outputs import check_files, check_output


def quickstart(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="For all that is written.",
            show_default="runs/quickstart",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of both runs and of the samples.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run was stopped; else models there are trained anew.")
    ] = False,
    colour: Annotated[
        bool,
        typer.Option(
            "--colour",
            help="Emoji in colour, and both stages of the paper; about half an hour.",
        ),
    ] = False,
) -> None:
    """Train small models on handwritten digits, or on emoji in colour, and generate.

    Minutes on a CPU; the digits come with scikit-learn. Writes tokenizer/, generator/, reconstructions.png,
    samples.png, metrics.json and report.html. In colour, vqgan/ and proxy/ are the 2D tokenizer and the first stage,
    swaps.png shows single tokens exchanged between emoji, and preview.png the state of the training.

    \b
    titok quickstart
    titok quickstart --colour
    titok quickstart -o runs/seed1 --seed 1
    """
    output = output or Path("runs/colour" if colour else "runs/quickstart")
    check_output(output)
    files = ["reconstructions.png", "samples.png", "metrics.json", "report.html"]
    folders = ["tokenizer", "generator"]
    if colour:
        files, folders = [*files, "swaps.png", "preview.png"], [*folders, "vqgan", "proxy"]
    models = [f"{name}/model.safetensors" for name in folders]
    check_files([output / name for name in (*files, *models)], overwrite=True)
    from titok.processes import check_one_process

    check_one_process()
    if colour:
        from titok.quickstart import colour as quickstart_in_colour

        quickstart_in_colour.run(output, seed, resume=resume, progress=not is_quiet())
        return
    from titok.quickstart.run import run

    run(output, seed, resume=resume, progress=not is_quiet())
