"""masked_attention against its float64 definition, on each back end that runs here.

This file is longer than 400 lines because all tests of one op share its inputs and tolerances.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import oracles
from titok import ops
from titok.ops import masked_attention
from titok.ops.core.available import why_no_cpp

# relative to the largest value; float32 sums of up to 321 terms, 16-bit probabilities and results
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHY_NO_CPP = why_no_cpp(torch.empty(0, device=DEVICE))
CPP = pytest.param("cpp", marks=pytest.mark.skipif(WHY_NO_CPP is not None, reason=str(WHY_NO_CPP)))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton"))
BACKENDS = ["plain", "sdpa", CPP, TRITON]


def make_inputs(batch, tokens, heads, head_dim, dtype=torch.float32):
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim).to(DEVICE, dtype)
    key_mask = (torch.rand(batch, tokens) > 0.4).to(DEVICE)
    key_mask[:, 0] = True
    return qkv, key_mask


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    error = (actual.double().cpu() - expected.cpu()).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < TOLERANCE[dtype], f"off by {error:.1e} of the largest value"


def check(backend, qkv, heads, **options):
    """Forward and backward against the oracle."""
    leaf, exact = qkv.detach().requires_grad_(), qkv.detach().double().cpu().requires_grad_()
    on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out, expected = (
        masked_attention(leaf, heads, backend=backend, **options),
        oracles.attention(exact, heads, **on_cpu),
    )
    assert ops.last_backend("masked_attention") == backend
    assert out.is_contiguous()
    assert_close(out, expected, qkv.dtype)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double().cpu())
    assert_close(leaf.grad, exact.grad, qkv.dtype)
    with torch.no_grad():
        assert torch.equal(masked_attention(qkv, heads, backend=backend, **options), out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_dtype(backend, dtype):
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("a back end without float16")
    qkv, key_mask = make_inputs(2, 33, 2, 48, dtype)
    check(backend, qkv, 2)
    check(backend, qkv, 2, key_mask=key_mask, query_range=(3, 30), scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("query_range", [None, (3, 30), (32, 33), (5, 5)], ids=str)
def test_the_usual_call(dtype, query_range):
    """Nothing asked for, no gradient: on a CPU that goes around most of the op."""
    qkv, _ = make_inputs(2, 33, 2, 48, dtype)
    for scale in (None, 0.3):
        out = masked_attention(qkv, 2, query_range=query_range, scale=scale)
        assert out.is_contiguous()
        expected = oracles.attention(qkv.double().cpu(), 2, query_range=query_range, scale=scale)
        if out.numel():
            assert_close(out, expected, dtype)
        assert out.shape == expected.shape
    with torch.autocast(DEVICE, torch.bfloat16):
        assert masked_attention(qkv, 2, query_range=query_range).dtype == dtype


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_float64(backend):
    qkv, key_mask = make_inputs(2, 33, 2, 48, torch.float64)
    check(backend, qkv, 2)
    check(backend, qkv, 2, key_mask=key_mask, query_range=(3, 30))


# (tokens, head dim): each head dim there is, one token, float32 keys in one block, in a block and a tail, and in
# several blocks with and without a tail
SHAPES = [(1, 32), (9, 8), (32, 48), (33, 64), (32, 72), (33, 80), (35, 96), (64, 64), (70, 32), (37, 128)]


@pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_each_shape(backend, tokens, head_dim):
    check_shape(backend, tokens, head_dim)


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [*SHAPES[:3], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES[3:])]
)
def test_each_shape_in_triton(tokens, head_dim):
    check_shape("triton", tokens, head_dim)


def check_shape(backend, tokens, head_dim):
    qkv, key_mask = make_inputs(2, tokens, 1, head_dim)
    check(backend, qkv[:1], 1)
    check(backend, qkv, 1, key_mask=key_mask, query_range=(tokens // 3, tokens))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), [(65, 64), (129, 64), (289, 64), (100, 128)])
def test_triton_in_16_bits(tokens, head_dim, dtype):
    qkv, key_mask = make_inputs(1, tokens, 1, head_dim, dtype)
    check("triton", qkv, 1)
    check("triton", qkv, 1, key_mask=key_mask, query_range=(1, tokens - 2))


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize(
    ("tokens", "queries", "computed"),
    [
        (33, 33, 64),
        (65, 65, 80),
        (129, 129, 144),
        (289, 289, 320),
        (321, 321, 336),
        (385, 385, 400),
        (289, 32, 32),
    ],
)
def test_rows_that_a_head_computes(tokens, queries, computed):
    """In 16 bits, for the tokens and queries of the presets: the last tile is no larger than it has to be."""
    from titok.kernels._aot import meta
    from titok.kernels._launch import record
    from titok.kernels.masked_attention import forward

    qkv, out = (meta(2, n, 64 * d, dtype=torch.bfloat16) for n, d in ((tokens, 3), (queries, 1)))
    with record() as launches:
        forward(qkv, None, 1, 0, 0.125, out, None)
    (tile,) = (launch.constexprs for launch in launches)
    tiles = -(-queries // tile["BLOCK_M"])
    assert (tiles - 1) * tile["BLOCK_M"] + (tile["ROW_TAIL"] or tile["BLOCK_M"]) == computed


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_a_narrow_last_tile_of_queries():
    """70 = 64 + 6 queries of two heads and samples, in 16 bits: with a mask, and with a range."""
    qkv, key_mask = make_inputs(2, 70, 2, 16, torch.float16)
    check("triton", qkv, 2, key_mask=key_mask)
    check("triton", qkv, 2, query_range=(1, 68))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [17, 70])
def test_a_query_that_sees_no_key_gives_zero_and_no_gradient(backend, tokens):
    qkv, key_mask = make_inputs(3, tokens, 1, 16)
    key_mask[1] = False
    check(backend, qkv, 1, key_mask=key_mask)
    qkv.requires_grad_()
    out = masked_attention(qkv, 1, key_mask=torch.zeros_like(key_mask), backend=backend)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(qkv.grad, torch.zeros_like(qkv))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [21, 70])
def test_what_hidden_tokens_hold_does_not_matter(backend, tokens):
    qkv, key_mask = make_inputs(2, tokens, 2, 16)
    other = torch.where(key_mask[..., None], qkv, 1e4)
    a, b = (masked_attention(x, 2, key_mask=key_mask, backend=backend) for x in (qkv, other))
    assert torch.equal(a[key_mask], b[key_mask])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [21, pytest.param(70, marks=pytest.mark.slow)])
def test_large_scores_do_not_overflow(backend, tokens):
    qkv, _ = make_inputs(1, tokens, 1, 16)
    # scores are multiples of 256 and exact: without the maximum exp overflows; the winner takes all, ties share
    qkv[..., :32] = 16 * torch.randint(-8, 9, (1, tokens, 32))
    for scale in (1.0, -1.0):
        leaf = qkv.clone().requires_grad_()
        out = masked_attention(leaf, 1, scale=scale, backend=backend)
        assert_close(out, oracles.attention(qkv, 1, scale=scale), torch.float32)
        out.sum().backward()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [21, pytest.param(70, marks=pytest.mark.slow)])
def test_what_nan_and_inf_reach(backend, tokens):
    qkv, _ = make_inputs(1, tokens, 1, 16)
    clean = masked_attention(qkv, 1, backend=backend)
    query, key, value = qkv.clone(), qkv.clone(), qkv.clone()
    query[0, 3, 0], key[0, 4, 16], value[0, 5, 32 + 7] = torch.nan, torch.nan, torch.inf
    out = masked_attention(query, 1, backend=backend)
    assert out[0, 3].isnan().all()
    others = torch.arange(tokens, device=DEVICE) != 3
    assert torch.allclose(out[0, others], clean[0, others], atol=1e-6)
    assert masked_attention(key, 1, backend=backend).isnan().all()
    out = masked_attention(value, 1, backend=backend)
    assert not out[0, :, 7].isfinite().any()
    assert out[0, :, :7].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_qkv_and_gradient(backend):
    qkv, key_mask = make_inputs(2, 19, 2, 16)
    strided = {
        "tokens before samples": qkv.transpose(0, 1).contiguous().transpose(0, 1),
        "every second channel": torch.stack((qkv, qkv), -1).flatten(2)[..., ::2],
        "one sample expanded": qkv[:1].expand(2, -1, -1),
    }
    for name, x in strided.items():
        assert not x.is_contiguous(), name
        check(backend, x, 2, key_mask=key_mask.T.contiguous().T)
    leaf = qkv.clone().requires_grad_()
    masked_attention(leaf, 2, backend=backend).sum().backward()  # the gradient of a sum is one number, expanded
    exact = qkv.double().cpu().requires_grad_()
    oracles.attention(exact, 2).sum().backward()
    assert_close(leaf.grad, exact.grad, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for batch, tokens, rows in ((0, 5, (0, 5)), (2, 5, (3, 3)), (2, 0, (0, 0))):
        qkv = torch.randn(batch, tokens, 48, device=DEVICE, requires_grad=True)
        out = masked_attention(qkv, 2, query_range=rows, backend=backend)
        assert out.shape == (batch, rows[1] - rows[0], 16)
        out.sum().backward()
        assert torch.equal(qkv.grad, torch.zeros_like(qkv))


@pytest.mark.parametrize("backend", [CPP, TRITON])
@pytest.mark.parametrize("tokens", [33, pytest.param(70, marks=pytest.mark.slow)])
def test_backward_has_the_same_bits_every_time(backend, tokens):
    qkv, _ = make_inputs(1, tokens, 1, 16)
    qkv.requires_grad_()
    out = masked_attention(qkv, 1, backend=backend)
    grad = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, qkv, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(backend, masked):
    qkv, key_mask = make_inputs(2, 5, 2, 4, torch.float64)
    key_mask[1] = False
    options = {"key_mask": key_mask if masked else None, "query_range": (1, 4), "backend": backend}
    assert torch.autograd.gradcheck(lambda x: masked_attention(x, 2, **options), qkv.requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    qkv, key_mask = make_inputs(2, 7, 2, 16)
    arguments = (qkv.requires_grad_(), key_mask if masked else None, 2, 1, 6, 0.25, backend)
    torch.library.opcheck(torch.ops.titok.masked_attention.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    qkv, key_mask = make_inputs(2, 9, 2, 16)

    def attend(x):
        return masked_attention(2 * x, 2, key_mask=key_mask, query_range=(2, 8), backend=backend)

    eager, compiled = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    grad = torch.randn(2, 6, 32, device=DEVICE)
    attend(eager).backward(grad)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(compiled)
    out.backward(grad)
    assert torch.equal(out, attend(eager))
    assert torch.equal(compiled.grad, eager.grad)


def test_export_with_free_batch_and_tokens():
    class Layer(torch.nn.Module):
        def forward(self, qkv, key_mask):
            return masked_attention(qkv, 2, key_mask=key_mask)

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    free = {0: batch, 1: tokens}
    program = torch.export.export(Layer(), make_inputs(2, 9, 2, 16), dynamic_shapes=(free, free))
    assert "titok.masked_attention" in str(program.graph)
    inputs = make_inputs(3, 5, 2, 16)
    assert torch.equal(program.module()(*inputs), Layer()(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype_alone(backend):
    qkv, _ = make_inputs(2, 9, 2, 16)
    qkv.requires_grad_()
    expected = masked_attention(qkv, 2, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = masked_attention(qkv, 2, backend=backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


BAD = [
    (TypeError, "qkv: expected a torch.Tensor, got list", {"qkv": [1.0]}),
    (TypeError, "qkv: expected dtype", {"qkv": torch.zeros(2, 5, 48, dtype=torch.int64)}),
    (ValueError, r"qkv: expected shape \(B, N, 3\*H\*D\), got \(5, 48\)", {"qkv": torch.zeros(5, 48)}),
    (ValueError, r"qkv: expected a last dimension of 3 \* 5 heads \* D, got 48", {"num_heads": 5}),
    (ValueError, r"qkv: expected a last dimension of 3 \* 0 heads", {"num_heads": 0}),
    (TypeError, "num_heads: expected an int, got float", {"num_heads": 2.0}),
    (TypeError, "key_mask: expected dtype bool", {"key_mask": torch.ones(2, 5)}),
    (ValueError, r"key_mask: expected shape \(2, 5\), got \(2, 4\)", {"key_mask": torch.ones(2, 4) > 0}),
    (ValueError, "key_mask: expected device", {"key_mask": torch.ones(2, 5, device="meta") > 0}),
    (TypeError, "query_range: expected a pair", {"query_range": 3}),
    (TypeError, "query_range: expected two ints", {"query_range": (0, 2.5)}),
    (ValueError, r"query_range: expected 0 <= start <= stop <= 5, got \(-1, 3\)", {"query_range": (-1, 3)}),
    (ValueError, r"query_range: expected 0 <= start <= stop <= 5, got \(0, 6\)", {"query_range": (0, 6)}),
    (TypeError, "scale: expected a float, got str", {"scale": "1"}),
    (ValueError, "scale: expected a finite number, got nan", {"scale": float("nan")}),
    (ValueError, "backend: expected 'auto' or one of", {"backend": "fast"}),
    (RuntimeError, "backend 'flash-attn' cannot run: it takes bfloat16", {"backend": "flash-attn"}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        masked_attention(**{"qkv": torch.zeros(2, 5, 48), "num_heads": 2, **change})


def test_a_backend_by_name_raises_with_the_cause():
    qkv = torch.zeros(2, 5, 48, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it has no float64 kernel"):
        masked_attention(qkv, 2, backend="triton")
    with pytest.raises(
        RuntimeError, match="backend 'triton' cannot run: its heads have at most 128 channels, got 200"
    ):
        masked_attention(torch.zeros(1, 5, 600), 1, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'flash-attn' cannot run: it takes no key_mask"):
        masked_attention(qkv.half(), 2, key_mask=torch.ones(2, 5) > 0, backend="flash-attn")


@pytest.mark.parametrize(("tokens", "refused"), [((1 << 31) // 1536, False), ((1 << 31) // 1536 + 1, True)])
def test_triton_refuses_samples_whose_offsets_do_not_fit_32_bits(tokens, refused):
    """A contiguous copy does not make them fit."""
    from titok.ops.masked_attention import Arguments, _why_no_triton

    qkv = torch.empty(1, tokens, 1536, device="meta")
    assert ("fewer than 2^31 values" in str(_why_no_triton(Arguments(qkv, None, 8, 0, 1, 1.0)))) == refused


def test_without_a_name_something_runs():
    qkv, _ = make_inputs(2, 5, 2, 200)
    out = masked_attention(qkv, 2)
    assert ops.last_backend("masked_attention") in ("cpp", "sdpa", "triton")
    assert_close(out, oracles.attention(qkv.cpu(), 2), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [33, 65, 129, 289, 321, 385, 1100])
def test_shapes_on_the_gpu(tokens, head_dim, dtype):
    qkv, key_mask = make_inputs(2, tokens, 2, head_dim, dtype)
    check("triton", qkv, 2)
    check("triton", qkv, 2, key_mask=key_mask, query_range=(1, tokens // 2))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [65, 289])
def test_graph_capture(tokens):
    qkv, key_mask = make_inputs(2, tokens, 4, 64, torch.bfloat16)
    expected = masked_attention(qkv, 4, key_mask=key_mask, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = masked_attention(qkv, 4, key_mask=key_mask, backend="triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("device_of_backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "head_dim", "tokens"), [(1, 64, 5), (2, 3, 8), (2, 16, 17), (3, 5, 1)])
def test_nan_reaches_every_row_that_depends_on_it(backend, heads, head_dim, tokens):
    for part in range(3):  # queries, keys, values
        qkv = torch.randn(2, tokens, 3 * heads * head_dim)
        qkv[0, tokens // 2, part * heads * head_dim] = float("nan")
        out = masked_attention(qkv, heads, backend=backend).view(2, tokens, heads, head_dim)
        head = out[0, :, 0]
        assert (head[tokens // 2] if part == 0 else head if part == 1 else head[:, 0]).isnan().all()
        assert not out[1].isnan().any()
        assert not out[0, :, 1:].isnan().any()
