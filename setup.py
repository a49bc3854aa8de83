"""Builds the optional extension `titok._C` from csrc/. Everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler and pybind11. It includes no header of PyTorch, so one binary serves every torch
release. What cannot be built is left out with one line that says why:

* without nvcc (`$CUDA_HOME/bin/nvcc` or on PATH), or if it fails or is too old, the CUDA half is left out;
* without support for an instruction set or for OpenMP in the C++ compiler, that instruction set or the threads are;
* without a C++ compiler, or if it fails, the whole extension is left out, and `titok` runs on plain PyTorch.

What was left out is also in the file `titok/_C.left_out.txt`, which `titok info` shows.

`TITOK_BUILD=cpu` leaves out the CUDA half, `TITOK_BUILD=none` the whole extension. `TITOK_BUILD=strict` makes a failed
build an error, for packagers and continuous integration. `CXX` and `CC` name the compiler, also with arguments;
`CXXFLAGS` and `LDFLAGS` are passed on after the flags of this file; `MAX_JOBS` limits how many compilers run at once.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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
    "-ffp-contract=off",
    "-fno-trapping-math",  # same results; without it GCC does not vectorize a loop that holds a `?:`
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors that are wider than a register are passed between functions of one file only
]
# Each <op>_simd.cpp is compiled once per instruction set, in a namespace of that name. csrc/common/cpu_isa.h chooses
# among them at run time. Each instruction set contains those above it.
_AVX512_FLAGS = [
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512",
]  # fmt: skip
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": _AVX512_FLAGS,
    "avx512vnni": [*_AVX512_FLAGS, "-mavx512vnni"],
    "avx512bf16": [*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"],
}
# By these the sources tell what they may use.
ISA_MACROS = {
    "generic": ["-DTITOK_ISA_GENERIC"],
    "avx2": ["-DTITOK_ISA_AVX2"],
    "avx512": ["-DTITOK_ISA_AVX512"],
    "avx512vnni": ["-DTITOK_ISA_AVX512", "-DTITOK_ISA_AVX512VNNI"],
    "avx512bf16": ["-DTITOK_ISA_AVX512", "-DTITOK_ISA_AVX512VNNI", "-DTITOK_ISA_AVX512BF16"],
}
# The files that are also compiled for AVX-512 CPUs that multiply 8-bit integers or bfloat16.
SOURCES_OF_ISA = {
    "avx512vnni": ("int8_linear_simd",),
    "avx512bf16": ("masked_attention_simd", "masked_attention_backward_simd"),
}
CUDA_ARCHS = ("80", "90", "100")
LEFT_OUT_FILE = "_C.left_out.txt"  # beside the extension; titok/ops/core/available.py reads it
MODES = ("auto", "cpu", "none", "strict")  # of TITOK_BUILD
# What a compiler or a module that is missing, or a compiler that fails, raises.
BUILD_ERRORS = (OSError, subprocess.CalledProcessError, ImportError)


def build_mode() -> str:
    """The value of TITOK_BUILD. Raises `SystemExit` for an unknown one, because a misspelt mode would go unnoticed."""
    mode = os.environ.get("TITOK_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"TITOK_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_cxx() -> list[str]:
    """The C++ compiler and its arguments: `CXX`, else the C++ compiler of the same family and release as `CC`."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    command = shlex.split(os.environ.get("CC", ""))
    for i, word in enumerate(command):
        folder, name = os.path.split(word)
        for c, cxx in (("gcc", "g++"), ("clang", "clang++")):
            sibling = os.path.join(folder, name.replace(c, cxx))
            if c in name and cxx not in name and shutil.which(sibling):
                return [*command[:i], sibling, *command[i + 1 :]]
    return [shutil.which("g++") or shutil.which("c++") or "g++"]


def host_compiler(cxx: list[str]) -> str:
    """The compiler alone, which nvcc takes without arguments and without a cache of compiled files before it."""
    return next(word for word in cxx if Path(word).name not in ("ccache", "sccache", "distcc"))


