"""Builds the optional extension `titok._C` from csrc/. Everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler and pybind11. It includes no header of PyTorch, so one binary serves every torch
release. What cannot be built is left out with one line that says why:

* without nvcc (`$CUDA_HOME/bin/nvcc` or on PATH), or if it fails or is too old, the CUDA half is left out;
* without a C++ compiler, or if it fails, the whole extension is left out, and `titok` runs on plain PyTorch.

`TITOK_BUILD=cpu` leaves out the CUDA half, `TITOK_BUILD=none` the whole extension. `TITOK_BUILD=strict` makes a failed
build an error, for packagers and continuous integration.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-trapping-math",  # same results; without it GCC does not vectorize a loop that holds a `?:`
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors that are wider than a register are passed between functions of one file only
]
# Each <op>_simd.cpp is compiled once per instruction set, in a namespace of that name. csrc/common/cpu_isa.h chooses
# among them at run time.
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
# Further instruction sets of single files: AVX-512 CPUs that also multiply bfloat16.
_AVX512BF16 = {"avx512bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16", "-DTITOK_ISA_AVX512"]}
EXTRA_ISA_FLAGS = {"masked_attention_simd": _AVX512BF16, "masked_attention_backward_simd": _AVX512BF16}
CUDA_ARCHS = ("80", "90", "100")
# What a compiler or a module that is missing, or a compiler that fails, raises.
BUILD_ERRORS = (OSError, subprocess.CalledProcessError, ImportError)


def find_cxx() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for c in candidates if (path := shutil.which(c))), None)


class UnusableNvccError(Exception):
    """Why an nvcc cannot compile the CUDA half, in one line."""


def cuda_arch_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture that this nvcc knows, and PTX of the newest for later ones.

    Raises:
        UnusableNvccError: it does not run, or knows none of them.
    """
    try:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnusableNvccError(f"{nvcc} does not list its architectures ({error})") from error
    known = [a for a in CUDA_ARCHS if f"sm_{a}" in listed.split()]
    if not known:
        raise UnusableNvccError(f"{nvcc} compiles for none of {', '.join(f'sm_{a}' for a in CUDA_ARCHS)}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


class Job(NamedTuple):
    """One file to compile."""

    source: Path
    object: Path
    command: list[str]  # up to the names of the files


def jobs(build: Path, cxx: str, nvcc: str | None) -> list[Job]:
    """Every object of the extension, compiled into the folder `build`."""
    import pybind11

    base = [cxx, *CXX_FLAGS, f"-I{CSRC}", *(["-DTITOK_WITH_CUDA"] if nvcc else [])]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    is_x86 = platform.machine() in ("x86_64", "AMD64")

    def place(source: Path, suffix: str) -> Path:
        return build / ("-".join(source.relative_to(CSRC).with_suffix("").parts) + suffix)

    listed = []
    for source in sorted(CSRC.rglob("*.cpp")):
        if not source.stem.endswith("_simd"):
            listed.append(Job(source, place(source, ".o"), [*base, *python]))
            continue
        sets = {**ISA_FLAGS, **EXTRA_ISA_FLAGS.get(source.stem, {})} if is_x86 else {"generic": []}
        for isa, flags in sets.items():
            command = [*base, *flags, f"-DTITOK_ISA={isa}", f"-DTITOK_ISA_{isa.upper()}"]
            listed.append(Job(source, place(source, f".{isa}.o"), command))
    if nvcc:
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
        command = [nvcc, "-std=c++17", "-O3", host, "-ccbin", cxx, "-fmad=false", *cuda_arch_flags(nvcc)]
        for source in sorted(CSRC.rglob("*.cu")):
            listed.append(Job(source, place(source, ".cu.o"), [*command, f"-I{CSRC}", "-DTITOK_WITH_CUDA"]))
    return listed


def compile_and_link(build: Path, listed: list[Job], linker: list[str], target: Path) -> None:
    """Compiles into the folder `build` with ninja where it is installed (in parallel, only what changed), else file by
    file; links all objects into `target`."""
    build.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    link = [*linker, "-o", str(target), *(str(job.object) for job in listed)]
    ninja = shutil.which("ninja")
    if ninja is None:
        for job in listed:
            subprocess.run([*job.command, "-c", str(job.source), "-o", str(job.object)], check=True)
        subprocess.run(link, check=True)
        return
    lines = [
        "rule compile\n  command = $cmd -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cmd",
    ]
    for job in listed:
        lines.append(f"build {job.object}: compile {job.source}\n  cmd = {' '.join(job.command)}")
    inputs = " ".join(str(job.object) for job in listed)
    lines.append(f"build {target}: link {inputs}\n  cmd = {' '.join(link)}")
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([ninja, "-C", str(build)], check=True)


class BuildExtension(build_ext):
    """Builds `titok._C` from csrc/, or leaves it out and says why."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("TITOK_BUILD", "auto")
        if mode == "none":
            return self._left_out("titok._C", "TITOK_BUILD=none")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()  # absolute: ninja runs elsewhere
        nvcc = None if mode == "cpu" else find_nvcc()
        if nvcc is not None:
            try:
                return self._compile(target, nvcc)
            except UnusableNvccError as error:
                why = str(error)
            except BUILD_ERRORS as error:
                why = f"the build with {nvcc} failed ({error})"
            if mode == "strict":
                raise RuntimeError(why)
        else:
            why = "TITOK_BUILD=cpu" if mode == "cpu" else "no nvcc found"
        self._left_out("the CUDA half of titok._C", why)
        try:
            self._compile(target, None)
        except BUILD_ERRORS as error:
            if mode == "strict":
                raise
            self._left_out("titok._C", f"the build failed ({error})")

    @staticmethod
    def _left_out(what: str, why: str) -> None:
        print(f"titok: built without {what}: {why}", file=sys.stderr, flush=True)

    def _compile(self, target: Path, nvcc: str | None) -> None:
        cxx = find_cxx()
        # Not `self.build_temp`, which an editable install deletes: ninja compiles only what changed since last time.
        build = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}-{platform.machine()}"
        # nvcc links where it is used, because it knows where its static runtime is.
        linker = [nvcc, "-shared", "-ccbin", cxx, "-Xcompiler=-fopenmp"] if nvcc else [cxx, "-shared", "-fopenmp"]
        compile_and_link(build, jobs(build, cxx, nvcc), linker, target)


if __name__ == "__main__":  # tests/sanitize/run.py imports this file
    setup(
        packages=[*find_packages(include=["titok", "titok.*"]), "titok.kernels"],
        # A top-level module `kernels` would collide with another package.
        package_dir={"titok": "titok", "titok.kernels": "kernels"},
        ext_modules=[Extension("titok._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildExtension},
    )
