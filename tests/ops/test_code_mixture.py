"""code_mixture: both back ends against float64, gradients, tracing, empty, one code, inf and NaN, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import oracles
from titok.ops import code_mixture, last_backend

pytestmark = pytest.mark.usefixtures("device_of_backend")

OP = torch.ops.titok.code_mixture.default
BACKENDS = ["plain", "triton"]
# relative to the largest value; the interpreter truncates to bfloat16 where hardware rounds
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(rows: int, codes: int, width: int, dtype: torch.dtype, device: str | None = None) -> list[torch.Tensor]:
    """Logits of a useful spread, a codebook, and a gradient for the result."""
    shapes = ((rows, codes), (codes, width), (rows, width))
    logits, codebook, grad = (torch.randn(s, device=device) for s in shapes)
    return [(3 * logits).to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_(), grad.to(dtype)]


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{error:.2e} of the largest value, {tolerance:.0e} allowed"


def check_against_oracle(logits: torch.Tensor, codebook: torch.Tensor, grad: torch.Tensor, backend: str) -> None:
    result = code_mixture(logits, codebook, backend=backend)
    assert result.dtype == logits.dtype
    assert last_backend("code_mixture") == backend
    expected = oracles.code_mixture(logits, codebook)
    tolerance = TOLERANCE[logits.dtype]
    assert_close(result, expected, tolerance)
    wanted = torch.autograd.grad(expected, (logits, codebook), grad.double())
    for got, want, leaf in zip(
        torch.autograd.grad(result, (logits, codebook), grad), wanted, (logits, codebook), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert_close(got, want.double(), tolerance)


# one row, one code, tails in every direction, several tiles, the widest row, more rows than one split
SHAPES = [(1, 1, 1), (33, 70, 12), (65, 64, 256), (5, 200, 33), (300, 48, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_against_oracle(*inputs(*shape, dtype), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 257, 16384])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_proxy_codes_on_gpu(dtype: torch.dtype, rows: int) -> None:
    leaves = inputs(rows, 1024, 256, dtype, "cuda")
    first, second = (
        torch.autograd.grad(code_mixture(*leaves[:2], backend="triton"), leaves[:2], leaves[2]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not deterministic"
    check_against_oracle(*(t[:512] if t.shape[0] == rows else t for t in leaves), "triton")


@pytest.mark.gpu
def test_graph_capture() -> None:
    logits, codebook, _ = (t.detach() for t in inputs(64, 1024, 256, torch.bfloat16, "cuda"))
    expected = code_mixture(logits, codebook)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = code_mixture(logits, codebook)
    graph.replay()
    assert torch.equal(captured, expected)


def test_gradcheck_float64() -> None:
    logits, codebook, _ = inputs(4, 7, 5, torch.float64)
    assert torch.autograd.gradcheck(code_mixture, (logits.detach().view(2, 2, 7).requires_grad_(), codebook))
    assert torch.autograd.gradcheck(lambda x: code_mixture(x, codebook.detach()), logits)
    assert torch.autograd.gradcheck(lambda e: code_mixture(logits.detach(), e), codebook)


@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_side_gets_no_gradient(frozen: int) -> None:
    leaves = inputs(9, 20, 6, torch.float32)
    leaves[frozen] = leaves[frozen].detach()
    result = code_mixture(*leaves[:2], backend="triton")
    (got,) = torch.autograd.grad(result, leaves[1 - frozen], leaves[2])
    expected = oracles.code_mixture(*leaves[:2])
    (want,) = torch.autograd.grad(expected, leaves[1 - frozen], leaves[2].double())
    assert_close(got, want.double(), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "code_dtype"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_opcheck(backend: str, dtype: torch.dtype, code_dtype: torch.dtype) -> None:
    logits, codebook, grad = inputs(6, 20, 5, dtype)
    codebook = codebook.detach().to(code_dtype).requires_grad_()
    torch.library.opcheck(OP, (logits, codebook, backend))
    torch.library.opcheck(OP, (logits.detach().view(2, 20, 3).mT, codebook, backend))
    tensors = [t.detach() for t in (grad, logits, codebook, code_mixture(logits, codebook))]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.titok.code_mixture_backward.default, (*tensors, *needs[1:], backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    def step(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return code_mixture(logits * 2, codebook, backend=backend).square()

    logits, codebook, grad = inputs(9, 20, 6, torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [run(logits, codebook) for run in (step, compiled)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    grads = [torch.autograd.grad(result, (logits, codebook), grad) for result in results]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_exports_with_a_free_batch() -> None:
    class Mixture(torch.nn.Module):
        def forward(self, logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
            return code_mixture(logits, codebook)

    logits, codebook, _ = (t.detach() for t in inputs(6, 20, 5, torch.float32))
    batch = torch.export.Dim("batch")
    program = torch.export.export(Mixture(), (logits, codebook), dynamic_shapes=({0: batch}, None))
    assert any(node.target is OP for node in program.graph.nodes)
    longer = torch.randn(11, 20)
    torch.testing.assert_close(program.module()(longer, codebook), code_mixture(longer, codebook))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    logits, codebook = torch.empty(0, 4, 20, requires_grad=True), torch.randn(20, 5, requires_grad=True)
    result = code_mixture(logits, codebook, backend=backend)
    assert result.shape == (0, 4, 5)
    result.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert codebook.grad is not None
    assert not codebook.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite(backend: str) -> None:
    """-inf is no weight; a row of only -inf, or with +inf or NaN, is NaN; other rows don't notice."""
    logits, codebook = torch.randn(6, 70), torch.randn(70, 5)
    logits[0, 3:] = -torch.inf  # whole tiles without a weight after the first
    logits[1, :66] = -torch.inf  # ... and before
    logits[2] = -torch.inf
    logits[3, 9] = torch.inf
    logits[4, 69] = torch.nan
    result = code_mixture(logits, codebook, backend=backend)
    assert result[2:5].isnan().all()
    assert_close(result[[0, 1, 5]], oracles.code_mixture(logits[[0, 1, 5]], codebook), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    logits, codebook = 1e4 * torch.randn(5, 70), torch.randn(70, 4)
    assert_close(code_mixture(logits, codebook, backend=backend), oracles.code_mixture(logits, codebook), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_all_logits_costs_no_accuracy(backend: str) -> None:
    """Rounded to multiples of 2^-10, logits around 300 and around 0 have the same differences in float32."""
    logits, codebook, grad = (t.detach() for t in inputs(9, 70, 12, torch.float32))
    logits = (logits * 1024).round() / 1024
    results = []
    for offset in (0.0, 300.0):
        leaves = (logits + offset).requires_grad_(), codebook.requires_grad_()
        result = code_mixture(*leaves, backend=backend)
        results.append((result.detach(), *torch.autograd.grad(result, leaves, grad)))
    for near, far in zip(*results, strict=True):
        assert_close(far, near.double(), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [lambda x: x.mT.contiguous().mT, lambda x: x[::2], lambda x: x[:, 3:50]])
def test_layouts_are_copied(backend: str, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    logits = view(torch.randn(20, 60))
    codebook = torch.randn(logits.shape[1], 10).mT.contiguous().mT
    assert_close(code_mixture(logits, codebook, backend=backend), oracles.code_mixture(logits, codebook), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype_alone(backend: str) -> None:
    logits, codebook, _ = inputs(9, 20, 6, torch.float32)
    expected = code_mixture(logits, codebook, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code_mixture(logits, codebook, backend=backend), expected)
        with torch.no_grad():  # the path around the dispatcher
            assert torch.equal(code_mixture(logits, codebook, backend=backend), expected)


X, E = torch.zeros(2, 4), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: code_mixture([1.0], E), TypeError, r"logits: expected a torch.Tensor, got list"),
        (lambda: code_mixture(X.long(), E), TypeError, r"logits: expected dtype .* got int64"),
        (lambda: code_mixture(X, E.int()), TypeError, r"codebook: expected dtype .* got int32"),
        (
            lambda: code_mixture(torch.tensor(1.0), E),
            ValueError,
            r"logits: expected shape \(\.\.\., K\), got \(\)",
        ),
        (lambda: code_mixture(X, E.T), ValueError, r"codebook: expected shape \(4, C\), got \(3, 4\)"),
        (lambda: code_mixture(X[:, :0], E[:0]), ValueError, r"codebook: expected at least one code"),
        (lambda: code_mixture(X, E.to("meta")), ValueError, r"codebook: expected device cpu, got meta"),
        (
            lambda: code_mixture(X, E, backend="cuda"),
            ValueError,
            r"backend: expected 'auto' or one of .* got 'cuda'",
        ),
        (lambda: code_mixture(X.double(), E, backend="triton"), RuntimeError, r"'triton' cannot run: .*float64"),
        (lambda: code_mixture(X, torch.zeros(4, 257), backend="triton"), RuntimeError, r"at most 256 channels"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
