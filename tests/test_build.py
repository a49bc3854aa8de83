"""setup.py: what is built, and what is left out and recorded. A compiler runs in the slow test alone."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
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
        monkeypatch.setattr(script, "accepts", lambda cxx, flags: True)
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


def test_what_was_left_out_is_written_beside_the_extension(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "_C.left_out.txt"
    build(GOOD)
    assert written.read_text() == ""
    build(None, cpp_fails=True)
    cuda, everything = written.read_text().splitlines()
    assert cuda == "the CUDA half of titok._C: no nvcc found"
    assert everything.startswith("titok._C: the build failed (")
    build(GOOD, mode="none")
    assert written.read_text() == "titok._C: TITOK_BUILD=none\n"


def test_an_unknown_mode_is_refused(build: Build) -> None:
    with pytest.raises(SystemExit, match="TITOK_BUILD: expected one of auto, cpu, none, strict, got 'CPU'"):
        build(GOOD, mode="CPU")


@pytest.mark.parametrize(("lacking", "named"), [("-mavx512bf16", "avx512bf16"), ("-mavx512vl", "avx512")])
def test_a_missing_instruction_set_takes_the_one_below(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str, named: str
) -> None:
    monkeypatch.setattr(script, "accepts", lambda cxx, flags: lacking not in flags)
    monkeypatch.setattr(script, "is_x86", lambda: True)
    features = script.find_features(["g++"])
    assert any(
        line.startswith(f"instruction set {named}: the compiler has no {lacking}") for line in features.left_out
    )
    commands = {job.object.name: job.command for job in script.jobs(tmp_path, ["g++"], None, features)}
    command = commands["masked_attention-masked_attention_simd.avx512bf16.o"]
    assert lacking not in command
    assert "-DTITOK_ISA=avx512bf16" in command  # csrc/common/cpu_isa.h refers to every namespace
    assert "-DTITOK_ISA_AVX512BF16" not in command
    assert ("-DTITOK_ISA_AVX512" in command) == (named == "avx512bf16")
    assert ("-DTITOK_ISA_AVX2" in command) == (named == "avx512")


def test_a_compiler_without_openmp_costs_the_threads(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "accepts", lambda cxx, flags: "-fopenmp" not in flags)
    features = script.find_features(["g++"])
    assert features.left_out == ["threads of the C++ kernels: the compiler has no OpenMP"]
    assert not any("-fopenmp" in job.command for job in script.jobs(tmp_path, ["g++"], None, features))


def test_compilers_and_flags_of_the_environment(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "accepts", lambda cxx, flags: True)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}" if "++" in name else None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CC", "ccache gcc-12 -m64")
    assert script.find_cxx() == ["ccache", "g++-12", "-m64"]
    assert script.host_compiler(script.find_cxx()) == "g++-12"
    monkeypatch.setenv("CXX", "'/a b/g++' -m64")
    monkeypatch.setenv("CXXFLAGS", "-g '-DNAME=a b'")
    assert script.find_cxx() == ["/a b/g++", "-m64"]
    command = script.jobs(tmp_path, script.find_cxx(), None)[0].command
    assert command[:2] == ["/a b/g++", "-m64"]
    assert command.index("-DNAME=a b") > command.index("-O3")


@pytest.mark.parametrize("nvcc", [None, GOOD])
def test_flags_of_the_linker(
    script: ModuleType, build: Build, monkeypatch: pytest.MonkeyPatch, nvcc: str | None
) -> None:
    monkeypatch.setenv("CXX", "g++ -m64")
    monkeypatch.setenv("LDFLAGS", "-s '-Wl,-rpath,/a b'")
    build(nvcc)  # which replaces compile_and_link
    replaced = script.compile_and_link
    linkers: list[list[str]] = []
    monkeypatch.setattr(
        script, "compile_and_link", lambda *arguments: (linkers.append(arguments[2]), replaced(*arguments))
    )
    command = script.BuildExtension(Distribution())
    command.left_out = []
    command._build(Path("_C.so"), "auto")
    assert linkers[0][-2:] == ["-s", "-Wl,-rpath,/a b"]
    assert linkers[0][:3] == ["g++", "-m64", "-shared"] or nvcc is not None


def test_max_jobs_reaches_ninja(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: commands.append(command))
    for limit, options in (("3", ["-j", "3"]), (None, [])):
        monkeypatch.setenv("MAX_JOBS", limit) if limit else monkeypatch.delenv("MAX_JOBS")
        script.compile_and_link(tmp_path, [], ["g++"], tmp_path / "_C.so")
        assert commands.pop() == ["/bin/ninja", "-C", str(tmp_path), *options]


@pytest.mark.slow
def test_one_openmp_runtime_is_loaded() -> None:
    """The kernels run on the threads of PyTorch's OpenMP runtime, and bring none of their own."""
    code = (
        "import torch; from titok import ops; ops.nearest_codebook(torch.ones(8, 4), torch.ones(3, 4))\n"
        "assert ops.last_backend('nearest_codebook') == 'cpp', ops.backends()\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if "AssertionError" in done.stderr:
        pytest.skip("no C++ kernels")
    assert len(ast.literal_eval(done.stdout)) == 1, done.stdout + done.stderr


@pytest.mark.slow
def test_paths_with_spaces(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path / "a $folder: with 'spaces'"
    folder.mkdir()
    source = folder / "source file.cpp"
    source.write_text("int main() { return VALUE; }\n")
    job = script.Job(source, folder / "object file.o", ["g++", "-DVALUE=(1 + 2)"])
    monkeypatch.setenv("MAX_JOBS", "1")
    script.compile_and_link(folder, [job], ["g++"], folder / "the program")
    assert subprocess.run([folder / "the program"], check=False).returncode == 3
    monkeypatch.setenv("MAX_JOBS", "none")
    with pytest.raises(SystemExit, match="MAX_JOBS: expected an integer >= 1, got 'none'"):
        script.compile_and_link(folder, [job], ["g++"], folder / "the program")
