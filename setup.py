"""Builds the optional extension `titok._C`; everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, and includes no PyTorch header, so that one binary
serves every torch release. What a machine lacks is left out with one line of explanation, never an error:

* no nvcc (`$CUDA_HOME/bin/nvcc` or on PATH): the CUDA half is left out;
* no C++ compiler, or it fails: the whole extension is left out, and `titok` runs on plain PyTorch.

`TITOK_BUILD=cpu` leaves the CUDA half out, `TITOK_BUILD=none` all of it, `TITOK_BUILD=strict` turns a
failed build into an error (for packagers and CI).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

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
    "-fno-trapping-math",  # results are the same; without it GCC does not vectorize a loop with a `?:` in it
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors that are wider than a register are passed between functions of one file only
]
# `<op>_simd.cpp` is compiled once for each of these, in a namespace of that name; `<op>.cpp` picks at run time.
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
# Of single files, beside these: what only some of the machines of an instruction set can do.
_AVX512BF16 = {"avx512bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16", "-DTITOK_ISA_AVX512"]}
EXTRA_ISA_FLAGS = {"masked_attention_simd": _AVX512BF16, "masked_attention_backward_simd": _AVX512BF16}
CUDA_ARCHS = ("80", "90", "100")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for c in candidates if (path := shutil.which(c))), None)


def cuda_arch_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture that this nvcc knows, and PTX of the newest for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [a for a in CUDA_ARCHS if f"sm_{a}" in listed.split()]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


class BuildExtension(build_ext):
    """Compiles csrc/ with ninja where it is there (parallel, incremental), else one command at a time."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("TITOK_BUILD", "auto")
        if mode == "none":
            return self._left_out("titok._C", "TITOK_BUILD=none")
        nvcc = None if mode == "cpu" else find_nvcc()
        if nvcc is None:
            self._left_out("the CUDA half of titok._C", "TITOK_BUILD=cpu" if mode == "cpu" else "no nvcc found")
        try:
            self._compile(Path(self.get_ext_fullpath(ext.name)).resolve(), nvcc)  # ninja runs elsewhere
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if mode == "strict":
                raise
            self._left_out("titok._C", f"the build failed ({error})")

    @staticmethod
    def _left_out(what: str, why: str) -> None:
        print(f"titok: built without {what}: {why}", file=sys.stderr, flush=True)

    def _compile(self, target: Path, nvcc: str | None) -> None:
        import pybind11

        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
        includes = [f"-I{CSRC}"]
        python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
        cuda = ["-DTITOK_WITH_CUDA"] if nvcc else []
        # Not `self.build_temp`, which editable installs throw away: ninja rebuilds only what changed.
        build = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}-{platform.machine()}"
        build.mkdir(parents=True, exist_ok=True)

        jobs: list[tuple[Path, Path, list[str]]] = []  # object, source, command up to the file names
        for source in sorted(CSRC.rglob("*.cpp")):
            name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
            base = [cxx, *CXX_FLAGS, *includes, *cuda]
            if source.stem.endswith("_simd"):
                isas = {**ISA_FLAGS, **EXTRA_ISA_FLAGS.get(source.stem, {})}
                if platform.machine() not in ("x86_64", "AMD64"):
                    isas = {"generic": []}
                for isa, flags in isas.items():
                    job = [*base, *flags, f"-DTITOK_ISA={isa}", f"-DTITOK_ISA_{isa.upper()}"]
                    jobs.append((build / f"{name}.{isa}.o", source, job))
            else:
                jobs.append((build / f"{name}.o", source, [*base, *python]))
        if nvcc:
            host = f"-Xcompiler={','.join(['-fPIC', '-fvisibility=hidden', '-ffp-contract=off'])}"
            flags = [nvcc, "-std=c++17", "-O3", host, "-ccbin", cxx, "-fmad=false", *cuda_arch_flags(nvcc)]
            for source in sorted(CSRC.rglob("*.cu")):
                jobs.append(
                    (
                        build / f"{'-'.join(source.relative_to(CSRC).with_suffix('').parts)}.cu.o",
                        source,
                        [*flags, *includes, *cuda],
                    )
                )

        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(obj) for obj, _, _ in jobs]
        # nvcc links where it is there, because it alone knows where its static runtime lies.
        linker = [nvcc, "-shared", "-ccbin", cxx, "-Xcompiler=-fopenmp"] if nvcc else [cxx, "-shared", "-fopenmp"]
        link = [*linker, "-o", str(target), *objects]
        ninja = shutil.which("ninja")
        if ninja is None:
            for obj, source, command in jobs:
                subprocess.run([*command, "-c", str(source), "-o", str(obj)], check=True)
            subprocess.run(link, check=True)
            return
        lines = [
            "rule compile\n  command = $cmd -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cmd",
        ]
        for obj, source, command in jobs:
            lines.append(f"build {obj}: compile {source}\n  cmd = {' '.join(command)}")
        lines.append(f"build {target}: link {' '.join(objects)}\n  cmd = {' '.join(link)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([ninja, "-C", str(build)], check=True)


setup(
    packages=[*find_packages(include=["titok", "titok.*"]), "titok.kernels"],
    package_dir={
        "titok": "titok",
        "titok.kernels": "kernels",
    },  # a top-level `kernels` is another project's name
    ext_modules=[Extension("titok._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
