"""Every op on meta tensors, forward and backward, and in a program that is exported, saved and loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titok import ops


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def decode(logits: Tensor, tokens: Tensor, **options: Any) -> tuple[Tensor, ...]:
    step = {"step": 0, "steps": 2, "num_masked": 2, "mask_token": 8}
    return ops.maskgit_decode_step(tokens, logits, return_confidence=True, **step, **options)  # type: ignore


MASKED = torch.full((2, 5), 8)
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "add_layer_norm": (
        lambda *t: ops.add_layer_norm(*t, 1e-5, out_dtype=torch.bfloat16),
        (torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8), torch.ones(8)),
    ),
    "layer_norm": (lambda *t: ops.layer_norm(*t, 1e-5), (torch.randn(2, 5, 8), torch.ones(8), torch.ones(8))),
    "code_mixture": (ops.code_mixture, (torch.randn(2, 5, 7), torch.randn(7, 3))),
    "group_norm_silu": (
        lambda x, w, b: ops.group_norm_silu(x, 2, w, b, 1e-5), (image(2, 8, 3, 5), torch.ones(8), torch.ones(8)),
    ),
    "group_norm_silu of a sum": (
        lambda x, y, w, b: ops.group_norm_silu(x, 2, w, b, 1e-5, residual=y),
        (image(2, 8, 3, 5), image(2, 8, 3, 5), torch.ones(8), torch.ones(8)),
    ),
    "masked_attention": (
        lambda qkv, mask: ops.masked_attention(qkv, 2, key_mask=mask, query_range=(1, 4)),
        (torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)),
    ),
    "maskgit_decode_step": (decode, (torch.randn(2, 5, 8), MASKED)),
    "maskgit_decode_step with rows": (
        lambda logits, tokens, rows: decode(logits, tokens, rows=rows),
        (torch.randn(3, 8), MASKED, torch.zeros(2, 5, dtype=torch.int64)),
    ),
    "nearest_codebook": (
        lambda *t: ops.nearest_codebook(*t, normalize=True, return_quantized=True),
        (torch.randn(2, 5, 8), torch.randn(7, 8)),
    ),
    "quantize": (ops.quantize, (torch.randn(2, 5, 8), torch.randn(7, 8))),
}  # fmt: skip


def layout(outputs: Any) -> list[Any]:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return [None if t is None else (t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_have_the_layout_of_the_results(name: str) -> None:
    op, tensors = CASES[name]
    on_meta = [t.to("meta") for t in tensors]
    with torch.no_grad():
        assert layout(op(*on_meta)) == layout(op(*tensors))
    if "maskgit" in name:  # nothing to differentiate
        return
    gradients = []
    for inputs in (on_meta, tensors):
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        outputs = op(*leaves)
        floats = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
        wanted = [t for t in leaves if t.requires_grad]
        gradients.append(layout(torch.autograd.grad([t.float().sum() for t in floats], wanted, allow_unused=True)))
    assert gradients[0] == gradients[1]


class AllOps(nn.Module):
    def forward(self, inputs: dict[str, tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = [op(*inputs[name]) for name, (op, _) in CASES.items()]
        return [t for output in outputs for t in (output if isinstance(output, tuple) else (output,))]


@pytest.mark.slow
def test_exported_program_loads_where_the_ops_are_imported(tmp_path: Path) -> None:
    inputs = {name: tensors for name, (_, tensors) in CASES.items()}
    torch.export.save(torch.export.export(AllOps(), (inputs,)), tmp_path / "program.pt2")
    torch.save((inputs, AllOps()(inputs)), tmp_path / "tensors.pt")
    code = """
import torch, titok.ops
program = torch.export.load("program.pt2").module()
inputs, expected = torch.load("tensors.pt")
outputs = program(inputs)
assert len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
