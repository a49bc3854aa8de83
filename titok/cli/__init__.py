"""The command line, `titok COMMAND` or `python -m titok COMMAND`: one module for each command or pair of commands.

`titok.cli.app` is the typer application. It is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titok.cli.commands import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from titok.cli.commands import app

        return app
    raise AttributeError(f"module 'titok.cli' has no attribute {name!r}")
