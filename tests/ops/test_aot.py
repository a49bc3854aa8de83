"""Compilation ahead of time: what is recorded, whether it is what runs, and what the tool rejects."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from titok.config import GENERATOR_PRESETS, TOKENIZER_PRESETS

triton = pytest.importorskip("triton")
aot = pytest.importorskip("titok.kernels.aot")
ALLOWED_SPILLS = pytest.importorskip("titok.kernels._spills").ALLOWED_SPILLS

KERNELS = Path(__file__).parents[2] / "kernels"
TABLE = KERNELS / "RESOURCES.md"
# A process either interprets kernels or compiles them: Triton decides when a kernel is decorated.
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=COMPILING, check=False)


def rows(table: str, arch: int) -> list[str]:
    section = re.split(r"^## ", table, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"sm_{arch}\n"))
    presets = text.partition("With all integers")[0]
    return [line for line in presets.splitlines() if line.startswith("| ")][2:]


def variants() -> list[Any]:
    modules = (importlib.import_module(f"titok.kernels.{name}") for name in aot.modules([]))
    return [variant for module in modules for variant in module.aot_variants()]


# --- The table


@pytest.mark.slow
def test_kernels_pass_and_the_table_is_current() -> None:
    """A few variants of every module on one architecture; `make kernels` compiles all of them."""
    done = run("-m", "titok.kernels.aot", "--arch", "90", "--sample", "5")
    assert done.returncode == 0, done.stderr
    if f"Triton {triton.__version__};" in TABLE.read_text():  # another release allocates other registers
        stale = set(rows(done.stdout, 90)) - set(rows(TABLE.read_text(), 90))
        assert not stale, "run `make kernels`"


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMITS))
def test_the_table_lists_every_variant(arch: int) -> None:
    listed = [row.split(" | ")[:4] for row in rows(TABLE.read_text(), arch)]
    expected = [[f"| {v.kernel.__name__}", v.label, str(v.num_warps), str(v.num_stages)] for v in variants()]
    assert listed == expected, "run `make kernels`"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_compiles_with_both_releases_of_triton() -> None:
    """That of the pinned PyTorch, which writes the table, and that of the oldest PyTorch that is allowed."""
    done = subprocess.run(
        ["make", "-n", "kernels"], cwd=KERNELS.parent, capture_output=True, text=True, check=True
    )
    compiling = [line for line in done.stdout.splitlines() if "titok.kernels.aot" in line]
    assert len(compiling) == 2, done.stdout
    assert compiling[0].endswith("--write")
    assert compiling[1].startswith("PYTHONPATH=build/triton-3.6.0 ")
    assert "triton==3.6.0" in done.stdout


# --- What is recorded


def is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).split("(")[0] == "triton.jit"


def test_every_kernel_is_recorded() -> None:
    """Read from the sources: a kernel is a function under @triton.jit that no other such function calls."""
    trees = [ast.parse(path.read_text()) for path in KERNELS.glob("*.py")]
    functions = [
        node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(map(is_jit, node.decorator_list))
    ]
    calls = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    kernels = {function.name for function in functions} - called
    assert len(kernels) >= 15
    assert {variant.kernel.__name__ for variant in variants()} == kernels


def test_every_launch_goes_through_the_recorder() -> None:
    """`kernel[grid](...)` stands in one place."""
    launches = [
        path.name
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert launches == ["_launch.py"]


def test_every_integer_is_compiled_in_three_ways() -> None:
    """As a constant where it is 1, as a multiple of 16, and as any number, for each kernel and kind of pointers."""
    ways: dict[Any, set[str]] = {}
    for variant in (v for name in aot.modules([]) for v in aot.variants_of(name)):
        kernel = variant.kernel
        pointers = frozenset(item for item in variant.signature.items() if item[1].startswith("*"))
        generic = getattr(kernel, "do_not_specialize", None) or ()
        for name in set(kernel.arg_names) - set(kernel.fn.__annotations__) - set(generic):
            if variant.constexprs.get(name) == 1:
                way = "1"
            elif variant.signature.get(name) in ("i32", "i64"):
                way = "multiple of 16" if name in variant.aligned else "any"
            else:
                continue  # a tensor or a float
            ways.setdefault((kernel.__name__, pointers, name), set()).add(way)
    # The kernels under Triton's interpreter do not know which of their integers are not specialised.
    found = {key: of for key, of in ways.items() if key[2] not in ("N", "start", "NQ")}
    assert len(found) > 20
    assert {key: of for key, of in found.items() if of != {"1", "multiple of 16", "any"}} == {}


def test_every_preset_is_recorded() -> None:
    """The kernels and compile-time constants of what the models launch are among the variants."""
    from titok.kernels import add_layer_norm, masked_attention, masked_attention_backward, nearest_codebook
    from titok.kernels._aot import meta
    from titok.kernels._launch import record

    shapes = {(c.width, c.heads, 1 + c.num_latent_tokens) for c in GENERATOR_PRESETS.values()}
    codebooks = set()
    for c in TOKENIZER_PRESETS.values():
        for side in ("encoder", "decoder"):
            vit, (height, width) = getattr(c, side), c.grid(side)
            shapes.add((vit.width, vit.heads, height * width + 1 + c.num_latent_tokens))
        if c.bottleneck == "vq":
            codebooks.add((c.codebook_size, c.code_dim, c.l2_normalize))
    with record() as launches:
        for width, H, N in shapes:
            qkv, hidden = meta(2, N, 3 * width, dtype=torch.bfloat16), meta(2, N, width, dtype=torch.bfloat16)
            parameter, lse = meta(width, dtype=torch.bfloat16), meta(2, H, N)
            masked_attention.forward(qkv, None, H, 0, 0.125, hidden, lse)
            masked_attention_backward.backward(hidden, qkv, None, hidden, lse, H, 0, 0.125, qkv)
            add_layer_norm.forward(hidden, hidden, parameter, parameter, 1e-6, hidden, hidden)
            add_layer_norm.backward(hidden, hidden, hidden, parameter, 1e-6, hidden)
        for V, C, normalize in codebooks:
            nearest_codebook.forward(meta(99_999, C), meta(V, C), normalize, meta(99_999, dtype=torch.int64))

    def compiled(launch: Any) -> tuple[Any, ...]:
        """What is compiled, but for the specialisation of integers: it depends on the batch and on the heads."""
        annotated = launch.kernel.fn.__annotations__  # the tl.constexpr arguments alone
        constants = {n: value for n, value in launch.constexprs.items() if n in annotated or value is None}
        return launch.kernel.__name__, tuple(sorted(constants.items())), launch.num_warps, launch.num_stages

    assert len(launches) > 30
    assert {compiled(launch) for launch in launches} <= {compiled(variant) for variant in variants()}


# --- In a process that compiles

OTHER_SHAPES = """
import torch
from titok.kernels import add_layer_norm, code_mixture, group_norm_silu, masked_attention, nearest_codebook
from titok.kernels.masked_attention_backward import backward as attention_backward
from titok.kernels._aot import meta
from titok.kernels._launch import record

