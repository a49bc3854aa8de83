"""add_layer_norm: both back ends against float64, gradients, dtypes, tracing, empty, inf and NaN, bad input.

This file is longer than 400 lines because all tests of one op share its inputs and tolerances.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import forked
import oracles
from titok.ops import add_layer_norm, last_backend, layer_norm, layer_norm_of_sum

pytestmark = pytest.mark.usefixtures("device_of_backend")

OP = torch.ops.titok.add_layer_norm.default
BACKENDS = ["plain", "cpp", "triton"]
EPS = 1e-5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# one unit in the last place of the largest values; the interpreter truncates to bfloat16 where hardware rounds
TOLERANCE = {F32: 3e-6, F16: 2e-3, BF16: 1.6e-2}


def inputs(
    shape: tuple[int, ...],
    x: torch.dtype,
    residual: torch.dtype,
    parameters: torch.dtype,
    device: str | None = None,
) -> list[torch.Tensor]:
    """x, residual, weight, bias as leaves; rows have an offset, which a one-pass variance would choke on."""
    width = shape[-1:]
    drawn = [
        (5 + torch.randn(shape, device=device)).to(x),
        torch.randn(shape, device=device).to(residual),
        (1 + torch.randn(width, device=device)).to(parameters),
        torch.randn(width, device=device).to(parameters),
    ]
    return [t.requires_grad_() for t in drawn]


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{error:.2e} of the largest value, {tolerance:.0e} allowed"


def check_against_oracle(leaves: list[torch.Tensor], out_dtype: torch.dtype | None, backend: str) -> None:
    x, residual, weight, bias = leaves
    total, normalised = add_layer_norm(*leaves, EPS, out_dtype=out_dtype, backend=backend)
    assert last_backend("add_layer_norm") == backend
    assert total.dtype == torch.promote_types(x.dtype, residual.dtype)
    assert normalised.dtype == (out_dtype or total.dtype)
    exact = x.double() + residual.double()
    assert_close(total, exact, TOLERANCE[total.dtype])
    # what is normalised is the rounded sum
    rounded = total.detach().double().requires_grad_()
    expected = oracles.layer_norm(rounded, weight, bias, EPS)
    assert_close(normalised, expected, TOLERANCE[normalised.dtype])

    grad_total, grad_normalised = torch.randn_like(total), torch.randn_like(normalised)
    (want_sum, *want) = torch.autograd.grad(expected, (rounded, weight, bias), grad_normalised.double())
    want = [want_sum + grad_total.double()] * 2 + want
    got = torch.autograd.grad((total, normalised), leaves, (grad_total, grad_normalised))
    for g, w, leaf in zip(got, want, leaves, strict=True):
        assert g.dtype == leaf.dtype
        assert_close(g, w.double(), 2 * max(TOLERANCE[t.dtype] for t in (leaf, total)))


DTYPES = [(F32, F32, F32, None), (BF16, BF16, BF16, None), (F16, F16, F16, None), (F32, BF16, F32, BF16)]


# few channels, tails, powers of two, TiTok's own widths, more rows than one program takes at a time
@pytest.mark.parametrize("shape", [(3, 4), (7, 33), (2, 9, 128), (5, 768), (3, 1024), (2, 2500)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if backend == "cpp" and F16 in dtypes:
        pytest.skip("the C++ kernel takes float32 and bfloat16")
    check_against_oracle(inputs(shape, *dtypes[:3]), dtypes[3], backend)


@pytest.mark.parametrize("dtypes", [*DTYPES, (F16, BF16, F16, None)], ids=lambda d: "-".join(map(str, d)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_a_sum_that_nobody_reads(backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """The bits of the norm beside the sum, and with gradients the gradients of it."""
    if backend == "cpp" and F16 in dtypes:
        pytest.skip("the C++ kernel takes float32 and bfloat16")
    leaves, options = inputs((7, 33), *dtypes[:3]), {"out_dtype": dtypes[3], "backend": backend}
    with torch.no_grad():
        want = add_layer_norm(*leaves, EPS, **options)[1]
        got = layer_norm_of_sum(*leaves, EPS, **options)
    assert last_backend("add_layer_norm") == backend
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    results = (add_layer_norm(*leaves, EPS, **options)[1], layer_norm_of_sum(*leaves, EPS, **options))
    first, second = (torch.autograd.grad(result, leaves, grad) for result in results)
    assert all(map(torch.equal, first, second))


def test_the_registered_op_without_the_sum() -> None:
    leaves = inputs((2, 4), F32, F32, F32, "cpu")
    with torch.no_grad():
        total, normalised = OP(*leaves, EPS, None, False)
        assert total.numel() == 0
        assert torch.equal(normalised, layer_norm_of_sum(*leaves, EPS))
    leaves = [t.requires_grad_() for t in leaves]
    grad = torch.randn(2, 4)
    got = torch.autograd.grad(OP(*leaves, EPS, None, False)[1], leaves, grad, create_graph=True)
    want = torch.autograd.grad(OP(*leaves, EPS)[1], leaves, grad)
    assert all(map(torch.equal, got, want))
    with pytest.raises(RuntimeError, match=r"is not differentiable|once_differentiable"):
        got[0].square().sum().backward()


# every combination that the C++ kernel has loops for, with and without a whole vector, and rows for two threads
@pytest.mark.parametrize("shape", [(3, 5), (2, 83), (70, 520)], ids=str)
@pytest.mark.parametrize(
    "dtypes", list(itertools.product((F32, BF16), repeat=4)), ids=lambda d: "-".join(map(str, d))
)
def test_cpp_dtypes(dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        x, residual, weight, bias = inputs(shape, *dtypes[:3])
        total, normalised = add_layer_norm(x, residual, weight, bias, EPS, out_dtype=dtypes[3])
        assert last_backend("add_layer_norm") == "cpp"
        assert torch.equal(total, x + residual)
        assert total.dtype == (x + residual).dtype
        expected = oracles.layer_norm(total, weight, bias, EPS)
        assert_close(normalised, expected, TOLERANCE[normalised.dtype])
        assert normalised.dtype == dtypes[3]
        alone = layer_norm(total, weight, bias, EPS, out_dtype=dtypes[3])
        assert last_backend("add_layer_norm") == "cpp"
        assert alone.dtype == dtypes[3]
        assert_close(alone, expected, TOLERANCE[alone.dtype])
    check_against_oracle([x, residual, weight, bias], dtypes[3], "cpp")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_usual_calls_on_a_cpu(dtype: torch.dtype) -> None:
    """PyTorch's own gradient in float32, C++ in bfloat16; gradients of broadcast sums, which are not contiguous."""
    leaves = inputs((3, 40, 33), dtype, dtype, dtype)
    results = add_layer_norm(*leaves, EPS)
    assert last_backend("add_layer_norm") == ("plain" if dtype == F32 else "cpp")
    named = add_layer_norm(*leaves, EPS, backend="cpp")
    for got, want in zip(results, named, strict=True):
        assert_close(got, want.double(), TOLERANCE[dtype])
    grads, wanted = (torch.autograd.grad([t.float().sum() for t in r], leaves) for r in (results, named))
    for got, want in zip(grads, wanted, strict=True):
        assert_close(got, want.double(), TOLERANCE[dtype])
    if dtype == BF16:
        assert all(torch.equal(a, b) for a, b in zip((*results, *grads), (*named, *wanted), strict=True))


