"""group_norm_silu: every back end against float64, far means, gradients, layouts, tracing, empty, NaN, bad input.

This file is longer than 400 lines because all tests of one op share its inputs and tolerances.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
import oracles
from titok import ops
from titok.ops import group_norm_silu, last_backend

pytestmark = pytest.mark.usefixtures("device_of_backend")

OP = torch.ops.titok.group_norm_silu.default
BACKWARD_OP = torch.ops.titok.group_norm_silu_backward.default
BACKENDS = ["plain", "cpp", "triton"]
EPS = 1e-6
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# one unit in the last place of the largest values; the interpreter truncates to bfloat16 where hardware rounds
TOLERANCE = {F64: 1e-12, F32: 3e-6, F16: 2e-3, BF16: 1.6e-2}
CHANNELS_LAST = torch.channels_last
# B, C, H, W, groups: odd sides; channels that are no multiple of a vector; groups of 1, 3 and all channels; one pixel;
# more pixels than a chunk of either kernel, with a tail, so that sums are combined
SHAPES = [
    (2, 64, 5, 7, 8),
    (1, 9, 13, 11, 3),
    (3, 5, 4, 4, 5),
    (2, 48, 9, 30, 16),
    (1, 130, 1, 1, 1),
    (1, 40, 29, 33, 4),
]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | None = None, offset: float = 0.0
) -> list[torch.Tensor]:
    """x, residual (channels-last), weight, bias."""
    batch, channels, height, width, _ = shape
    x, residual = torch.randn(2, batch, channels, height, width, device=device)
    wide = F64 if dtype == F64 else F32
    weight, bias = 1 + torch.randn(channels, device=device), torch.randn(channels, device=device)
    maps = [m.to(dtype).contiguous(memory_format=CHANNELS_LAST) for m in (x + offset, residual)]
    return [*maps, weight.to(wide), bias.to(wide)]


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{error:.2e} of the largest value, {tolerance:.0e} allowed"


def check(
    shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype | None, backend: str, device: str | None = None
) -> None:
    """Both forms of the op and all its gradients."""
    groups = shape[-1]
    x, residual, weight, bias = (t.requires_grad_() for t in inputs(shape, dtype, device))
    arguments: dict[str, Any] = {"out_dtype": out, "backend": backend}
    alone = group_norm_silu(x, groups, weight, bias, EPS, **arguments)
    assert last_backend("group_norm_silu") == backend
    assert isinstance(alone, torch.Tensor)
    assert alone.dtype == (out or dtype)
    assert alone.is_contiguous(memory_format=CHANNELS_LAST)
    leaves = (x, weight, bias)
    expected = oracles.group_norm_silu(x, groups, weight, bias, EPS)
    assert_close(alone, expected, TOLERANCE[alone.dtype])
    grad = torch.randn_like(alone)
    want = torch.autograd.grad(expected, leaves, grad.double())
    tolerance = 4 * max(TOLERANCE[dtype], TOLERANCE[alone.dtype])
    for got, exact, leaf in zip(torch.autograd.grad(alone, leaves, grad), want, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert_close(got, exact.double(), tolerance)

    total, normalised = group_norm_silu(x, groups, weight, bias, EPS, residual=residual, **arguments)
    assert total.dtype == dtype
    assert total.is_contiguous(memory_format=CHANNELS_LAST)
    assert_close(total, x.double() + residual.double(), TOLERANCE[dtype])
    rounded = total.detach().double().requires_grad_()  # what is normalised is the rounded sum
    expected = oracles.group_norm_silu(rounded, groups, weight, bias, EPS)
    assert_close(normalised, expected, TOLERANCE[normalised.dtype])
    grad_total = torch.randn_like(total)
    want_sum, *want_affine = torch.autograd.grad(expected, (rounded, weight, bias), grad.double())
    want_all = [want_sum + grad_total.double()] * 2 + want_affine
    got_all = torch.autograd.grad((total, normalised), (x, residual, weight, bias), (grad_total, grad))
    for got, exact in zip(got_all, want_all, strict=True):
        assert_close(got, exact.double(), tolerance)


DTYPES = [(F32, None), (BF16, None), (F32, BF16), (BF16, F32)]
LARGE = [SHAPES[3], SHAPES[5]]  # Triton's interpreter takes seconds for one of these


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "out"), DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["plain", "cpp"])
def test_matches_float64(
    backend: str, dtype: torch.dtype, out: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    check(shape, dtype, out, backend)


def triton_case(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype | None) -> Any:
    marks = [pytest.mark.slow] if shape in LARGE or out is not None else []
    return pytest.param(shape, dtype, out, marks=marks)


@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize(("shape", "dtype", "out"), [triton_case(s, *d) for s in SHAPES for d in DTYPES], ids=str)
def test_triton_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype | None) -> None:
    check(shape, dtype, out, "triton")


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_float16(backend: str) -> None:
    check(SHAPES[0], F16, None, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2, 128, 256, 256, 32), (4, 512, 32, 32, 32)], ids=str)
@pytest.mark.parametrize(("dtype", "out"), [*DTYPES, (F16, None)], ids=str)
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_matches_float64_on_gpu(backend: str, dtype: torch.dtype, out: torch.dtype | None, shape: Any) -> None:
    check(shape, dtype, out, backend, "cuda")


# as many standard deviations from zero as leave a map's own rounding below the tolerance
@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"), [(F32, 1e4, 2e-3), (F32, -300.0, 6e-5), (BF16, 60.0, 1.6e-2)]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 16, 40, 45, 2), (2, 16, 8, 8, 4)], ids=str)
def test_mean_far_from_zero(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, offset: float, tolerance: float
) -> None:
    x, _, weight, bias = inputs(shape, dtype, offset=offset)
    got = group_norm_silu(x, shape[-1], weight, bias, EPS, backend=backend)
    assert_close(got, oracles.group_norm_silu(x, shape[-1], weight, bias, EPS), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_pixel_far_from_the_others(backend: str) -> None:
    x, _, weight, bias = inputs((1, 16, 20, 31, 4), F32)
    x[:, :, 0, 0] = 3e4
    got = group_norm_silu(x, 4, weight, bias, EPS, backend=backend)
    assert_close(got[:, :, 1:], oracles.group_norm_silu(x, 4, weight, bias, EPS)[:, :, 1:], 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_at_its_ends(backend: str) -> None:
    """Values of z to +-1,000: exp(-z) leaves float32 long before."""
    bias = torch.linspace(-1000, 1000, 64)
    x = torch.randn(1, 64, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    got = group_norm_silu(x, 8, torch.ones(64), bias, EPS, backend=backend)
    expected = oracles.group_norm_silu(x, 8, torch.ones(64), bias, EPS)
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_mixed_gradients_of_the_sum_take_plain_pytorch() -> None:
    """A caller of the raw op may give a gradient of the sum in another dtype than x's."""
    x, grad, weight, bias = inputs((2, 8, 3, 4, 2), F32)
    statistics = torch.zeros(2, 2), torch.ones(2, 2)
    got, *_ = BACKWARD_OP(grad, grad.double(), x, weight, bias, *statistics)
    assert last_backend("group_norm_silu_backward") == "plain"
    expected, *_ = BACKWARD_OP(grad, grad, x, weight, bias, *statistics)
    assert last_backend("group_norm_silu_backward") == "cpp"
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("backend", [None, "plain"])
def test_second_order_gradients_raise(backend: str | None, dispatched: bool) -> None:
    x, _, weight, bias = inputs((2, 8, 3, 4, 2), F32)
    x.requires_grad_()
    with ops.through_dispatcher() if dispatched else nullcontext():
        (grad,) = torch.autograd.grad(
            group_norm_silu(x, 2, weight, bias, EPS, backend=backend).sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match=r"is not differentiable|once_differentiable"):
            grad.square().sum().backward()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_gradcheck(memory_format: torch.memory_format, residual: bool) -> None:
    x, other, weight, bias = inputs((2, 6, 2, 3, 3), F64)
    leaves = [t.contiguous(memory_format=memory_format).requires_grad_() for t in (x, other)]
    leaves += [weight.requires_grad_(), bias.requires_grad_()]

    def op(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return group_norm_silu(x, 3, weight, bias, EPS, residual=other if residual else None)

    assert torch.autograd.gradcheck(op, leaves)
    assert group_norm_silu(x, 3, weight, bias, EPS).dtype == F64


def test_gradient_of_the_sum_alone() -> None:
    x, other, weight, bias = (t.requires_grad_() for t in inputs(SHAPES[0], F32))
    total, _ = group_norm_silu(x, 8, weight, bias, EPS, residual=other)
    got = torch.autograd.grad(total.sum(), (x, other, weight), allow_unused=True)
    assert torch.equal(got[0], torch.ones_like(x))
    assert torch.equal(got[1], torch.ones_like(x))
    assert got[2] is None or not got[2].any()


def test_layouts() -> None:
    x, residual, weight, bias = inputs((2, 16, 6, 5, 4), F32)
    expected = oracles.group_norm_silu(x, 4, weight, bias, EPS)
    plain = group_norm_silu(x.contiguous(), 4, weight, bias, EPS)
    assert last_backend("group_norm_silu") == "plain"
    assert plain.is_contiguous()
    assert_close(plain, expected, TOLERANCE[F32])
    fast = group_norm_silu(x, 4, weight, bias, EPS)
    assert last_backend("group_norm_silu") == "cpp"
    assert fast.is_contiguous(memory_format=CHANNELS_LAST)
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match="channels-last"):
            group_norm_silu(x.contiguous(), 4, weight, bias, EPS, backend=backend)
    # a slice, and a residual in the other layout: copied
    wide = torch.randn(2, 32, 6, 5).contiguous(memory_format=CHANNELS_LAST)[:, :16]
    got = group_norm_silu(wide, 4, weight, bias, EPS)
    assert_close(got, oracles.group_norm_silu(wide, 4, weight, bias, EPS), TOLERANCE[F32])
    assert got.is_contiguous(memory_format=CHANNELS_LAST)
    total, _ = group_norm_silu(x, 4, weight, bias, EPS, residual=residual.contiguous())
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("grad", [False, True])
def test_out(backend: str | None, grad: bool) -> None:
    x, residual, weight, bias = inputs((2, 40, 6, 5, 4), F32)
    weight.requires_grad_(grad)
    alone = group_norm_silu(x, 4, weight, bias, EPS, out_dtype=BF16, backend=backend)
    buffer, other = torch.full_like(x, -7, dtype=BF16), torch.full_like(x, -7)
    got = group_norm_silu(x, 4, weight, bias, EPS, out_dtype=BF16, out=buffer, backend=backend)
    assert isinstance(got, torch.Tensor)
    assert got.data_ptr() == buffer.data_ptr()
    assert torch.equal(got, alone)
    expected = group_norm_silu(x, 4, weight, bias, EPS, residual=residual, backend=backend)
    buffers = other, torch.full_like(x, -7)
    pair = group_norm_silu(x, 4, weight, bias, EPS, residual=residual, out=buffers, backend=backend)
    for result, wanted, given in zip(pair, expected, buffers, strict=True):
        assert torch.equal(result, wanted)
        assert torch.equal(given, wanted)
    if not grad:  # in place
        stream = x.clone(memory_format=CHANNELS_LAST)
        group_norm_silu(stream, 4, weight, bias, EPS, residual=residual, out=(stream, buffers[1]), backend=backend)
        assert torch.equal(stream, expected[0])
        assert torch.equal(buffers[1], expected[1])
        plain = group_norm_silu(stream, 4, weight, bias, EPS, backend=backend)
        assert torch.equal(group_norm_silu(stream, 4, weight, bias, EPS, out=stream, backend=backend), plain)
        assert torch.equal(stream, plain)


