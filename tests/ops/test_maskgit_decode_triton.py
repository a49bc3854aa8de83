"""`maskgit_decode_step` in Triton: the bits of the C++ path (of plain PyTorch where there is no extension).

Without a GPU the kernels run in Triton's interpreter, which fuses no multiplication and addition. That the compiler
fuses none either is read from the machine code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgit_cases import order_of, random_case
from titok.ops import last_backend, maskgit_decode_step, maskgit_decode_step_packed, pack_step_params
from titok.ops.core.available import why_no_cpp

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = "plain" if why_no_cpp() else "cpp"


def steps_of(*tensors: Tensor | None, **arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """New tokens and confidences by the reference and by Triton, on the CPU."""
    results = []
    for backend, device in ((REFERENCE, "cpu"), ("triton", DEVICE)):
        moved = [None if t is None else t.to(device) for t in tensors]
        given = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        new, scores = maskgit_decode_step(*moved, **given, return_confidence=True, backend=backend)
        assert last_backend("maskgit_decode_step") == backend
        results.append((new.cpu(), scores.cpu()))
    return results[0], results[1]


def assert_same_bits(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))


def cases(numbers: range) -> list[Any]:
    return [pytest.param(number, marks=[pytest.mark.slow] if number >= 24 else []) for number in numbers]


@pytest.mark.parametrize("number", cases(range(150)))
def test_random_cases(number: int) -> None:
    """Every combination of dtype, rule, temperature, guidance, nasty value and shape comes up."""
    case = random_case(number, most_tokens=6)
    want, got = steps_of(*case.tensors, **case.arguments)
    assert_same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("codes", [4096, 5000])
def test_more_codes_than_a_block_holds(codes: int) -> None:
    logits = torch.randn(2, 1, 2, codes)
    tokens = torch.full((1, 2), codes)
    for confidence in ("titok", "maskgit"):
        want, got = steps_of(
            tokens, *logits, step=1, steps=8, num_masked=1, mask_token=codes, guidance=2.5, noise_temperature=1.5,
            confidence=confidence, seed=7,
        )  # fmt: skip
        assert_same_bits(got, want)


def test_rows_and_counts_of_each_sample() -> None:
    """Rows in any order, shared by positions, with a stride; one row; counts below 0 and above all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.where(torch.rand(3, 5, generator=generator) < 0.3, 1, 40)
    arguments = {"step": 2, "steps": 8, "mask_token": 40, "guidance": 3.0, "noise_temperature": 2.0, "seed": 3}
    for row_count in (1, 4, 16):
        logits = torch.randn(2, row_count, 80, generator=generator)[:, :, :40]
        rows = torch.randint(row_count, (2, 3, 5), generator=generator)
        for counts in (torch.tensor([0, 2, 100]), 3):
            want, got = steps_of(
                tokens, *logits, rows=rows[0], uncond_rows=rows[1], num_masked=counts, **arguments
            )
            assert_same_bits(got, want)


def test_packed_numbers_and_output_in_place() -> None:
    tokens, logits = torch.full((2, 4), 30, device=DEVICE), torch.randn(2, 4, 30, device=DEVICE)
    numbers = {"step": 3, "steps": 8, "num_masked": 2, "noise_temperature": 1.0, "seed": (1 << 64) - 5}
    numbers |= {"first_sample": (1 << 40) + 3}
    want = maskgit_decode_step(tokens.cpu(), logits.cpu(), mask_token=30, backend=REFERENCE, **numbers)
    params = pack_step_params(**numbers).to(DEVICE)
    got, order = maskgit_decode_step_packed(
        tokens, logits, params=params, mask_token=30, out=tokens, return_order=True, backend="triton"
    )
    assert got is tokens
    assert torch.equal(tokens.cpu(), want)
    assert torch.equal(order.cpu(), order_of(want == 30))


def test_the_order_of_many_positions() -> None:
    """None, some and all of the positions stay masked; some were known before."""
    tokens = torch.where(torch.arange(3 * 37).view(3, 37) % 5 == 2, 1, 4)
    logits, params = torch.randn(3, 37, 4), pack_step_params(step=0, steps=2, num_masked=0).to(DEVICE)
    arguments = {"params": params, "mask_token": 4, "num_masked": torch.tensor([0, 11, 37], device=DEVICE)}
    new, order = maskgit_decode_step_packed(
        tokens.to(DEVICE), logits.to(DEVICE), **arguments, return_order=True, backend="triton"
    )
    assert torch.equal((new == 4).sum(1).cpu(), torch.tensor([0, 11, int((tokens[2] == 4).sum())]))
    assert torch.equal(order.cpu(), order_of(new.cpu() == 4))


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from titok.kernels import aot, maskgit_decode_step
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for variant in maskgit_decode_step.aot_variants()[:2]:
    assert not variant.fp_fusion
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(aot.compile_launch(variant, 90).asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    print(variant.kernel.__name__, len(re.findall(r"\\bFFMA\\b", sass)), len(re.findall(r"\\bFMUL\\b", sass)))
"""


@pytest.mark.slow
def test_no_multiplication_is_fused_with_an_addition() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    (draw, fused, products), (select, fused_too, _) = (line.split() for line in done.stdout.splitlines())
    assert (draw, select) == ("maskgit_decode_step_draw", "maskgit_decode_step_select")
    assert (fused, fused_too) == ("0", "0")
    assert int(products) > 10