def launch_other_shapes():
    half = torch.float16
    for M in (1, 48):
        x, weight = meta(M, 200, dtype=half), meta(200)
        add_layer_norm.forward(x, x, weight, weight, 1e-6, x, x)
        add_layer_norm.backward(None, x, x, weight, 1e-6, x)
    for M, K, need_codebook in ((5, 1000, False), (1, 70, True)):
        logits, codebook, rows = meta(M, K, dtype=half), meta(K, 24, dtype=half), meta(M, 24, dtype=half)
        code_mixture.forward(logits, codebook, rows)
        code_mixture.backward(rows, logits, codebook, rows, logits, need_codebook)
    for channels, side in ((96, 24), (32, 5), (96, 1), (32, 1)):
        x = meta(2, channels, side, side, dtype=half).contiguous(memory_format=torch.channels_last)
        weight, statistics = meta(channels), meta(2, 8)
        group_norm_silu.forward(x, None, 8, weight, weight, 1e-6, x, x, statistics, statistics)
        group_norm_silu.backward(x, None, x, weight, weight, statistics, statistics, x)
    for heads, tokens, queries in ((1, 50, 16), (5, 200, 1)):
        qkv = meta(2, tokens, 3 * heads * 40 + 1, dtype=half)[:, :, 1:]  # rows of an odd stride, from an odd address
        out, lse = meta(2, queries, heads * 40, dtype=half), meta(2, heads, queries)
        key_mask, dqkv = meta(2, tokens, dtype=torch.bool), meta(2, tokens, 3 * heads * 40, dtype=half)
        masked_attention.forward(qkv, key_mask, heads, 1, 0.5, out, None)
        attention_backward(out, qkv, key_mask, out, lse, heads, 1, 0.5, dqkv)
    for M, V, C in ((1, 300, 7), (80, 16, 100)):
        nearest_codebook.forward(meta(M, C), meta(V, C), True, meta(M, dtype=torch.int64))