def test_large_maps_are_streamed_past_the_caches() -> None:
    """More than 8 MiB of arguments and results: the same bits as in two halves of less."""
    for dtype, width in ((F32, 160), (BF16, 272)):
        x, residual, weight, bias = inputs((2, 32, 64, width, 4), dtype)
        both = group_norm_silu(x, 4, weight, bias, EPS, residual=residual)
        for i in range(2):
            half = group_norm_silu(x[i : i + 1], 4, weight, bias, EPS, residual=residual[i : i + 1])
            for whole, part in zip(both, half, strict=True):
                assert torch.equal(whole[i : i + 1], part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    x = torch.empty(shape).to(memory_format=CHANNELS_LAST).requires_grad_()
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8)
    total, normalised = group_norm_silu(x, 2, weight, bias, EPS, residual=x.detach(), backend=backend)
    assert total.shape == normalised.shape == shape
    normalised.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nan_and_inf_stay_in_their_group(dtype: torch.dtype, bad: float, backend: str) -> None:
    x, _, weight, bias = inputs((2, 8, 9, 20, 2), dtype)
    x[1, 5, 2, 1] = bad
    got = group_norm_silu(x, 2, weight, bias, EPS, backend=backend)
    assert got[1, 4:].isnan().all()
    assert not got[0].isnan().any()
    assert not got[1, :4].isnan().any()


