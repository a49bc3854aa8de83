"""How commands report: results on stdout, notes and errors on stderr, exit codes."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class ErrorGroup(TyperGroup):
    """A group of commands that reports wrong input in one line on stderr and exit code 2, without a traceback.

    `--debug` lets the exception through. Ctrl-C ends with exit code 130.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("interrupted: no file is half-written")
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            note(f"error: {error}")
            raise typer.Exit(2) from None


def note(text: str) -> None:
    """Prints a line on stderr, so that stdout holds a command's results alone."""
    typer.echo(_printable(text), err=True)


def say(text: str) -> None:
    """Prints a line of a command's results on stdout."""
    typer.echo(_printable(text))


def _printable(text: str) -> str:
    """The text with a replacement character for bytes of file names that are no UTF-8, which cannot be printed."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
