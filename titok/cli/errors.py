"""How commands report: results on stdout, notes and errors on stderr, exit codes, and what a signal does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

# How a command goes on after a signal, by its name.
AFTER_A_SIGNAL = {
    "train": "the same command with --resume goes on",
    "quickstart": "the same command with --resume goes on",
    "generate": "the same command goes on with a .npz, and starts a .png anew",
    "tokenize": "the same command starts anew",
    "detokenize": "the same command with --overwrite starts anew",
    "reconstruct": "the same command with --overwrite starts anew",
}


class Terminated(BaseException):
    """The process was asked to end by SIGTERM."""


class ErrorGroup(TyperGroup):
    """A group of commands that reports wrong input in one line on stderr and exit code 2, without a traceback.

    `--debug` lets the exception through. Warnings are one line, too. Ctrl-C and SIGTERM end a command with a line that
    says how to go on, and the exit code 128 + the number of the signal: 130 and 143.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            with _sigterm_raises(), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            self._report_signal(ctx)
            raise typer.Exit(128 + signal.SIGINT) from None
        except Terminated:
            self._report_signal(ctx)
            raise typer.Exit(128 + signal.SIGTERM) from None
        except (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            note(f"error: {_in_words(error)}")
            raise typer.Exit(2) from None

    def _report_signal(self, ctx: Any) -> None:
        if os.environ.get("RANK", "0") != "0":  # one line from all processes that torchrun started
            return
        way = AFTER_A_SIGNAL.get(ctx.invoked_subcommand)
        note("interrupted" if way is None else f"interrupted: no file is half-written; {way}")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated` where it would otherwise kill the process on the spot."""
    is_main_thread = threading.current_thread() is threading.main_thread()  # only it may set a handler
    if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Takes the place of `warnings.showwarning`."""
    note(f"WARNING: {message}")


def _in_words(error: Exception) -> str:
    """The message of an error; "path: reason" for an error of the system, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def note(text: str) -> None:
    """Prints a line on stderr, so that stdout holds a command's results alone."""
    typer.echo(_printable(text), err=True)


def say(text: str) -> None:
    """Prints a line of a command's results on stdout."""
    typer.echo(_printable(text))


def _printable(text: str) -> str:
    """The text with a replacement character for bytes of file names that are no UTF-8, which cannot be printed."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