def test_layer_norm_elsewhere() -> None:
    """What does not go to C++: gradients, float64, a transposed view, autocast."""
    x, _, weight, bias = inputs((3, 40), F32, F32, F32)
    got = layer_norm(x, weight, bias, EPS)
    expected = oracles.layer_norm(x, weight, bias, EPS)
    assert_close(got, expected, TOLERANCE[F32])
    grads = torch.autograd.grad(got.square().sum(), (x, weight, bias))
    wanted = torch.autograd.grad(expected.square().sum(), (x, weight, bias))
    for g, w in zip(grads, wanted, strict=True):
        assert_close(g, w.double(), 1e-5)
    with torch.no_grad():
        wide = [t.double() for t in (x, weight, bias)]
        assert_close(layer_norm(*wide, EPS), expected, 1e-12)
        assert_close(layer_norm(x.T.contiguous().T, weight, bias, EPS), expected, TOLERANCE[F32])
        with torch.autocast("cpu", BF16):
            assert layer_norm(x.T.contiguous().T, weight, bias, EPS).dtype == F32
    with pytest.raises(ValueError, match=r"weight: expected shape \(40\), got \(3,\)"):
        layer_norm(x, weight[:3], bias, EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_out(backend: str, grad: bool) -> None:
    leaves = [t.requires_grad_(grad) for t in inputs((2, 7, 24), F32, BF16, F32)]
    expected = add_layer_norm(*leaves, EPS, out_dtype=BF16, backend=backend)
    out = torch.empty(2, 7, 24), torch.empty(2, 7, 24, dtype=BF16)
    got = add_layer_norm(*leaves, EPS, out_dtype=BF16, out=out, backend=backend)
    for a, b, c in zip(got, out, expected, strict=True):
        assert a.data_ptr() == b.data_ptr()
        assert torch.equal(a, c)
    if not grad:
        x, *rest = leaves
        out = x, out[1]  # a stream kept in place
        add_layer_norm(x, *rest, EPS, out_dtype=BF16, out=out, backend=backend)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


@pytest.mark.slow
def test_threads_and_instruction_sets(tmp_path: Path) -> None:
    """Threads change no bit; narrower vectors add in another order."""
    program = """
        from titok.ops import add_layer_norm
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            x, residual, *grads = torch.randn(4, 70, 1030).to(dtype)
            leaves = [t.requires_grad_() for t in (x, residual, *torch.randn(2, 1030))]
            outputs = add_layer_norm(*leaves, 1e-5, backend="cpp")
            results += [t.detach() for t in outputs]
            results += torch.autograd.grad(outputs, leaves, grads)
        torch.save(results, path)
    """
    runs = {}
    for isa, threads in (("avx512", 2), ("avx512", 1), ("avx2", 2), ("generic", 2)):
        path = tmp_path / f"{isa}{threads}"
        code = f"threads, path = {threads}, {str(path)!r}\n{textwrap.dedent(program)}"
        forked.in_processes(1, code, Path(__file__).parent, TITOK_CPU_ISA=isa)
        runs[path.name] = torch.load(path)
    assert all(torch.equal(a, b) for a, b in zip(runs["avx5122"], runs["avx5121"], strict=True))
    for name in ("avx22", "generic2"):
        for a, b in zip(runs["avx5122"], runs[name], strict=True):
            assert_close(b, a.double(), TOLERANCE[a.dtype])


@pytest.mark.usefixtures("triton_device")
def test_programs_that_take_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of d weight and d bias, each over a strided set of rows with a tail."""
    kernels = pytest.importorskip("titok.kernels.add_layer_norm")
    monkeypatch.setattr(kernels, "ADD_LAYER_NORM_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "ADD_LAYER_NORM_BACKWARD_VALUES", 64)
    check_against_oracle(inputs((29, 24), F32, F32, F32), None, "triton")


@pytest.mark.usefixtures("triton_device")
def test_an_eps_of_zero_and_fewer_rows_than_a_program_takes() -> None:
    """Rows that are not there add nothing to the gradients of the parameters, where 0 * rsqrt(0) would be NaN."""
    kernels = pytest.importorskip("titok.kernels.add_layer_norm")
    total, grad, weight = (torch.randn(*shape) for shape in ((5, 24), (5, 24), (24,)))
    grad_x = torch.empty_like(grad)
    grad_weight, grad_bias = kernels.backward(None, grad, total, weight, 0.0, grad_x)
    leaves = [t.double().requires_grad_() for t in (total, weight, torch.zeros_like(weight))]
    wanted = torch.autograd.grad(oracles.layer_norm(*leaves, 0.0), leaves, grad.double())
    for got, want in zip((grad_x, grad_weight, grad_bias), wanted, strict=True):
        assert_close(got, want, 2 * TOLERANCE[F32])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_widths_of_the_models_on_gpu(dtypes: tuple[torch.dtype, ...], width: int) -> None:
    leaves = inputs((64, 289, width), *dtypes[:3], device="cuda")
    first, second = (
        torch.autograd.grad([t.sum() for t in add_layer_norm(*leaves, EPS, backend="triton")], leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not deterministic"
    check_against_oracle(leaves, dtypes[3], "triton")


@pytest.mark.gpu
def test_graph_capture() -> None:
    leaves = [t.detach() for t in inputs((8, 33, 1024), BF16, BF16, BF16, device="cuda")]
    expected = add_layer_norm(*leaves, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_layer_norm(*leaves, EPS)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_gradcheck_float64() -> None:
    leaves = [t.detach().double().requires_grad_() for t in inputs((2, 5), F32, F32, F32)]
    assert torch.autograd.gradcheck(lambda *t: add_layer_norm(*t, EPS), leaves)
    assert torch.autograd.gradcheck(lambda *t: add_layer_norm(*t, EPS)[1], leaves)  # post-norm blocks


def test_tiny_eps_counts_in_float64() -> None:
    """BERT's 1e-12 against 1e-5 on a row of variance 1e-8: a path through float32 would lose the difference."""
    x = torch.tensor([[1.0, 1.0002]], dtype=torch.float64)
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for eps in (1e-12, 1e-5):
        _, y = add_layer_norm(x, torch.zeros_like(x), one, zero, eps)
        torch.testing.assert_close(y, oracles.layer_norm(x, one, zero, eps), rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_result_is_used(backend: str) -> None:
    leaves = inputs((5, 24), F32, F32, F32)
    total, _ = add_layer_norm(*leaves, EPS, backend=backend)
    total.sum().backward()
    x, residual, weight, bias = leaves
    assert x.grad is not None
    assert residual.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert weight.grad is None
    assert bias.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    leaves = inputs((2, 3, 20), F32, BF16, F32)
    torch.library.opcheck(OP, (*leaves, EPS, BF16, True, backend))
    strided = [leaves[0].detach().mT.contiguous().mT, *leaves[1:]]
    torch.library.opcheck(OP, (*strided, EPS, None, True, backend))
    total, normalised = (t.detach() for t in add_layer_norm(*leaves, EPS))
    backward = torch.ops.titok.add_layer_norm_backward.default
    for grad_total in (torch.randn_like(total), None):
        args = (grad_total, torch.randn_like(normalised), total, leaves[2].detach(), EPS, backend)
        torch.library.opcheck(backward, args)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        total, normalised = add_layer_norm(x, residual, weight, bias, EPS, backend=backend)
        return total + 2 * normalised

    leaves = inputs((4, 20), F32, F32, F32)
    results = [run(*leaves) for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in results]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_exports_with_a_free_batch() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(20)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return add_layer_norm(x, residual, self.norm.weight, self.norm.bias, self.norm.eps)

    module, batch = Norm(), torch.export.Dim("batch")
    example = (torch.randn(3, 5, 20), torch.randn(3, 5, 20))
    program = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}))
    assert any(node.target is OP for node in program.graph.nodes)
    longer = (torch.randn(7, 5, 20), torch.randn(7, 5, 20))
    torch.testing.assert_close(program.module()(*longer), module(*longer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    leaves = inputs((0, 4, 20), F32, F32, F32)
    total, normalised = add_layer_norm(*leaves, EPS, backend=backend)
    assert total.shape == normalised.shape == (0, 4, 20)
    (total.sum() + normalised.sum()).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_are_not_finite(backend: str, value: float) -> None:
    """Such a row is NaN throughout, its sum is as torch adds; other rows don't notice."""
    x, residual, weight, bias = (t.detach() for t in inputs((3, 40), F32, F32, F32))
    clean = add_layer_norm(x, residual, weight, bias, EPS, backend=backend)
    residual[1, 7] = value
    total, normalised = add_layer_norm(x, residual, weight, bias, EPS, backend=backend)
    torch.testing.assert_close(total, x + residual, equal_nan=True, rtol=0, atol=0)
    assert normalised[1].isnan().all()
    assert torch.equal(normalised[::2], clean[1][::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_row_gives_the_bias(backend: str) -> None:
    x, residual, weight, bias = (t.detach() for t in inputs((3, 40), F32, F32, F32))
    x[:], residual[:] = 2.0, -0.5
    _, normalised = add_layer_norm(x, residual, weight, bias, EPS, backend=backend)
    assert torch.equal(normalised, bias.expand(3, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_are_copied(backend: str) -> None:
    """A slice of the tokens, as the last layer's `rows` make it, and a transposed view."""
    weight, bias = torch.randn(2, 24)
    x, residual = torch.randn(2, 9, 24)[:, 3:7], torch.randn(2, 24, 4).mT
    total, normalised = add_layer_norm(x, residual, weight, bias, EPS, backend=backend)
    assert total.is_contiguous()
    assert_close(normalised, oracles.layer_norm(total, weight, bias, EPS), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtypes_alone(backend: str) -> None:
    leaves = inputs((5, 24), F32, BF16, F32)
    expected = add_layer_norm(*leaves, EPS, backend=backend)
    assert expected[1].dtype == F32
    with torch.autocast("cpu", BF16):
        for grad in (True, False):  # through the dispatcher and around it
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(add_layer_norm(*leaves, EPS, backend=backend), expected, rtol=0, atol=0)


X, W = torch.zeros(2, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: add_layer_norm(X, None, W, W, EPS),
            TypeError,
            r"residual: expected a torch.Tensor, got NoneType",
        ),
        (lambda: add_layer_norm(X.int(), X, W, W, EPS), TypeError, r"x: expected dtype .* got int32"),
        (
            lambda: add_layer_norm(X, X[:1], W, W, EPS),
            ValueError,
            r"residual: expected shape \(2, 4\), got \(1, 4\)",
        ),
        (lambda: add_layer_norm(X, X, W[:3], W, EPS), ValueError, r"weight: expected shape \(4\), got \(3,\)"),
        (lambda: add_layer_norm(X, X, W, W.to("meta"), EPS), ValueError, r"bias: expected device cpu, got meta"),
        (lambda: add_layer_norm(X[:, :0], X[:, :0], W[:0], W[:0], EPS), ValueError, r"x: expected at least one"),
        (lambda: add_layer_norm(X, X, W, W, EPS, out_dtype=torch.int8), TypeError, r"out_dtype: .* torch.int8"),
        (
            lambda: add_layer_norm(X, X, W, W, EPS, out=X),
            TypeError,
            r"out: expected a pair of tensors, got Tensor",
        ),
        (
            lambda: add_layer_norm(X, X, W, W, EPS, out=(X, X[:1])),
            ValueError,
            r"out\[1\]: expected shape \(2, 4\), got \(1, 4\)",
        ),
        (
            lambda: add_layer_norm(X.half(), X.half(), W, W, EPS, backend="cpp"),
            RuntimeError,
            r"the C\+\+ kernel takes float32 and bfloat16, not float16",
        ),
        (lambda: add_layer_norm(X, X, W, W, EPS, backend="sdpa"), ValueError, r"backend: .* got 'sdpa'"),
        (lambda: add_layer_norm(X, X.double(), W, W, EPS, backend="triton"), RuntimeError, r"no float64 kernel"),
        (
            lambda: add_layer_norm(X, X, W, W, EPS, out_dtype=torch.float64, backend="triton"),
            RuntimeError,
            r"no float64 kernel",
        ),
        (
            lambda: add_layer_norm(*[torch.zeros(1, 8193)] * 2, *[torch.zeros(8193)] * 2, EPS, backend="triton"),
            RuntimeError,
            r"at most 8192 channels",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_layer_norm_of_shapes_alone() -> None:
    x, p = torch.empty(2, 5, 8, device="meta"), torch.empty(8, device="meta")
    assert layer_norm(x, p, p, 1e-5).shape == (2, 5, 8)
