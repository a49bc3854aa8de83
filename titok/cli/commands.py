"""The command line `titok`: its commands, in the order in which `titok --help` lists them.

Modules of this folder import PyTorch inside functions only, so that `titok --help` answers without loading it.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from titok.cli import evaluate, train
from titok.cli.demo import demo
from titok.cli.errors import ErrorGroup, note
from titok.cli.generate import generate
from titok.cli.info import info
from titok.cli.probe import probe
from titok.cli.quickstart import quickstart
from titok.cli.reconstruct import reconstruct
from titok.cli.tokens import detokenize, tokenize
from titok.cli.waiting import set_waiting_policy

app: typer.Typer = typer.Typer(
    cls=ErrorGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # of all commands
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (quickstart, tokenize, detokenize, reconstruct, generate, probe, demo, info):
    app.command()(command)
app.add_typer(train.app, name="train", help="Train a tokenizer or a generator on a folder of pictures.")
app.add_typer(evaluate.app, name="evaluate", help="Measure reconstructions or generated pictures, as published.")


@app.callback(invoke_without_command=True)
def titok(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no notes, warnings and progress bars; errors are shown.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show on stderr also which files are read, and what is chosen.")
    ] = False,
) -> None:
    """TiTok: pictures as short sequences of tokens, and MaskGIT to generate them.

    \b
    titok quickstart                                               train both models on digits
    titok tokenize photos -t runs/tokenizer -o tokens.npz          pictures to tokens
    titok generate -t runs/tokenizer -g runs/generator --num 16    classes to pictures

    Every command has its own --help. Wrong input ends with one line on stderr and exit code 2. After Ctrl-C or SIGTERM
    a line says how to go on, and the exit code is 130 or 143.
    """
    if version:
        from titok import __version__

        typer.echo(f"titok {__version__}")
        raise typer.Exit()


def main() -> None:
    """Runs the command that `sys.argv` gives, and exits."""
    set_waiting_policy()
    try:
        app()
    except KeyboardInterrupt:  # before the command began
        note("interrupted")
        sys.exit(128 + signal.SIGINT)