def test_every_nan_survives_the_cast_to_bfloat16() -> None:
    """A NaN of all ones would round to -0 if bits were rounded blindly."""
    x = torch.full((1, 8, 2, 2), -1, dtype=torch.int32).view(F32).contiguous(memory_format=CHANNELS_LAST)
    got = group_norm_silu(x, 2, torch.ones(8), torch.zeros(8), EPS, out_dtype=BF16, backend="cpp")
    assert got.isnan().all()
    weight = x.flatten()[:8]
    x = torch.randn(1, 8, 2, 2).to(BF16).contiguous(memory_format=CHANNELS_LAST)
    assert group_norm_silu(x, 2, weight, torch.zeros(8), EPS, backend="cpp").isnan().all()
    assert group_norm_silu(x, 2, torch.ones(8), weight, EPS, backend="cpp").isnan().all()
    x = torch.full((1, 8, 2, 2), -1, dtype=torch.int16).view(BF16).contiguous(memory_format=CHANNELS_LAST)
    assert group_norm_silu(x, 2, torch.ones(8), torch.zeros(8), EPS, backend="cpp").isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_map(backend: str) -> None:
    """A variance of 0: the output is silu(bias)."""
    bias = torch.randn(16)
    x = torch.full((1, 16, 6, 6), 1234.5678).contiguous(memory_format=CHANNELS_LAST)
    got = group_norm_silu(x, 4, torch.ones(16), bias, EPS, backend=backend)
    assert_close(got, oracles.group_norm_silu(x, 4, torch.ones(16), bias, EPS), 2e-3)


