"""`titok demo` as a command, without gradio."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from titok.cli import app


def test_without_gradio_it_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "titok.demo.page", raising=False)
    arguments = ["demo", "-t", str(models / "tokenizer"), "-g", str(models / "generator")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "which the page needs, is not installed: pip install 'titok-kernels[demo]'" in result.stderr


def test_it_serves_the_models_that_it_is_given(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    page = ModuleType("titok.demo.page")
    page.ADDRESS = "127.0.0.1"
    page.serve = lambda *arguments: served.append(arguments)
    monkeypatch.setitem(sys.modules, "titok.demo.page", page)
    arguments = ["demo", "-t", str(models / "tokenizer"), "-g", str(models / "generator"), "--port", "8123"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "http://127.0.0.1:8123" in result.stderr
    ((demo, port),) = served
    assert (demo.length, demo.codes, demo.num_classes, port) == (4, 16, 3, 8123)
