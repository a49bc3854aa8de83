"""Whole models under `torch.compile` and `torch.export`, without a graph break and with a free batch size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from titok import (
    MaskGIT,
    Pipeline,
    SamplingConfig,
    TiTok,
    sample_tokens,
)
from titok.inference.prepared_weights import PreparedError
from wide_models import wide_generator, wide_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SAMPLING = SamplingConfig(steps=3)


@pytest.fixture(scope="module")
def tokenizer() -> TiTok:
    return wide_tokenizer(layers=1)


@pytest.fixture(scope="module")
def generator() -> MaskGIT:
    return wide_generator(sampling=SAMPLING)


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that is compiled as one graph, which AOTAutograd has traced too."""
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


def test_encode_and_decode(tokenizer: TiTok) -> None:
    images = torch.rand(2, 3, 32, 32)
    tokens = tokenizer.encode(images)
    assert torch.equal(compiled(tokenizer.encode, images), tokens)
    assert torch.allclose(compiled(tokenizer.decode, tokens), tokenizer.decode(tokens), atol=1e-4)


@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_sampling(architecture: Literal["vit", "uvit"]) -> None:
    generator = wide_generator(architecture=architecture, sampling=SAMPLING)
    tokens, labels = torch.randint(64, (3, 8)), torch.tensor([1, 4, 4])
    assert torch.allclose(compiled(generator, tokens, labels), generator(tokens, labels), atol=1e-5)
    got = compiled(
        lambda labels: sample_tokens(generator, labels, seed=3), labels if architecture == "vit" else [1, 4, 4]
    )
    assert torch.equal(got, sample_tokens(generator, labels, seed=3))


def test_the_pipeline(tokenizer: TiTok, generator: MaskGIT) -> None:
    pipe = Pipeline(tokenizer, generator, prepare=False)
    labels = torch.tensor([1, 4, 4])
    got = compiled(lambda labels: pipe(labels, seed=3), labels)
    want = pipe(labels, seed=3)
    assert (got.int() - want.int()).abs().max() <= 1
    wrapped = Pipeline(torch.compile(tokenizer, backend="eager"), torch.compile(generator, backend="eager"))  # type: ignore[arg-type]
    assert (wrapped(labels, seed=3).int() - want.int()).abs().max() <= 1
    assert not tokenizer.prepared
    assert not generator.prepared


def test_prepared_weights_are_named_as_the_reason(tokenizer: TiTok) -> None:
    tokens = torch.randint(64, (2, 8))
    try:
        with pytest.raises((PreparedError, RuntimeError), match=r"unprepare\(\)"):
            compiled(tokenizer.prepare().decode, tokens)
    finally:
        tokenizer.unprepare()


LOAD = """
import sys, torch
import titok.ops
module = torch.export.load(sys.argv[1]).module()
inputs, want = torch.load(sys.argv[2], weights_only=True)
assert torch.allclose(module(*inputs), want, atol=1e-4)
"""


@pytest.mark.parametrize("part", ["encoder", "decoder", "tokenizer", "generator"])
def test_export_with_a_free_batch(tokenizer: TiTok, generator: MaskGIT, part: str, tmp_path: Path) -> None:
    modules: dict[str, tuple[torch.nn.Module, tuple[Tensor, ...]]] = {
        "encoder": (tokenizer.encoder, (torch.rand(4, 3, 32, 32),)),
        "decoder": (tokenizer.decoder, (torch.randn(4, 8, 12),)),
        "tokenizer": (tokenizer, (torch.rand(4, 3, 32, 32),)),
        "generator": (generator, (torch.randint(64, (4, 8)), torch.randint(10, (4,)))),
    }
    module, inputs = modules[part]
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
        fewer = tuple(x[:3] for x in inputs)
        got, want = program.module()(*fewer), module(*fewer)
    if part == "tokenizer":
        got, want = got[0], want[0]
    assert torch.allclose(got, want, atol=1e-4)
    if part == "decoder":  # in a process that has imported nothing but the ops
        torch.export.save(program, tmp_path / "program.pt2")
        torch.save((fewer, want), tmp_path / "case.pt")
        command = [sys.executable, "-c", LOAD, str(tmp_path / "program.pt2"), str(tmp_path / "case.pt")]
        subprocess.run(command, check=True, timeout=300)
