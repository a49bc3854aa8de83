"""The ahead-of-time tool on the kernels as they are, and on forms of them that it has to reject."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

TABLE = Path(__file__).parents[1] / "kernels" / "RESOURCES.md"
# a decorated kernel is either interpreted or compiled, for the life of a process
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=COMPILING, check=False)


def rows(table: str, arch: int) -> list[str]:
    section = re.split(r"^## ", table, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"sm_{arch}\n"))
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90])  # `make kernels` compiles for the others as well
def test_kernels_pass_and_the_table_is_current(arch: int) -> None:
    done = run("-m", "titok.kernels.aot", "--arch", str(arch))
    assert done.returncode == 0, done.stderr
    if f"Triton {triton.__version__};" in TABLE.read_text():  # registers differ between releases
        assert rows(done.stdout, arch) == rows(TABLE.read_text(), arch), "stale: run `make kernels`"


def test_every_architecture_is_in_the_table() -> None:
    table = TABLE.read_text()
    names = [[row.split("|")[1:3] for row in rows(table, arch)] for arch in (80, 90, 100)]
    assert names[0] == names[1] == names[2]
    assert names[0]


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
