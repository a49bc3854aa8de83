"""masked_attention in C++: every instruction set that this machine has and each number of threads, at awkward sizes.

What it has in common with the other back ends is in test_masked_attention.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oracles
from titok import ops
from titok.ops import masked_attention
from titok.ops._extension import why_no_cpp

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(why_no_cpp() is not None, reason=str(why_no_cpp()))
DTYPES = [torch.float32, torch.bfloat16]
# of the largest value; the first is that of the other back ends' float32
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def rms(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).square().mean().sqrt())


# (batch, tokens, heads, head dim): one token, tails of every kind of tile, all head dims of the presets and some that
# are no multiple of a vector or odd, more than one block of queries
SHAPES = [
    (1, 1, 2, 64), (2, 2, 3, 32), (3, 17, 2, 48), (2, 33, 2, 64), (2, 65, 1, 72), (1, 50, 3, 80),
    (1, 129, 2, 96), (2, 97, 1, 128), (1, 289, 2, 64), (1, 600, 1, 64), (2, 20, 2, 7), (2, 20, 2, 6), (1, 9, 1, 200),
]  # fmt: skip
PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from test_masked_attention_cpp import run_cases
from titok.ops._extension import extension
torch.set_num_threads(int(sys.argv[1]))
torch.save((extension().cpu_isa(), run_cases()), sys.argv[2])
"""


