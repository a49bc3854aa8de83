"""How commands report: results on stdout, notes and errors on stderr, exit codes, and what a signal does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

REPORTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)  # without a traceback
# How a command goes on after a signal, by its name.
AFTER_A_SIGNAL = {
    "train": "the same command with --resume goes on",
    "quickstart": "the same command with --resume goes on",
    "generate": "the same command goes on with a .npz, and starts a .png anew",
    "tokenize": "the same command goes on with .tokens and .jsonl, and starts others anew",
    "detokenize": "the same command with --overwrite starts anew",
    "evaluate": "the same command starts anew",
    "probe": "the same command starts anew",
    "reconstruct": "the same command with --overwrite starts anew",
}


_QUIET = ContextVar("_QUIET", default=False)
_PREFIXES = {
    logging.DEBUG: "debug: ",
    logging.INFO: "note: ",
    logging.WARNING: "WARNING: ",
    logging.ERROR: "error: ",
}


class Interrupted(BaseException):
    """The process received a signal that asks it to end. The first argument is its number."""


class ErrorGroup(TyperGroup):
    """A group of commands that reports wrong input in one line on stderr and exit code 2, without a traceback.

    `--debug` lets the exception through. Warnings and what the library logs are one line each, too. Ctrl-C and SIGTERM
    end a command with a line that says how to go on, and the exit code 128 + the number of the signal: 130 and 143.
    """

    def invoke(self, ctx: Any) -> Any:
        quiet, verbose = ctx.params["quiet"], ctx.params["verbose"]
        with _signals_raise() as received, warnings.catch_warnings(), _log_on_stderr(verbose=verbose):
            warnings.showwarning = _show_warning
            token = _QUIET.set(quiet)
            if quiet:  # read by huggingface_hub when it is imported
                os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            try:
                return super().invoke(ctx)
            except typer.Exit:
                raise
            except (KeyboardInterrupt, Interrupted):
                self._end_by_signal(ctx, received[0] if received else signal.SIGINT)
            except Exception as error:
                if received:  # C code may turn what the handler raises into an error of its own
                    self._end_by_signal(ctx, received[0])
                if ctx.params["debug"] or isinstance(error, BrokenPipeError) or not isinstance(error, REPORTED):
                    raise
                note(f"error: {_in_words(error)}")
                raise typer.Exit(2) from None
            finally:
                _QUIET.reset(token)

    def _end_by_signal(self, ctx: Any, number: int) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":  # one line from all processes that torchrun started
            way = AFTER_A_SIGNAL.get(ctx.invoked_subcommand)
            note("interrupted" if way is None else f"interrupted: no file is half-written; {way}")
        raise typer.Exit(128 + number) from None


class _NoteHandler(logging.Handler):
    """Shows what the library logs as lines on stderr, of the first of the processes that torchrun started."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            note(f"{_PREFIXES.get(record.levelno, '')}{record.getMessage()}")


@contextlib.contextmanager
def _log_on_stderr(*, verbose: bool) -> Iterator[None]:
    """Within, what loggers below "titok" are given is shown: from INFO on, and with `verbose` from DEBUG on."""
    logger, handler = logging.getLogger("titok"), _NoteHandler()
    former = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)


@contextlib.contextmanager
def _signals_raise() -> Iterator[list[int]]:
    """Within, SIGINT and SIGTERM raise `Interrupted`. Where the host has set a handler, it stays.

    Yields:
        the numbers of the signals that were received.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that thread may set a handler
        yield received
        return

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise Interrupted(number)

    def send_again(unraisable: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised within `__del__`. Such a signal is sent again, a little later."""
        if isinstance(unraisable.exc_value, Interrupted):
            threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.args[0])).start()
        else:
            former_hook(unraisable)

    former_hook = sys.unraisablehook
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    replaced = [number for number, default in defaults.items() if signal.getsignal(number) == default]
    sys.unraisablehook = send_again
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number in replaced:
            signal.signal(number, defaults[number])
        sys.unraisablehook = former_hook


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
    """Prints a line on stderr, so that stdout holds a command's results alone. --quiet lets errors through alone."""
    if text.startswith("error: ") or not is_quiet():
        typer.echo(_printable(text), err=True)


def is_quiet() -> bool:
    """Whether the running command was given --quiet: `titok --quiet COMMAND`."""
    return _QUIET.get()


def show_progress() -> bool | None:
    """The argument `progress` of the library's functions: False with --quiet; None shows a bar on a terminal."""
    return False if is_quiet() else None


def say(text: str) -> None:
    """Prints a line of a command's results on stdout."""
    typer.echo(_printable(text))


def _printable(text: str) -> str:
    """The text with a replacement character for bytes of file names that are no UTF-8, which cannot be printed."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