PROGRAM = """
from titok import ops
from titok.ops.core.available import extension
torch.manual_seed(1)
torch.set_num_threads(threads)
results = []
for dtype, out in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)):
    for shape in ((3, 36, 20, 31), (1, 128, 33, 40), (2, 64, 8, 8)):
        x, residual = torch.randn(2, *shape).to(dtype)
        x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x + 3, residual))
        leaves = [t.requires_grad_() for t in (x, residual, *torch.randn(2, shape[1]))]
        x, residual, weight, bias = leaves
        pair = ops.group_norm_silu(x, 4, weight, bias, 1e-6, residual=residual, out_dtype=out, backend="cpp")
        results += [t.detach() for t in pair]
        results += torch.autograd.grad(pair, leaves, [torch.randn_like(t) for t in pair])
torch.save((extension().cpu_isa(), results), path)
"""


def run_program(path: Any, isa: str, threads: int) -> tuple[str, list[torch.Tensor]]:
    code = f"threads, path = {threads}, {str(path)!r}\n{PROGRAM}"
    forked.in_processes(1, code, Path(__file__).parent, TITOK_CPU_ISA=isa)
    return torch.load(path)


@pytest.mark.slow
def test_instruction_sets_and_threads_agree(tmp_path: Any) -> None:
    """Threads change no bit, nor AVX-512 against AVX2; the generic code has no fused multiply-add: rounding differs."""
    isa, best = run_program(tmp_path / "best", "avx512", 2)
    _, single = run_program(tmp_path / "single", "avx512", 1)
    assert all(torch.equal(a, b) for a, b in zip(best, single, strict=True))
    lower, avx2 = run_program(tmp_path / "avx2", "avx2", 2)
    if isa == "avx512":
        assert lower == "avx2"
    if lower == "avx2":
        assert all(torch.equal(a, b) for a, b in zip(best, avx2, strict=True))
    lowest, generic = run_program(tmp_path / "generic", "generic", 2)
    assert lowest == "generic"
    for a, b in zip(best, generic, strict=True):
        assert_close(b, a.double(), 4 * TOLERANCE[a.dtype])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_opcheck(memory_format: torch.memory_format, backend: str) -> None:
    if memory_format == torch.contiguous_format and backend != "plain":
        pytest.skip("kernels take channels-last maps")
    x, residual, weight, bias = inputs((2, 8, 3, 5, 2), F32)
    x, residual = (t.contiguous(memory_format=memory_format) for t in (x, residual))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(OP, (x, 2, *leaves[2:], EPS, None, BF16, backend), test_utils=tests)
    torch.library.opcheck(OP, (x, 2, *leaves[2:], EPS, residual, None, backend), test_utils=tests)
    stats = torch.randn(2, 2).abs()
    plain = [t.detach() for t in (x, residual, x, weight, bias)]
    torch.library.opcheck(BACKWARD_OP, (*plain, stats, stats, backend), test_utils=tests)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, 16, eps=EPS)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = group_norm_silu(x, 4, self.norm.weight, self.norm.bias, EPS)
        assert isinstance(y, torch.Tensor)
        total, z = group_norm_silu(y, 4, self.norm.weight, self.norm.bias, EPS, residual=residual, out_dtype=BF16)
        return total, z


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
def test_compile(memory_format: torch.memory_format) -> None:
    block = Block()
    x, residual = (t.contiguous(memory_format=memory_format) for t in inputs((2, 16, 5, 3, 4), F32)[:2])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    want, got = block(x, residual), compiled(x, residual)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    eager = torch.autograd.grad(want[1].sum() + want[0].sum(), block.parameters())
    traced = torch.autograd.grad(got[1].sum() + got[0].sum(), block.parameters())
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_export() -> None:
    block = Block()
    x, residual = inputs((2, 16, 5, 3, 4), F32)[:2]
    exported = torch.export.export(block, (x, residual)).module()
    for a, b in zip(block(x, residual), exported(x, residual), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [16, 128])