def make_case(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, dict]:
    batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator).to(dtype)
    key_mask = torch.rand(batch, tokens, generator=generator) > 0.4
    key_mask[1:2] = False  # where there is a second sample, it has no visible key
    return qkv, {"key_mask": key_mask, "query_range": (tokens // 3, tokens), "scale": -0.2}


def run_cases() -> list[torch.Tensor]:
    results = []
    for dtype in DTYPES:
        for shape in SHAPES:
            qkv, options = make_case(dtype, shape)
            results.append(masked_attention(qkv, shape[2], backend="cpp"))
            results.append(masked_attention(qkv, shape[2], backend="cpp", **options))
    return results


@pytest.fixture(scope="module")
def exact() -> list[torch.Tensor]:
    results = []
    for dtype in DTYPES:
        for shape in SHAPES:
            qkv, options = make_case(dtype, shape)
            results += [oracles.attention(qkv, shape[2]), oracles.attention(qkv, shape[2], **options)]
    return results


def run_program(path: Path, isa: str | None, threads: int) -> tuple[str, list[torch.Tensor]]:
    environment = {k: v for k, v in os.environ.items() if k != "TITOK_CPU_ISA"}
    environment |= {} if isa is None else {"TITOK_CPU_ISA": isa}
    command = [sys.executable, "-c", PROGRAM, str(threads), str(path), str(TESTS)]
    subprocess.run(command, check=True, env=environment, timeout=120)
    return torch.load(path)


# None: all that the machine has, AVX-512's products of bfloat16 among it, which "avx512" leaves out
@pytest.mark.slow
@pytest.mark.parametrize("isa", [None, "avx512", "avx2", "generic"])
def test_each_instruction_set_and_number_of_threads(
    tmp_path: Path, exact: list[torch.Tensor], isa: str | None
) -> None:
    ran_on, results = run_program(tmp_path / "two", isa, 2)
    if isa is not None and ran_on != isa:
        pytest.skip(f"a machine without {isa}")
    for result, expected in zip(results, exact, strict=True):
        assert result.shape == expected.shape
        assert result.isfinite().all()
        assert error(result, expected) < TOLERANCE[result.dtype]
    for threads in (1, 3):
        _, others = run_program(tmp_path / str(threads), isa, threads)
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("tokens", [33, 65, 289])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_bfloat16_is_as_exact_as_sdpa(tokens: int, spread: float) -> None:
    qkv = (spread * torch.randn(2, tokens, 3 * 2 * 64)).bfloat16()
    expected = oracles.attention(qkv, 2)
    ours, sdpa = (masked_attention(qkv, 2, backend=name) for name in ("cpp", "sdpa"))
    assert rms(ours, expected) < 1.02 * rms(sdpa, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_small_values(dtype: torch.dtype) -> None:
    for magnitude in (1e-30, 1e-10, 1e6, 1e15):
        qkv = torch.randn(1, 40, 3 * 32).to(dtype)
        qkv[..., :32] *= magnitude
        qkv[..., 64:] *= magnitude
        assert error(masked_attention(qkv, 1, backend="cpp"), oracles.attention(qkv, 1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 33, 70])
def test_infinities_and_nan(tokens: int, dtype: torch.dtype) -> None:
    """As the definition has them: a score of -inf is no weight, one of inf and all of -inf are NaN."""
    clean = torch.randn(1, tokens, 3 * 8).to(dtype)
    clean[..., :16] = clean[..., :16].abs()  # so that a score is inf or -inf as its key is
    for token in (0, tokens - 1):
        for channel, value in ((0, torch.inf), (8, torch.inf), (8, -torch.inf), (8, torch.nan), (17, torch.inf)):
            qkv = clean.clone()
            qkv[0, token, channel] = value
            out, expected = masked_attention(qkv, 1, backend="cpp"), oracles.attention(qkv, 1)
            assert torch.equal(out.isfinite(), expected.isfinite())
            assert torch.allclose(
                out[out.isfinite()].double(), expected[out.isfinite()], atol=TOLERANCE[dtype] * 4
            )
    qkv = clean.clone()
    qkv[0, :, 8] = -torch.inf
    assert masked_attention(qkv, 1, backend="cpp").isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_tokens_may_hold_anything(dtype: torch.dtype) -> None:
    qkv, options = make_case(dtype, (3, 33, 2, 16))
    other = torch.where(options["key_mask"][..., None], qkv, torch.nan)
    other[..., :32] = qkv[..., :32]  # the queries
    a, b = (masked_attention(x, 2, backend="cpp", **options) for x in (qkv, other))
    assert torch.equal(a, b)
    assert not a[1].any()


def test_strides() -> None:
    qkv = torch.randn(3, 19, 3 * 2 * 16)
    expected = masked_attention(qkv, 2, backend="cpp")
    wide = torch.full((4, 21, 3 * 2 * 16 + 5), torch.nan)
    wide[:3, 1:20, 3:-2] = qkv
    inside = wide[:3, 1:20, 3:-2]
    tokens_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    backwards = qkv.flip(2).contiguous().flip(2)
    for x in (inside, tokens_first, backwards):
        assert torch.equal(masked_attention(x, 2, backend="cpp"), expected)
    expanded = masked_attention(qkv[:1].expand(3, -1, -1), 2, backend="cpp")
    assert torch.equal(expanded, expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_what_runs_without_a_name(dtype: torch.dtype) -> None:
    """C++ where no gradient is wanted, with and without the short way in; SDPA, which keeps what a backward needs."""
    qkv, mask = torch.randn(2, 5, 48).to(dtype), torch.ones(2, 5, dtype=torch.bool)
    for options in ({}, {"key_mask": mask}, {"query_range": (0, 5)}, {"backend": "auto"}):
        out = masked_attention(qkv, 2, **options)
        assert ops.last_backend("masked_attention") == ("cpp" if dtype in DTYPES else "sdpa")
        assert error(out, oracles.attention(qkv, 2)) < TOLERANCE.get(dtype, 2e-3)
        with torch.no_grad():
            assert torch.equal(masked_attention(qkv.requires_grad_(), 2, **options), out)
        masked_attention(qkv, 2, **options).sum().backward()
        assert ops.last_backend("masked_attention") == "sdpa"
        qkv = qkv.detach()


def test_what_it_cannot_take_is_named() -> None:
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it takes float32 and bfloat16, got float16"):
        masked_attention(torch.zeros(1, 2, 48).half(), 2, backend="cpp")