"""

COMPARE = (
    OTHER_SHAPES
    + """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from titok.kernels import _launch, aot

describe, backend, compared = _launch.describe, make_backend(GPUTarget("cuda", 90, 32)), 0

def compare(kernel, args, constexprs, *launch_options):
    global compared
    launch = describe(kernel, args, constexprs, *launch_options)
    values, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **constexprs
    )
    for (name, value), (kind, key) in zip(values.items(), specialization, strict=True):
        where = (kernel.__name__, name)
        assert launch.signature.get(name, "constexpr") == kind, (where, kind)
        assert (name in launch.aligned) == (kind != "constexpr" and key == "D"), (where, key)
        if kind == "constexpr":
            assert launch.constexprs[name] == value, where
    compared += 1
    return launch

_launch.describe = compare
for module in aot.modules([]):
    aot._module(module).aot_variants()
with record():
    launch_other_shapes()
print(compared)
"""
)


@pytest.mark.slow
def test_what_is_recorded_is_what_triton_compiles() -> None:
    """Triton's own analysis of the arguments agrees: types, integers that are 1, multiples of 16, constants."""
    done = run("-c", COMPARE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


COMPILE = (
    OTHER_SHAPES
    + """
from titok.kernels import aot
with record() as launches:
    launch_other_shapes()
for launch in launches:
    compiled = aot.compile_launch(launch, 90)
    assert len(compiled.asm["cubin"]) > 0 and compiled.name == launch.kernel.__name__
print(len({launch.kernel.__name__ for launch in launches}))
"""
)


@pytest.mark.slow
def test_shapes_of_no_preset_compile() -> None:
    done = run("-c", COMPILE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 14


REJECTED = """
from dataclasses import replace
from titok.kernels import _spills, add_layer_norm, aot, code_mixture
norm, mixture = add_layer_norm.aot_variants()[0], code_mixture.aot_variants()[0]
for variant in (
    norm,
    replace(norm, expects_tensor_cores=True),
    replace(norm, aligned=frozenset()),
    replace(norm, signature={**norm.signature, "x_ptr": "*i1000"}),
    replace(norm, constexprs={"D": 8192, "BLOCK_D": 8192}),
    replace(mixture, num_stages=9),
):
    print(";".join(aot.examine(variant, 80).failures))
spilling = replace(norm, constexprs={"D": 8192, "BLOCK_D": 8192})
release = ".".join(aot.triton.__version__.split(".")[:2])
for releases, most in ((f"0.1 {release}", 10**6), (release, 1), ("0.1", 10**6)):
    row = _spills.AllowedSpills(norm.kernel.__name__, "^bf16", "80 90", releases, most, "a test")
    _spills.ALLOWED_SPILLS = (row,)
    print(";".join(aot.examine(spilling, 80).failures))
"""


@pytest.mark.slow
def test_what_it_rejects() -> None:
    done = run("-c", REJECTED)
    assert done.returncode == 0, done.stderr
    fine, no_dot, unaligned, no_type, spilling, huge, allowed, more, other_release = done.stdout.splitlines()
    assert fine == ""
    assert no_dot.endswith("on sm_80: no tensor-core instruction")
    assert re.search(r"none of \d+ loads is 16 bytes wide", unaligned)
    assert "on sm_80: " in no_type
    assert re.search(r"[1-9]\d* spill instructions, allowed are 0$", spilling)
    assert re.search(r"\d+ bytes of shared memory, a block can have 166912", huge)
    assert (allowed, other_release) == ("", spilling)
    assert more == spilling.replace("allowed are 0", "allowed are 1")


def test_allowed_spills_are_of_kernels_that_are_compiled() -> None:
    """A row that no variant needs any more is to be removed with its kernel."""
    compiled = [variant for name in aot.modules([]) for variant in aot.variants_of(name)]
    for row in ALLOWED_SPILLS:
        assert any(v.kernel.__name__ == row.kernel and re.search(row.labels, v.label) for v in compiled), row
        assert set(map(int, row.archs.split())) <= set(aot.SHARED_LIMITS)


@pytest.mark.slow
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
