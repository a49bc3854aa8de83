"""Compiles every kernel variant that the presets use for three GPU generations, without a GPU, and checks the code.

    python -m titok.kernels.aot                  the table on standard output; exit status 1 where a check fails
    python -m titok.kernels.aot --write          ... into RESOURCES.md beside this file
    python -m titok.kernels.aot --arch 90 --sample 4 code_mixture    four of its variants for one architecture

A variant fails when it spills registers, wants more shared memory than a block can have, lacks the tensor-core
instructions or the 16-byte loads that it is expected to hold (`AotVariant`), or does not compile. Needs Triton
alone, whose wheel carries ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
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

from titok.kernels._aot import AotVariant

TABLE = Path(__file__).parent / "RESOURCES.md"
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of one block, CUDA programming guide
MATRIX = re.compile(r"\s(HMMA|HGMMA|UTC\w*MMA|IMMA|IGMMA|QMMA|QGMMA|DMMA)\b")
LOAD = re.compile(r"\s(?:LDG|LDGSTS)\.([\w.]+)")
BULK_LOAD = re.compile(r"\s(?:UTMALDG|UBLKCP)\b")  # the copy engine moves whole tiles
HEADER = """\
| kernel | variant | warps | stages | registers | spills | shared KiB | matrix instructions | 16-byte loads |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


class Report(NamedTuple):
    arch: int
    row: str  # of the table
    failures: list[str]


def modules(names: list[str]) -> list[str]:
    """Modules of titok.kernels that have `aot_variants`, or those of the given names."""
    package = importlib.import_module("titok.kernels")
    found = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("aot", "_aot", "_tuning")]
    if unknown := set(names) - set(found):
        raise SystemExit(f"no such kernel module: {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return [name for name in names or found if hasattr(_module(name), "aot_variants")]


def _module(name: str) -> Any:
    return importlib.import_module(f"titok.kernels.{name}")


def _examine_by_name(module: str, index: int, arch: int) -> Report:
    """`examine` for another process, to which a kernel can't be sent."""
    return examine(_module(module).aot_variants()[index], arch)


def examine(variant: AotVariant, arch: int) -> Report:
    """Compiles a variant for one compute capability and reads its machine code."""
    kernel = variant.kernel
    while not isinstance(kernel, triton.JITFunction):  # under @triton.autotune or @triton.heuristics
        kernel = kernel.fn
    name = kernel.__name__
    where = f"{name} ({variant.label}) on sm_{arch}"
    start = f"| {name} | {variant.label} | {variant.num_warps} | {variant.num_stages} |"
    try:
        compiled = _compile(kernel, variant, arch)
    except Exception as error:  # whatever a compiler may raise is a finding about this variant, not the end
        cause = str(error).strip().splitlines() or [""]
        return Report(
            arch, f"{start} does not compile | | | | |", [f"{where}: {type(error).__name__}: {cause[-1]}"]
        )
    usage, sass = _disassemble(compiled.asm["cubin"])

    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spills = len(re.findall(r"\s(?:STL|LDL)\b", sass))
    shared = compiled.metadata.shared
    matrix = Counter(MATRIX.findall(sass))
    loads = [".128" in f".{kind}" for kind in LOAD.findall(sass)]
    bulk = len(BULK_LOAD.findall(sass))
    wide, total = sum(loads) + bulk, len(loads) + bulk

    failures = []
    if spills:
        failures.append(f"{spills} spill instructions")
    if shared > SHARED_LIMITS[arch]:
        failures.append(f"{shared} bytes of shared memory, {SHARED_LIMITS[arch]} are there")
    if variant.expects_tensor_cores and not matrix:
        failures.append("no tensor-core instruction")
    if variant.expects_wide_loads and not wide:
        failures.append(f"none of {total} loads is 16 bytes wide")
    units = ", ".join(f"{count} {unit}" for unit, count in sorted(matrix.items())) or "none"
    row = f"{start} {registers} | {spills} | {shared / 1024:.1f} | {units} | {wide} of {total} |"
    return Report(arch, row, [f"{where}: {failure}" for failure in failures])


def _compile(kernel: Any, variant: AotVariant, arch: int) -> Any:
    signature = {
        name: "constexpr" if name in variant.constexprs else variant.signature[name] for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or (kind.startswith("i") and name.startswith("stride_")))
        and name not in variant.unaligned
    }
    source = ASTSource(kernel, signature, variant.constexprs, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, sass


def table(reports: list[Report]) -> str:
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Written by `make kernels` with Triton {triton.__version__}; no GPU was involved. Spills count instructions;",
        "16-byte loads are those of all global loads, the rest being per-row numbers, gathers and odd tails.",
    ]
    for arch in dict.fromkeys(report.arch for report in reports):
        lines += ["", f"## sm_{arch}", "", HEADER, *(report.row for report in reports if report.arch == arch)]
    return "\n".join(lines) + "\n"


def _spread(count: int, sample: int | None) -> list[int]:
    """All of range(count), or `sample` of it from the first to the last."""
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

    chosen = {name: _spread(len(_module(name).aot_variants()), args.sample) for name in modules(args.modules)}
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
