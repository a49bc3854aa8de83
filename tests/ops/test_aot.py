"""The ahead-of-time tool on the kernels as they are, and on forms of them that it has to reject."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
aot = pytest.importorskip("titok.kernels.aot")

TABLE = Path(__file__).parents[2] / "kernels" / "RESOURCES.md"
# a decorated kernel is either interpreted or compiled, for the life of a process
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=COMPILING, check=False)


def rows(table: str, arch: int) -> list[str]:
    section = re.split(r"^## ", table, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"sm_{arch}\n"))
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.mark.slow
def test_kernels_pass_and_the_table_is_current() -> None:
    """A few variants of every module on one architecture: `make kernels` compiles the others as well."""
    done = run("-m", "titok.kernels.aot", "--arch", "90", "--sample", "5")
    assert done.returncode == 0, done.stderr
    if f"Triton {triton.__version__};" in TABLE.read_text():  # registers differ between releases
        stale = set(rows(done.stdout, 90)) - set(rows(TABLE.read_text(), 90))
        assert not stale, "run `make kernels`"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_table_lists_every_variant(arch: int) -> None:
    listed = [row.split(" | ")[:4] for row in rows(TABLE.read_text(), arch)]
    variants = [
        v for module in aot.modules([]) for v in importlib.import_module(f"titok.kernels.{module}").aot_variants()
    ]
    expected = [[f"| {v.kernel.fn.__name__}", v.label, str(v.num_warps), str(v.num_stages)] for v in variants]
    assert listed == expected, "run `make kernels`"


REJECTED = """
from titok.kernels import add_layer_norm, aot, code_mixture
norm, mixture = add_layer_norm.aot_variants()[0], code_mixture.aot_variants()[0]
pointers = frozenset(name for name, kind in norm.signature.items() if kind.startswith("*"))
for variant in (
    norm,
    norm._replace(expects_tensor_cores=True),
    norm._replace(unaligned=pointers),
    norm._replace(signature={**norm.signature, "x_ptr": "*i1000"}),
    norm._replace(constexprs={"D": 8192, "BLOCK_D": 8192}),
    mixture._replace(num_stages=9),
):
    print(";".join(aot.examine(variant, 80).failures))
"""


@pytest.mark.slow
def test_what_it_rejects() -> None:
    done = run("-c", REJECTED)
    assert done.returncode == 0, done.stderr
    fine, no_dot, unaligned, no_type, spilling, huge = done.stdout.splitlines()
    assert fine == ""
    assert no_dot.endswith("on sm_80: no tensor-core instruction")
    assert re.search(r"none of \d+ loads is 16 bytes wide", unaligned)
    assert "on sm_80: " in no_type
    assert re.search(r"[1-9]\d* spill instructions", spilling)
    assert re.search(r"\d+ bytes of shared memory, 166912 are there", huge)


def test_interpreter_and_unknown_modules_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "titok.kernels.aot"],
        capture_output=True,
        text=True,
        env={**COMPILING, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode != 0
    assert "unset it" in done.stderr
    done = run("-m", "titok.kernels.aot", "no_such_op")
    assert done.returncode != 0
    assert "no such kernel module: no_such_op; there are add_layer_norm, " in done.stderr