def test_graph_capture_and_determinism(side: int) -> None:
    x, residual, weight, bias = inputs((2, 256, side, side, 32), BF16, "cuda")

    def run() -> Any:
        return group_norm_silu(x, 32, weight, bias, EPS, residual=residual, backend="triton")

    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


X = torch.randn(2, 8, 3, 3)
ONES = torch.ones(8)
BAD = [
    ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    ({"x": X[0]}, ValueError, r"x: expected shape \(B, C, H, W\), got \(8, 3, 3\)"),
    ({"x": X.int()}, TypeError, "x: expected dtype .* got int32"),
    ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of x's 8 channels, got 3"),
    ({"num_groups": 0}, ValueError, "num_groups: .* got 0"),
    ({"num_groups": 2.0}, TypeError, "num_groups: expected an int, got float"),
    ({"x": X[:, :0], "weight": ONES[:0], "bias": ONES[:0]}, ValueError, "num_groups: .* 0 channels"),
    ({"weight": ONES[:4]}, ValueError, r"weight: expected shape \(8\), got \(4,\)"),
    ({"weight": ONES.half()}, TypeError, "weight: expected dtype float32"),
    ({"x": X.double()}, TypeError, "weight: expected dtype float64, got float32"),
    ({"bias": None}, TypeError, "bias: expected a torch.Tensor, got NoneType"),
    ({"eps": 0.0}, ValueError, r"eps: expected a number above 0, got 0\.0"),
    ({"eps": float("nan")}, ValueError, "eps: expected a number above 0, got nan"),
    ({"residual": X[:1]}, ValueError, r"residual: expected shape \(2, 8, 3, 3\), got \(1, 8, 3, 3\)"),
    ({"residual": X.bfloat16()}, TypeError, "residual: expected dtype float32, got bfloat16"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: .* got torch.int8"),
    ({"out": X[:1]}, ValueError, r"out: expected shape \(2, 8, 3, 3\), got \(1, 8, 3, 3\)"),
    ({"residual": X, "out": X}, TypeError, "out: expected a pair of tensors, got Tensor"),
    ({"out": X, "out_dtype": torch.bfloat16}, TypeError, "out: expected dtype bfloat16, got float32"),
    ({"backend": "metal"}, ValueError, "backend: .* got 'metal'"),
    (
        {"x": X.half(), "backend": "cpp"},
        RuntimeError,
        "C\\+\\+ kernel takes float32 and bfloat16, not float16",
    ),
    (
        {"x": X.double(), "weight": ONES.double(), "bias": ONES.double(), "backend": "triton"},
        RuntimeError,
        "cannot run: the Triton kernels compute in float32",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "num_groups": 2, "weight": ONES, "bias": ONES, "eps": EPS} | change
    with pytest.raises(error, match=message) as caught:
        group_norm_silu(**arguments)
    assert "\n" not in str(caught.value)
