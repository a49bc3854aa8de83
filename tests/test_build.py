"""setup.py: what is built where nvcc is missing, fails or is too old. No compiler runs."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("pybind11")
from setuptools import Distribution, Extension

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("titok_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Build = Callable[..., list[bool]]


@pytest.fixture
def build(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """A function that builds the extension. Returns, for each attempt, whether it had CUDA.

    Its arguments: the shell commands of nvcc, or None for a machine without one; whether compiling CUDA fails,
    and whether compiling C++ does; the mode.
    """

    def run(
        nvcc: str | None, *, cuda_fails: bool = False, cpp_fails: bool = False, mode: str = "auto"
    ) -> list[bool]:
        attempts: list[bool] = []

        def compile_and_link(build: Path, listed: list[Any], linker: list[str], target: Path) -> None:
            with_cuda = any(job.source.suffix == ".cu" for job in listed)
            assert with_cuda == any("-DTITOK_WITH_CUDA" in job.command for job in listed)
            assert with_cuda == linker[0].endswith("nvcc")
            attempts.append(with_cuda)
            if cpp_fails or (with_cuda and cuda_fails):
                raise subprocess.CalledProcessError(1, "ninja")

        path = tmp_path / "nvcc"
        path.write_text(f"#!/bin/sh\n{nvcc}\n")
        path.chmod(0o755)
        monkeypatch.setattr(script, "find_nvcc", lambda: None if nvcc is None else str(path))
        monkeypatch.setattr(script, "compile_and_link", compile_and_link)
        monkeypatch.setenv("TITOK_BUILD", mode)
        command = script.BuildExtension(Distribution())
        monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / "_C.so"))
        command.build_extension(Extension("titok._C", sources=[]))
        return attempts

    return run


GOOD, OLD = "echo sm_75 sm_80 sm_90", "echo sm_60 sm_70"


def test_a_good_nvcc(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("auto", "strict"):
        assert build(GOOD, mode=mode) == [True]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("nvcc", "options", "attempts", "reason"),
    [
        (None, {}, [False], "no nvcc found"),
        (GOOD, {"mode": "cpu"}, [False], "TITOK_BUILD=cpu"),
        (OLD, {}, [False], "compiles for none of sm_80, sm_90, sm_100"),
        ("exit 3", {}, [False], "does not list its architectures (.*exit status 3"),
        (GOOD, {"cuda_fails": True}, [True, False], "the build with .*nvcc failed (.*ninja.*exit status 1"),
    ],
)
def test_without_a_good_nvcc_the_cuda_half_alone_is_left_out(
    build: Build,
    capsys: pytest.CaptureFixture[str],
    nvcc: str | None,
    options: dict[str, Any],
    attempts: list[bool],
    reason: str,
) -> None:
    assert build(nvcc, **options) == attempts
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("titok: built without the CUDA half of titok._C: ")
    for part in reason.split(".*"):
        assert part in line


def test_a_failing_compiler_leaves_out_the_extension(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(None, cpp_fails=True) == [False]
    assert "titok: built without titok._C: the build failed" in capsys.readouterr().err


def test_a_strict_build_raises(build: Build) -> None:
    with pytest.raises(RuntimeError, match="compiles for none of"):
        build(OLD, mode="strict")
    with pytest.raises(RuntimeError, match=r"the build with .* failed"):
        build(GOOD, cuda_fails=True, mode="strict")
    with pytest.raises(subprocess.CalledProcessError):
        build(None, cpp_fails=True, mode="strict")
