"""Compiles what the presets launch for six GPU generations, without a GPU, and checks the machine code.

    python -m titok.kernels.aot                  the table on standard output; exit status 1 where a check fails
    python -m titok.kernels.aot --write          the table into RESOURCES.md beside this file
    python -m titok.kernels.aot --arch 90 --sample 4 code_mixture    four of its variants for one architecture

Every module's `aot_variants()` calls its own launchers with the shapes of the presets, on tensors without memory, and
returns the launches that were recorded (`_launch.py`): what is compiled here is what runs. Each kernel is also compiled
with all of its integers equal to 1, to 16 and to 17, the three ways in which Triton compiles them. A variant fails when
it does not compile, needs more shared memory than a block can have, spills registers where `ALLOWED_SPILLS` does not
name it, or lacks the tensor-core instructions or 16-byte loads that it is expected to contain (`AotVariant`). Triton's
wheel brings the tools, ptxas and cuobjdump.

Another release of Triton, in a folder of its own, compiles the same (`make kernels SECOND_TRITON=FOLDER`):

    pip install --target FOLDER --no-deps triton==3.6.0
    PYTHONPATH=FOLDER python -m titok.kernels.aot
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

from titok.kernels._aot import AotVariant, with_other_integers
from titok.kernels._launch import Launch

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


class AllowedSpills(NamedTuple):
    """Variants that may spill registers.

    Attributes:
        kernel: its name.
        labels: a regular expression for their labels.
        archs: compute capabilities.
        triton: the releases of Triton start with this, or with one of these.
        reason: why they may.
    """

    kernel: str
    labels: str
    archs: tuple[int, ...]
    triton: str | tuple[str, ...]
    reason: str


ALLOWED_SPILLS: tuple[AllowedSpills, ...] = (
    AllowedSpills(
        kernel="maskgit_decode_step_draw",
        labels=", integers 1$",
        archs=tuple(SHARED_LIMITS),
        triton="",
        reason="two instructions, where rows of logits lie one number apart: only one code has such rows",
    ),
    AllowedSpills(
        kernel="maskgit_decode_step_draw",
        labels="^fp32",
        archs=(120,),
        triton="3.7",
        reason="three instructions, because the tiles are chosen for sm_80, sm_90 and sm_100",
    ),
    AllowedSpills(
        kernel="masked_attention_backward_keys",
        labels="key_mask|fp32 D=48",
        archs=(120,),
        triton="3.7",
        reason="at most 11 instructions, because the tiles are chosen for sm_80, sm_90 and sm_100",
    ),
    AllowedSpills(
        kernel="masked_attention_backward_queries",
        labels="key_mask",
        archs=(120,),
        triton="3.7",
        reason="at most 23 instructions, and no preset has a key mask",
    ),
    AllowedSpills(
        kernel="masked_attention_forward_tiled",
        labels="D=72|, integers ",
        archs=(120,),
        triton="3.7",
        reason="at most 10 instructions, and no preset has heads of 72 channels or rows that are not aligned",
    ),
    AllowedSpills(
        kernel="code_mixture_dcodebook",
        labels="^bf16",
        archs=(120,),
        triton="3.7",
        reason="29 instructions, 98 where rows are no multiple of 16; a gradient, which generation does not compute",
    ),
    AllowedSpills(
        kernel="code_mixture_dcodebook",
        labels="^bf16",
        archs=(80, 86, 89),
        triton=("3.6", "3.7"),
        reason="48 instructions, 96 where rows are no multiple of 16: the tiles are chosen for sm_90 and sm_100",
    ),
    AllowedSpills(
        kernel="code_mixture_dcodebook",
        labels="^fp32.*integers 17$",
        archs=(80, 100),
        triton="3.7",
        reason="two instructions, and no preset has rows that are no multiple of 16",
    ),
    AllowedSpills(
        kernel="code_mixture_forward",
        labels="^bf16",
        archs=(80, 86, 89),
        triton=("3.6", "3.7"),
        reason="at most 18 instructions: the tiles are chosen for sm_90 and sm_100",
    ),
    AllowedSpills(
        kernel="masked_attention_forward_tiled",
        labels="integers 1$",
        archs=(80,),
        triton="3.7",
        reason="six instructions, where every integer is 1, as in no preset",
    ),
    AllowedSpills(
        kernel="masked_attention_backward_keys",
        labels="^fp32 D=48",
        archs=(86, 89),
        triton="3.7",
        reason="17 instructions, in training in float32 alone: the tiles are chosen for sm_80, sm_90 and sm_100",
    ),
    AllowedSpills(
        kernel="maskgit_decode_step_draw",
        labels="integers 17$",
        archs=(80, 86, 89, 90),
        triton=("3.6", "3.7"),
        reason="two instructions, where rows of logits are not aligned, as in no preset",
    ),
    AllowedSpills(
        kernel="masked_attention_forward_tiled",
        labels="^bf16 D=72 N=321$",
        archs=(80,),
        triton="3.6",
        reason="two instructions, and no preset has heads of 72 channels",
    ),
    AllowedSpills(
        kernel="masked_attention_forward_tiled",
        labels="^fp32 D=(72|128) ",
        archs=(100, 120),
        triton="3.6",
        reason="at most 111 instructions, in float32, and no preset has heads of more than 64 channels",
    ),
    AllowedSpills(
        kernel="masked_attention_backward_queries",
        labels="^fp32",
        archs=(100,),
        triton="3.6",
        reason="at most 45 instructions, in training in float32 alone: the tiles are chosen for sm_80 and sm_90",
    ),
    AllowedSpills(
        kernel="masked_attention_backward_keys",
        labels="^bf16 D=64 N=129 key_mask$",
        archs=(86, 89),
        triton="3.6",
        reason="27 instructions, and no preset has a key mask",
    ),
    AllowedSpills(
        kernel="add_layer_norm_backward",
        labels="integers 16$",
        archs=(100,),
        triton="3.6",
        reason="three instructions, where every integer is 16, as in no preset",
    ),
)


# Instructions of the machine code (SASS): tensor cores; loads from global memory with their width; copies of a tile
MATRIX = re.compile(r"\s(HMMA|HGMMA|UTC\w*MMA|IMMA|IGMMA|QMMA|QGMMA|DMMA)\b")
LOAD = re.compile(r"\s(?:LDG|LDGSTS)\.([\w.]+)")
BULK_LOAD = re.compile(r"\s(?:UTMALDG|UBLKCP)\b")
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
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spills = len(re.findall(r"\s(?:STL|LDL)\b", sass))
    shared = compiled.metadata.shared
    matrix = Counter(MATRIX.findall(sass))
    loads = [".128" in f".{kind}" for kind in LOAD.findall(sass)]
    bulk = len(BULK_LOAD.findall(sass))
    wide, total = sum(loads) + bulk, len(loads) + bulk

    failures = []
    if spills and _reason_to_spill(variant, arch) is None:
        failures.append(f"{spills} spill instructions")
    if shared > SHARED_LIMITS[arch]:
        failures.append(f"{shared} bytes of shared memory, a block can have {SHARED_LIMITS[arch]}")
    if variant.expects_tensor_cores and not matrix:
        failures.append("no tensor-core instruction")
    if variant.expects_wide_loads and not wide:
        failures.append(f"none of {total} loads is 16 bytes wide")
    units = ", ".join(f"{count} {unit}" for unit, count in sorted(matrix.items())) or "none"
    row = f"{start} {registers} | {spills} | {shared / 1024:.1f} | {units} | {wide} of {total} |"
    found = [f"{where}: {failure}" for failure in failures]
    return Report(arch, name, variant.is_preset, row, (registers, spills, shared), found)


def _reason_to_spill(variant: AotVariant, arch: int) -> str | None:
    """The reason why `ALLOWED_SPILLS` names a variant; None where it does not."""
    for allowed in ALLOWED_SPILLS:
        of_triton = arch in allowed.archs and triton.__version__.startswith(allowed.triton)
        if of_triton and allowed.kernel == variant.kernel.__name__ and re.search(allowed.labels, variant.label):
            return allowed.reason
    return None


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


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code (SASS), as cuobjdump prints them."""
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
        f"Written by `make kernels` with Triton {triton.__version__}; no GPU was involved. Variants are launches of",
        "the presets. Spills are instructions that move registers to or from memory. The last column counts loads from",
        "global memory that are 16 bytes wide; the others read one number per row, a mask or an unaligned tail.",
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
