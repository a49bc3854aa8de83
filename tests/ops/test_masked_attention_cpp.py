"""masked_attention in C++: every instruction set that this machine has and each number of threads, at awkward sizes.

What it has in common with the other back ends is in test_masked_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
import oracles
from titok import ops
from titok.ops import masked_attention
from titok.ops.core.available import why_no_cpp

CPP = partial(masked_attention, backend="cpp")
TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(why_no_cpp() is not None, reason=str(why_no_cpp()))
DTYPES = [torch.float32, torch.bfloat16]
# of the largest value; the first is that of the other back ends' float32
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
GRADIENT = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}  # which is a difference, of rounded outputs among others


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def gradient(
    run: Callable[..., torch.Tensor], qkv: torch.Tensor, heads: int, grad: torch.Tensor, **options: Any
) -> torch.Tensor:
    leaf = qkv.detach().requires_grad_()
    return torch.autograd.grad(run(leaf, heads, **options), leaf, grad)[0]


def rms(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).square().mean().sqrt())


# (batch, tokens, heads, head dim): one token, tails of every kind of tile, all head dims of the presets and some that
# are no multiple of a vector or odd, more than one block of queries
SHAPES = [
    (1, 1, 2, 64), (2, 2, 3, 32), (3, 17, 2, 48), (2, 33, 2, 64), (2, 65, 1, 72), (1, 50, 3, 80),
    (1, 129, 2, 96), (2, 97, 1, 128), (1, 289, 2, 64), (1, 600, 1, 64), (2, 20, 2, 7), (2, 20, 2, 6), (1, 9, 1, 200),
]  # fmt: skip
PROGRAM = """
from test_masked_attention_cpp import run_cases
from titok.ops.core.available import extension
torch.set_num_threads(threads)
torch.save((extension().cpu_isa(), run_cases()), path)
"""


def make_case(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, dict]:
    batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator).to(dtype)
    key_mask = torch.rand(batch, tokens, generator=generator) > 0.4
    key_mask[1:2] = False  # where there is a second sample, it has no visible key
    return qkv, {"key_mask": key_mask, "query_range": (tokens // 3, tokens), "scale": -0.2}


def run_cases(attention: Callable[..., torch.Tensor] = CPP) -> list[torch.Tensor]:
    """Outputs and gradients."""
    results = []
    for dtype in DTYPES:
        for shape in SHAPES:
            qkv, options = make_case(dtype, shape)
            for chosen in ({}, options):
                leaf = qkv.clone().requires_grad_()
                out = attention(leaf, shape[2], **chosen)
                grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                results += [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]
    return results


@pytest.fixture(scope="module")
def exact() -> list[torch.Tensor]:
    def attention(leaf: torch.Tensor, heads: int, **options: Any) -> torch.Tensor:
        return oracles.attention(leaf.double(), heads, **options)

    return run_cases(attention)


def run_program(path: Path, isa: str | None, threads: int) -> tuple[str, list[torch.Tensor]]:
    code = f"threads, path = {threads}, {str(path)!r}\n{PROGRAM}"
    forked.in_processes(1, code, TESTS, **({} if isa is None else {"TITOK_CPU_ISA": isa}))
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
    for i, (result, expected) in enumerate(zip(results, exact, strict=True)):
        assert result.shape == expected.shape
        assert result.isfinite().all()
        assert error(result, expected) < (GRADIENT if i % 2 else TOLERANCE)[result.dtype]
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


def eager(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens", [33, 65, 289])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_bfloat16_gradients_are_more_exact_than_those_of_products(tokens: int, spread: float) -> None:
    qkv = (spread * torch.randn(2, tokens, 3 * 2 * 64)).bfloat16()
    grad = torch.randn(2, tokens, 2 * 64).bfloat16()
    expected = gradient(oracles.attention, qkv.double(), 2, grad.double())
    ours, products = (gradient(run, qkv, 2, grad) for run in (CPP, eager))
    for a, b, c in zip(*(x.chunk(3, -1) for x in (ours, products, expected)), strict=True):
        assert rms(a, c) < rms(b, c)


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
    grad = torch.randn_like(a)
    a, b = (gradient(CPP, x, 2, grad, **options) for x in (qkv, other))
    assert torch.equal(a, b)
    assert not a[1].any()
    first = options["query_range"][0]
    queries, keys, values = a.chunk(3, -1)
    for zeros in (queries[:, :first], keys[~options["key_mask"]], values[~options["key_mask"]]):
        assert zeros.numel()
        assert not zeros.any()
    for rest in (queries[0, first:], keys[options["key_mask"]], values[options["key_mask"]]):
        assert rest.any(-1).all()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_gradient(dtype: torch.dtype) -> None:
    qkv, options = make_case(dtype, (3, 19, 2, 16))
    grad = torch.randn(3, 19, 32).to(dtype)
    wide = torch.full((4, 21, 37), torch.nan, dtype=dtype)
    wide[:3, 1:20, 3:-2] = grad
    tokens_first = grad.transpose(0, 1).contiguous().transpose(0, 1)
    every_second = torch.stack((grad, grad), -1).flatten(2)[..., ::2]
    expected = gradient(CPP, qkv, 2, grad)
    for x in (wide[:3, 1:20, 3:-2], tokens_first, every_second):
        assert torch.equal(gradient(CPP, qkv, 2, x), expected)
    for x in (
        torch.tensor(2.0).to(dtype).expand(3, 19, 32),
        grad[:1].expand(3, -1, -1),
        grad[:, :1].expand(-1, 19, -1),
    ):
        assert torch.equal(gradient(CPP, qkv, 2, x), gradient(CPP, qkv, 2, x.contiguous()))
    rows = {**options, "query_range": (4, 9)}
    assert torch.equal(
        gradient(CPP, qkv, 2, grad[:, 4:9], **rows), gradient(CPP, qkv, 2, grad[:, 4:9].clone(), **rows)
    )


def test_twice_under_autocast() -> None:
    """As two layers in mixed precision: qkv in bfloat16 from a float32 leaf, the backward in and outside autocast."""
    x, grad = torch.randn(2, 21, 96), torch.randn(2, 21, 32)

    def both(leaf: torch.Tensor) -> torch.Tensor:
        first = masked_attention(leaf.bfloat16(), 2)
        return masked_attention((first.repeat(1, 1, 3) + leaf).bfloat16(), 2).float()

    def oracle(leaf: torch.Tensor) -> torch.Tensor:
        return oracles.attention(oracles.attention(leaf, 2).repeat(1, 1, 3) + leaf, 2)

    (expected,) = torch.autograd.grad(both(leaf := x.clone().requires_grad_()), leaf, grad)
    (exact,) = torch.autograd.grad(oracle(leaf := x.double().requires_grad_()), leaf, grad.double())
    assert error(expected, exact) < 2e-2
    for outside in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = both(leaf)
            if not outside:
                out.backward(grad)
        if outside:
            out.backward(grad)
        assert ops.last_backend("masked_attention") == "cpp"
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_what_runs_without_a_name(dtype: torch.dtype) -> None:
    """With and without the short way in, with and without a gradient."""
    name = "cpp" if dtype in DTYPES else "sdpa"
    qkv, mask = torch.randn(2, 5, 48).to(dtype), torch.ones(2, 5, dtype=torch.bool)
    for options in ({}, {"key_mask": mask}, {"query_range": (0, 5)}, {"backend": "auto"}):
        out = masked_attention(qkv, 2, **options)
        assert ops.last_backend("masked_attention") == name
        assert error(out, oracles.attention(qkv, 2)) < TOLERANCE.get(dtype, 2e-3)
        with torch.no_grad():
            assert torch.equal(masked_attention(qkv.requires_grad_(), 2, **options), out)
        masked_attention(torch.zeros(1, 1, 3), 1, backend="plain")  # so that the next lines see their own
        trained = masked_attention(qkv, 2, **options)
        assert ops.last_backend("masked_attention") == name
        assert torch.equal(trained, out)
        trained.sum().backward()
        assert ops.last_backend("masked_attention_backward") == name
        qkv = qkv.detach()


def test_what_it_cannot_take_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"backend 'cpp' cannot run: the C\+\+ kernel takes float32 and bfloat16"
    ):
        masked_attention(torch.zeros(1, 2, 48).half(), 2, backend="cpp")
