"""Compiles what the presets launch for six GPU generations, without a GPU, and checks the machine code.

    python -m titok.kernels.aot                  the table on standard output; exit status 1 where a check fails
    python -m titok.kernels.aot --write          the table into RESOURCES.md beside this file
    python -m titok.kernels.aot --arch 90 --sample 4 code_mixture    four of its variants for one architecture

Every module's `aot_variants()` calls its own launchers with the shapes of the presets, on tensors without memory, and
returns the launches that were recorded (`_launch.py`): what is compiled here is what runs. Each kernel is also compiled
with all of its integers equal to 1, to 16 and to 17, the three ways in which Triton compiles them. A variant fails when
it does not compile, needs more shared memory than a block can have, spills more registers than `_spills.py` allows it,
or lacks the tensor-core instructions or 16-byte loads that it is expected to contain (`AotVariant`). Triton's wheel
brings the tools, ptxas and cuobjdump. Only kernels that use local memory are disassembled, to count their spills.

Another release of Triton, in a folder of its own, compiles the same. `make kernels` runs both:

    pip install --target FOLDER --no-deps triton==3.6.0
    PYTHONPATH=FOLDER python -m titok.kernels.aot
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titok.kernels._aot import AotVariant, with_other_integers
from titok.kernels._launch import Launch
from titok.kernels._spills import most_spills

TABLE = Path(__file__).parent / "RESOURCES.md"
# Compute capability -> most bytes of shared memory for one block (CUDA programming guide, "Compute Capabilities")
SHARED_LIMITS = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


# Instructions of the PTX code, which the machine code has one for one: products on tensor cores, by their kind; loads
# from global memory, with the number of values and the bits of each; asynchronous copies, with their bytes; copies of
# whole tiles.
MATRIX = re.compile(r"\b(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)\b")
LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\s")
ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)")
BULK_COPY = re.compile(r"\bcp\.async\.bulk\.(?:tensor\.)?[^;]*?shared::cluster\.global")
HEADER = """\
| kernel | variant | warps | stages | registers | spills | shared KiB | matrix instructions | 16-byte loads |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
INTEGERS_HEADER = """\
| kernel | variants | registers | spills | shared KiB |
| --- | --- | --- | --- | --- |"""


class Report(NamedTuple):
    """The outcome for one variant and one compute capability."""

    arch: int
    kernel: str
    is_preset: bool
    row: str  # of the table
    usage: tuple[int, int, int]  # registers, spills, bytes of shared memory; zeros where it does not compile
    failures: list[str]