def accepts(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler compiles and links an empty program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [*cxx, "-Werror", *flags, str(source), "-o", str(Path(folder) / "empty")]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


class Features(NamedTuple):
    """What the C++ compiler supports of what the extension uses."""

    openmp: list[str]  # flags
    isa_flags: dict[str, list[str]]  # of every instruction set
    left_out: list[str]  # one line for each thing that the compiler lacks


def find_features(cxx: list[str]) -> Features:
    """Tries every optional flag once. An instruction set that the compiler lacks takes the flags of the one below it.

    The kernels of every instruction set are therefore there, as csrc/common/cpu_isa.h expects, and only slower. A
    compiler that does not run at all lacks nothing here: its build fails.
    """
    runs = accepts(cxx, [])
    left_out = []
    openmp = ["-fopenmp"]
    if runs and not accepts(cxx, openmp):
        openmp = [f"-I{CSRC / 'no_openmp'}", "-Wno-unknown-pragmas"]
        left_out.append("threads of the C++ kernels: the compiler has no OpenMP")
    isa_flags: dict[str, list[str]] = {}
    below: list[str] = []
    for isa, flags in ISA_FLAGS.items():
        lacking = [flag for flag in flags if runs and not accepts(cxx, [flag])]
        if lacking:
            left_out.append(f"instruction set {isa}: the compiler has no {' '.join(lacking)}")
        below = isa_flags[isa] = below if lacking else [*flags, *ISA_MACROS[isa]]
    return Features(openmp, isa_flags, left_out)


def is_x86() -> bool:
    """Whether the processor has the instruction sets that the kernels are compiled for."""
    return platform.machine() in ("x86_64", "AMD64")


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


def jobs(build: Path, cxx: list[str], nvcc: str | None, features: Features | None = None) -> list[Job]:
    """Every object of the extension, compiled into the folder `build`. Without `features`, the compiler is asked."""
    import pybind11

    features = find_features(cxx) if features is None else features
    flags = [*CXX_FLAGS, *features.openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    base = [*cxx, *flags, f"-I{CSRC}", *(["-DTITOK_WITH_CUDA"] if nvcc else [])]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]

    def place(source: Path, suffix: str) -> Path:
        return build / ("-".join(source.relative_to(CSRC).with_suffix("").parts) + suffix)

    listed = []
    for source in sorted(CSRC.rglob("*.cpp")):
        if not source.stem.endswith("_simd"):
            listed.append(Job(source, place(source, ".o"), [*base, *python]))
            continue
        isas = list(features.isa_flags) if is_x86() else ["generic"]
        for isa in isas:
            if isa not in SOURCES_OF_ISA or source.stem in SOURCES_OF_ISA[isa]:
                command = [*base, *features.isa_flags[isa], f"-DTITOK_ISA={isa}"]
                listed.append(Job(source, place(source, f".{isa}.o"), command))
    if nvcc:
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            host,
            "-ccbin",
            host_compiler(cxx),
            "-fmad=false",
            *cuda_arch_flags(nvcc),
        ]
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
        "rule compile\n  command = $cmd -MMD -MF $depfile -c $source -o $object\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cmd",
    ]
    for job in listed:
        lines.append(f"build {_ninja_path(job.object)}: compile {_ninja_path(job.source)}")
        lines.append(f"  cmd = {_ninja_command(job.command)}")
        for name, path in (("source", job.source), ("object", job.object), ("depfile", f"{job.object}.d")):
            lines.append(f"  {name} = {_ninja_command([str(path)])}")
    inputs = " ".join(_ninja_path(job.object) for job in listed)
    lines.append(f"build {_ninja_path(target)}: link {inputs}\n  cmd = {_ninja_command(link)}")
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    limit = os.environ.get("MAX_JOBS")
    if limit is not None and not (limit.isdecimal() and int(limit)):
        raise SystemExit(f"MAX_JOBS: expected an integer >= 1, got {limit!r}")
    subprocess.run([ninja, "-C", str(build), *(["-j", limit] if limit else [])], check=True)


def _ninja_path(path: Path) -> str:
    """A path as ninja reads it in a build line."""
    return "".join(f"${c}" if c in "$ :" else c for c in str(path))


def _ninja_command(words: list[str]) -> str:
    """A command line as ninja hands it to the shell."""
    return shlex.join(words).replace("$", "$$")


class BuildExtension(build_ext):
    """Builds `titok._C` from csrc/, or leaves it out and says why."""

    left_out: list[str]

    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        self.left_out = []
        target = Path(self.get_ext_fullpath(ext.name)).resolve()  # absolute: ninja runs elsewhere
        self._build(target, mode)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(LEFT_OUT_FILE).write_text("".join(f"{line}\n" for line in self.left_out))

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the extension, and the file beside it."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "titok", LEFT_OUT_FILE)
        if built.is_file():
            shutil.copy(built, ROOT / "titok" / LEFT_OUT_FILE)

    def _build(self, target: Path, mode: str) -> None:
        if mode == "none":
            return self._leave_out("titok._C: TITOK_BUILD=none")
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
        self._leave_out(f"the CUDA half of titok._C: {why}")
        try:
            self._compile(target, None)
        except BUILD_ERRORS as error:
            if mode == "strict":
                raise
            self._leave_out(f"titok._C: the build failed ({error})")

    def _leave_out(self, line: str) -> None:
        line = " ".join(line.split())
        self.left_out.append(line)
        print(f"titok: built without {line}", file=sys.stderr, flush=True)

    def _compile(self, target: Path, nvcc: str | None) -> None:
        cxx = find_cxx()
        features = find_features(cxx)
        # Not `self.build_temp`, which an editable install deletes: ninja compiles only what changed since last time.
        build = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}-{platform.machine()}"
        # nvcc links where it is used, because it knows where its static runtime is.
        if nvcc:
            openmp = ["-Xcompiler=-fopenmp"] if "-fopenmp" in features.openmp else []
            linker = [nvcc, "-shared", "-ccbin", host_compiler(cxx), *openmp]
        else:
            linker = [*cxx, "-shared", *features.openmp]
        listed = jobs(build, cxx, nvcc, features)
        compile_and_link(build, listed, [*linker, *shlex.split(os.environ.get("LDFLAGS", ""))], target)
        for line in features.left_out:
            self._leave_out(line)


if __name__ == "__main__":  # tests/sanitize/run.py imports this file
    setup(
        packages=[*find_packages(include=["titok", "titok.*"]), "titok.kernels"],
        # A top-level module `kernels` would collide with another package.
        package_dir={"titok": "titok", "titok.kernels": "kernels"},
        ext_modules=[Extension("titok._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildExtension},
    )