def modules(names: list[str]) -> list[str]:
    """Modules of titok.kernels that have `aot_variants`, or those of them with the given names."""
    files = [m.name for m in pkgutil.iter_modules(importlib.import_module("titok.kernels").__path__)]
    found = [name for name in files if name != "aot" and not name.startswith("_")]
    if unknown := set(names) - set(found):
        raise SystemExit(f"no such kernel module: {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return [name for name in names or found if hasattr(_module(name), "aot_variants")]


def _module(name: str) -> Any:
    return importlib.import_module(f"titok.kernels.{name}")


@functools.cache
def variants_of(module: str) -> list[AotVariant]:
    """What is compiled of a module: the launches of the presets, then those with other integers."""
    presets: list[AotVariant] = _module(module).aot_variants()
    return [*presets, *with_other_integers(presets)]


def _examine_by_name(module: str, index: int, arch: int) -> Report:
    """`examine` in another process, which cannot be sent a kernel."""
    return examine(variants_of(module)[index], arch)


def examine(variant: AotVariant, arch: int) -> Report:
    """Compiles a variant for one compute capability, e.g. 90, and reads its machine code."""
    name = variant.kernel.__name__
    where = f"{name} ({variant.label}) on sm_{arch}"
    start = f"| {name} | {variant.label} | {variant.num_warps} | {variant.num_stages} |"
    try:
        compiled = compile_launch(variant, arch)
    except Exception as error:  # whatever the compiler raises is a failure of this variant; the others go on
        cause = str(error).strip().splitlines() or [""]
        failure = f"{where}: {type(error).__name__}: {cause[-1]}"
        row = f"{start} does not compile | | | | |"
        return Report(arch, name, variant.is_preset, row, (0, 0, 0), [failure])
    registers, spills = _registers_and_spills(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    matrix = Counter(MATRIX.findall(ptx))
    loads = [int(values or 1) * int(bits) // 8 for values, bits in LOAD.findall(ptx)]
    loads += [int(size, 0) for size in ASYNC_COPY.findall(ptx)] + [16] * len(BULK_COPY.findall(ptx))
    wide = sum(size >= 16 for size in loads)

    failures = []
    if spills > (allowed := most_spills(name, variant.label, arch, triton.__version__)):
        failures.append(f"{spills} spill instructions, allowed are {allowed}")
    if shared > SHARED_LIMITS[arch]:
        failures.append(f"{shared} bytes of shared memory, a block can have {SHARED_LIMITS[arch]}")
    if variant.expects_tensor_cores and not matrix:
        failures.append("no tensor-core instruction")
    if variant.expects_wide_loads and not wide:
        failures.append(f"none of {len(loads)} loads is 16 bytes wide")
    units = ", ".join(f"{count} {unit}" for unit, count in sorted(matrix.items())) or "none"
    row = f"{start} {registers} | {spills} | {shared / 1024:.1f} | {units} | {wide} of {len(loads)} |"
    found = [f"{where}: {failure}" for failure in failures]
    return Report(arch, name, variant.is_preset, row, (registers, spills, shared), found)


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compiles a recorded launch for one compute capability, as Triton would on a GPU of that generation."""
    signature = {
        name: "constexpr" if name in launch.constexprs else launch.signature[name]
        for name in launch.kernel.arg_names
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in launch.aligned}
    source = ASTSource(launch.kernel, signature, launch.constexprs, attributes)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and how many instructions of the machine code move registers to or from memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(flag: str) -> str:
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dump("-res-usage")
        registers, stack, local = (
            int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")
        )
        if not stack + local:
            return registers, 0
        return registers, len(re.findall(r"\s(?:STL|LDL)\b", dump("-sass")))  # which takes most of a second


def table(reports: list[Report]) -> str:
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Written by `make kernels` with Triton {triton.__version__}; no GPU was involved. Variants are launches of",
        "the presets. Spills are instructions that move registers to or from memory. The last two columns count",
        "instructions of the PTX code: products on tensor cores, and loads from global memory that are at least 16",
        "bytes wide; the others read one number per row, a mask or an unaligned tail.",
    ]
    for arch in dict.fromkeys(report.arch for report in reports):
        of_arch = [report for report in reports if report.arch == arch]
        lines += ["", f"## sm_{arch}", "", HEADER, *(report.row for report in of_arch if report.is_preset)]
        lines += _other_integers([report for report in of_arch if not report.is_preset])
    return "\n".join(lines) + "\n"


def _other_integers(reports: list[Report]) -> list[str]:
    """The part of the table about variants with other integers: a line for each kernel, none without variants."""
    if not reports:
        return []
    lines = ["", "With all integers equal to 1, to 16 and to 17, the most of each kernel:", "", INTEGERS_HEADER]
    for kernel in dict.fromkeys(report.kernel for report in reports):
        usages = [report.usage for report in reports if report.kernel == kernel]
        registers, spills, shared = map(max, zip(*usages, strict=True))
        lines.append(f"| {kernel} | {len(usages)} | {registers} | {spills} | {shared / 1024:.1f} |")
    return lines


def _spread(count: int, sample: int | None) -> list[int]:
    """Every index below count, or `sample` of them, evenly spread from the first to the last."""
    if sample is None or sample >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(sample - 1, 1)) for i in range(sample)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titok.kernels.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("modules", nargs="*", help="kernel modules; all by default")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMITS), help="all by default")
    parser.add_argument("--sample", type=int, metavar="N", help="N variants of each module, evenly spread")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.name}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at once")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 makes Triton interpret kernels: unset it to compile them")
    if args.write and (args.modules or args.arch or args.sample):
        raise SystemExit("--write takes every variant and architecture")

    chosen = {name: _spread(len(variants_of(name)), args.sample) for name in modules(args.modules)}
    jobs = [(name, i, arch) for arch in args.arch or SHARED_LIMITS for name in chosen for i in chosen[name]]
    with ProcessPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(_examine_by_name, *zip(*jobs, strict=True))) if jobs else []
    text = table(reports)
    if args.write:
        TABLE.write_text(text)
    else:
        print(text, end="")
    failures = [failure for report in reports for failure in report.failures]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(
        f"{len(reports)} variants compiled with Triton {triton.__version__}, {len(failures)} failures",
        file=sys.stderr,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
