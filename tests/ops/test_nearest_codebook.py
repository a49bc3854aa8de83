"""nearest_codebook: every back end against float64 distances, ties, non-finite values, tracing, bad input.

This file is longer than 400 lines because all tests of one op share its inputs and tolerances.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from oracles import squared_distances
from titok.ops import backends, last_backend, nearest_codebook

NAMES = ("plain", "cpp", "triton")
CUDA = torch.device("cuda")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the tensors that Triton takes
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := backends()[request.param]) != "available":
        pytest.skip(reason)
    return request.param


def run(latents: torch.Tensor, codebook: torch.Tensor, backend: str, **kwargs: Any) -> torch.Tensor:
    """The op where this back end runs; its indices on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    indices = nearest_codebook(latents.to(device), codebook.to(device), backend=backend, **kwargs)
    assert isinstance(indices, torch.Tensor)
    assert last_backend("nearest_codebook") == backend
    return indices.cpu()


def assert_nearest(latents: torch.Tensor, codebook: torch.Tensor, normalize: bool, indices: torch.Tensor) -> None:
    """Each chosen code's float64 distance is within float32 rounding of the best."""
    assert indices.dtype == torch.int64
    assert indices.shape == latents.shape[:-1]
    z = latents.detach().cpu().double().reshape(-1, latents.shape[-1]).numpy()
    e = codebook.detach().cpu().double().numpy()
    distances = squared_distances(z, e, normalize)
    chosen = np.take_along_axis(distances, indices.cpu().reshape(-1, 1).numpy(), 1)[:, 0]
    scale = 2.0 if normalize else (z * z).sum(1) + (e * e).sum(1).max()
    assert (chosen - distances.min(1) <= 4e-7 * np.sqrt(z.shape[1]) * scale).all()


def integers(*shape: int) -> torch.Tensor:
    """Small integers: float32 computes their distances exactly, in whatever order."""
    return torch.randint(-2, 3, shape).float()


def exact_nearest(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(squared_distances(latents.numpy(), codebook.numpy(), False).argmin(1))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("rows", "codes", "width"),
    [(1, 2, 4), (33, 7, 12), (130, 257, 16), (5, 1000, 3), (7, 50, 256), (66, 65, 65), (1, 1, 1)],
)
def test_is_the_nearest(rows: int, codes: int, width: int, normalize: bool, backend: str) -> None:
    latents, codebook = torch.randn(rows, width), torch.randn(codes, width)
    assert_nearest(latents, codebook, normalize, run(latents, codebook, backend, normalize=normalize))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("latents_dtype", "codebook_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_dtypes(latents_dtype: torch.dtype, codebook_dtype: torch.dtype, normalize: bool, backend: str) -> None:
    latents, codebook = torch.randn(4, 9, 12).to(latents_dtype), torch.randn(70, 12).to(codebook_dtype)
    assert_nearest(latents, codebook, normalize, run(latents, codebook, backend, normalize=normalize))


def test_every_float16_and_bfloat16_is_read_as_it_is() -> None:
    if backends()["cpp"] != "available":
        pytest.skip(backends()["cpp"])
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        # one channel: the nearest of a value and its neighbours is itself, to the sign of zero
        values = values[values.isfinite() & (values.float().abs() < 1e18) & (values.float().abs() > 1e-18)].sort()[
            0
        ]
        for codes in values.split(6000):
            indices = run(codes[:, None], codes[:, None], "cpp")
            assert torch.equal(codes[indices], codes)


def test_float64_stays_float64() -> None:
    codebook = torch.tensor([[1.0], [1.0 - 1e-6], [1.0 + 1e-6]], dtype=torch.float64)
    assert run(codebook, codebook, "plain").tolist() == [0, 1, 2]
    assert run(codebook, codebook.float(), "plain").tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run: float64"):
        nearest_codebook(codebook, codebook, backend="cpp")


# Shapes that take every way through the C++ kernel: one and several threads, blocks of rows, codes in pieces for few
# rows, and (more than 2^20 packed numbers) the codebook in chunks; and both launches of the Triton kernel.
@pytest.mark.parametrize(
    ("rows", "codes", "width"), [(300, 150, 5), (3, 1500, 64), (1100, 40, 4), (2, 70_000, 16)]
)
def test_ties_go_to_the_lowest_index(rows: int, codes: int, width: int, backend: str) -> None:
    if backend == "triton" and codes > 10_000 and not torch.cuda.is_available():
        pytest.skip("too many tiles for the interpreter")
    distinct = integers(codes // 3, width)
    codebook = torch.cat([distinct, distinct.flip(0), distinct, integers(codes % 3, width)])
    latents = integers(rows, width)
    expected = exact_nearest(latents, codebook)
    assert (expected < codes // 3).any()
    assert torch.equal(run(latents, codebook, backend), expected)
    same = torch.ones(codes, width)
    assert not run(latents, same, backend, normalize=True).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("normalize", [False, True])
def test_values_that_are_not_finite(normalize: bool, backend: str) -> None:
    latents, codebook = torch.randn(40, 12), torch.randn(200, 12)
    latents[0, 3], latents[1, 0], latents[2, 11], latents[3] = NAN, INF, -INF, 1e25
    bad_codes = torch.tensor([0, 5, 64, 130, 199])
    codebook[bad_codes[:3], 2], codebook[130], codebook[199] = torch.tensor([NAN, INF, -INF]), 1e25, NAN
    indices = run(latents, codebook, backend, normalize=normalize)
    assert not indices[:4].any()
    good_codes = torch.tensor([i for i in range(200) if i not in bad_codes])
    assert not torch.isin(indices[4:], bad_codes).any()
    assert_nearest(latents[4:], codebook[good_codes], normalize, torch.searchsorted(good_codes, indices[4:]))
    assert not run(latents, torch.full((200, 12), NAN), backend, normalize=normalize).any()
    assert not run(latents, torch.full((200, 12), INF), backend, normalize=normalize).any()


def test_zero_vectors_under_normalize(backend: str) -> None:
    """A norm below 1e-12 counts as 1e-12: a zero code stays zero, and is the nearest to a zero latent."""
    codebook = torch.cat([torch.eye(4), torch.zeros(1, 4), torch.eye(4) * 1e-20])
    latents = torch.cat([torch.zeros(1, 4), torch.eye(4) * 1e-5, torch.eye(4) * 1e-13])
    assert run(latents, codebook, backend, normalize=True).tolist() == [4, 0, 1, 2, 3, 5, 6, 7, 8]


def test_strides(backend: str) -> None:
    latents, codebook = integers(6, 12, 35), integers(12, 90)
    expected = exact_nearest(latents.transpose(1, 2).reshape(-1, 12), codebook.T.contiguous()).view(6, 35)
    assert torch.equal(run(latents.transpose(1, 2), codebook.T, backend), expected)
    wide, wide_codebook = integers(50, 40), integers(60, 13)
    expected = exact_nearest(wide[::2, 5:17], wide_codebook[:, 1:])
    assert torch.equal(run(wide[::2, 5:17], wide_codebook[:, 1:], backend), expected)


def test_offsets_beyond_32_bits() -> None:
    if backends()["cpp"] != "available":
        pytest.skip(backends()["cpp"])
    stride = 1 << 30  # the pages between the three rows are never touched
    latents = torch.empty(2 * stride + 12, dtype=torch.bfloat16).as_strided((3, 12), (stride, 1))
    latents.copy_(integers(3, 12))
    codebook = integers(30, 12)
    assert torch.equal(run(latents, codebook, "cpp"), exact_nearest(latents.float(), codebook))


@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12), (12,)])
def test_few_latents(shape: tuple[int, ...], backend: str) -> None:
    latents, codebook = torch.randn(shape), torch.randn(9, 12)
    indices = run(latents, codebook, backend)
    assert indices.shape == shape[:-1]
    assert_nearest(latents.view(-1, 12), codebook, False, indices.view(-1))


def test_out(backend: str) -> None:
    latents, codebook = integers(5, 7, 12), integers(40, 12)
    expected = exact_nearest(latents.view(-1, 12), codebook).view(5, 7)
    device = DEVICE if backend == "triton" else "cpu"
    for out in (torch.empty(5, 7, dtype=torch.int64), torch.empty(7, 5, dtype=torch.int64).T):
        out = out.to(device)
        result = nearest_codebook(latents.to(device), codebook.to(device), out=out, backend=backend)
        assert result is out
        assert torch.equal(out.cpu(), expected)
    traced = torch.zeros(5, 7, dtype=torch.int64, device=device)
    assert nearest_codebook(latents.to(device).requires_grad_(), codebook.to(device), out=traced) is traced
    assert torch.equal(traced.cpu(), expected)


def test_plain_path_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["titok.ops.nearest_codebook"], "_PLAIN_CHUNK", 100)
    latents, codebook = integers(31, 12), integers(45, 12)
    assert torch.equal(run(latents, codebook, "plain"), exact_nearest(latents, codebook))


def test_rows(backend: str) -> None:
    latents, codebook = torch.randn(3, 5, 12), torch.randn(40, 12)
    for normalize in (False, True):
        indices, rows = nearest_codebook(
            latents, codebook, normalize=normalize, return_quantized=True, backend="plain"
        )
        expected = codebook.double()[indices]
        if normalize:
            expected = expected / expected.square().sum(-1, keepdim=True).sqrt()
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=0)
    _, rows = nearest_codebook(latents.half(), codebook.bfloat16(), return_quantized=True)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_of_the_rows(normalize: bool) -> None:
    latents, codebook = torch.randn(6, 3).double(), torch.randn(5, 3).double().requires_grad_()

    def rows(codebook: torch.Tensor) -> torch.Tensor:
        return nearest_codebook(latents, codebook, normalize=normalize, return_quantized=True)[1]

    assert torch.autograd.gradcheck(rows, (codebook,))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, requires_grad: bool, backend: str) -> None:
    latents, codebook = torch.randn(50, 12), torch.randn(999, 12).requires_grad_(requires_grad)
    expected = run(latents, codebook, backend)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype):
        assert torch.equal(run(latents, codebook, backend), expected)


def test_reduced_matmul_precision_changes_nothing() -> None:
    # The plain path then computes in float64, which tells these codes apart; float32 or less would not.
    codebook = 1.0 + torch.arange(64)[:, None].expand(64, 16) * 2.0**-20
    latents = codebook.flip(0).clone()
    expected = run(latents.double(), codebook, "plain")
    assert torch.equal(expected, torch.arange(63, -1, -1))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(run(latents, codebook, "plain"), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (0, 12)])
def test_opcheck(shape: tuple[int, ...], normalize: bool) -> None:
    latents, codebook = torch.randn(shape), torch.randn(20, 12)
    for grad in (False, True):
        args = (latents.clone().requires_grad_(grad), codebook.clone().requires_grad_(grad), normalize, "auto")
        torch.library.opcheck(torch.ops.titok.nearest_codebook.default, args)
    torch.library.opcheck(
        torch.ops.titok.nearest_codebook.default, (latents.mT.contiguous().mT, codebook.bfloat16())
    )


@pytest.mark.slow
def test_compile_and_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, z: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return nearest_codebook(z * 1.0, e, normalize=True, return_quantized=True)

    latents, codebook = torch.randn(4, 6, 12), torch.randn(30, 12)
    expected = Model()(latents, codebook)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(Model(), (latents, codebook)).module()
    for model in (compiled, exported):
        for got, want in zip(model(latents, codebook), expected, strict=True):
            assert torch.equal(got, want)
    out = torch.zeros(4, 6, dtype=torch.int64)
    torch.compile(nearest_codebook, fullgraph=True, backend="aot_eager")(
        latents, codebook, normalize=True, out=out
    )
    assert torch.equal(out, expected[0])


Z, E = torch.zeros(3, 12), torch.zeros(5, 12)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "error", "message"),
    [
        (([1.0], E), {}, TypeError, r"latents: expected a torch.Tensor, got list"),
        ((Z.long(), E), {}, TypeError, r"latents: expected dtype float32 or .*, got int64"),
        ((Z, E.to(torch.complex64)), {}, TypeError, r"codebook: expected dtype .*, got complex64"),
        ((Z[:, :11], E), {}, ValueError, r"latents: expected shape \(..., 12\), got \(3, 11\)"),
        ((torch.tensor(1.0), E), {}, ValueError, r"latents: expected shape \(..., 12\), got \(\)"),
        ((Z, E[0]), {}, ValueError, r"codebook: expected shape \(V, C\), got \(12,\)"),
        ((Z, E[:0]), {}, ValueError, r"codebook: expected shape .* V, C >= 1, got \(0, 12\)"),
        ((Z[:, :0], E[:, :0]), {}, ValueError, r"codebook: expected shape .* V, C >= 1, got \(5, 0\)"),
        ((Z, E.to("meta")), {}, ValueError, r"latents: expected device meta, got cpu"),
        ((Z, E), {"backend": "cuda"}, ValueError, r"backend: expected 'auto' or one of .* got 'cuda'"),
        ((Z, E), {"out": torch.zeros(3)}, TypeError, r"out: expected dtype int64, got float32"),
        ((Z, E), {"out": torch.zeros(4, dtype=torch.int64)}, ValueError, r"out: expected shape \(3\), got \(4,\)"),
    ],
)
def test_bad_input(arguments: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nearest_codebook(*arguments, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, None), (torch.float32, "plain"), (torch.bfloat16, "plain")]
)
@pytest.mark.parametrize("normalize", [False, True])
def test_of_equal_rows_the_first_is_chosen(dtype: torch.dtype, backend: str | None, normalize: bool) -> None:
    """The matrix product gives equal rows other bits in another column."""
    for codes, width in ((5, 7), (13, 3), (100, 12), (231, 33)):
        rows = torch.randn(3, width).to(dtype)
        codebook = rows[torch.arange(codes) % 3]
        latents = torch.cat([torch.randn(17, width).to(dtype), rows])
        indices = nearest_codebook(latents, codebook, normalize=normalize, backend=backend)
        assert indices.max() < 3
    zeros = torch.tensor([[1.0], [0.0], [-0.0]], dtype=dtype)
    assert nearest_codebook(zeros[2:], zeros, backend=backend).tolist() == [1]


def test_the_registered_op_checks_shapes_too() -> None:
    with pytest.raises(ValueError, match=r"latents: expected shape \(..., 12\), got \(3, 11\)"):
        torch.ops.titok.nearest_codebook(Z[:, :11], E)


ISAS = ("generic", "avx2", "avx512")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS[:2])
def test_other_instruction_sets(isa: str) -> None:
    """The tests of the C++ kernel once more in a process that runs a lesser variant of it."""
    if backends()["cpp"] != "available":
        pytest.skip(backends()["cpp"])
    from titok import _C

    if ISAS.index(isa) >= ISAS.index(_C.cpu_isa()):
        pytest.skip(f"{isa} is not below what runs here, {_C.cpu_isa()}")
    code = (
        "import sys, torch, pytest; from titok import _C; torch.set_num_threads(2); "
        f"assert _C.cpu_isa() == {isa!r}; sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", __file__, "-k", "cpp or float16"]
    environment = {**os.environ, "TITOK_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_triton_kernel_holds_no_tensor_core_dot() -> None:
    """Their float32 products are TF32. Compiled ahead of time, so in a process where Triton does not interpret."""
    if backends()["triton"] != "available":
        pytest.skip(backends()["triton"])
    code = """
import triton
from triton.backends.compiler import GPUTarget
from titok.kernels.nearest_codebook import aot_variants
for arch in (80, 90, 100):
    variant = aot_variants()[0]
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constexprs else variant.signature[n] for n in names}
    source = triton.compiler.ASTSource(variant.kernel, signature, variant.constexprs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    ir = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ttgir"]
    assert "tt.dot" in ir and not any(dot in ir for dot in ("nvidia_mma", "warp_group_dot", "tc_gen5_mma")), arch
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "codes", "width"),
    [(32, 4096, 12), (8192, 4096, 12), (2048, 8192, 64), (4096, 1024, 256), (77, 262_144, 16)],
)
def test_on_a_gpu(rows: int, codes: int, width: int, dtype: torch.dtype, normalize: bool) -> None:
    latents = torch.randn(rows, width, device=CUDA).to(dtype)
    codebook = torch.randn(codes, width, device=CUDA).to(dtype)
    indices = nearest_codebook(latents, codebook, normalize=normalize)
    assert last_backend("nearest_codebook") == "triton"
    assert torch.equal(nearest_codebook(latents, codebook, normalize=normalize), indices)
    few = slice(0, 77)
    assert_nearest(latents[few], codebook, normalize, indices[few])
    plain = nearest_codebook(latents.double(), codebook.double(), normalize=normalize)
    assert (plain != indices).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [32, 65_536])
def test_graph_capture(rows: int) -> None:
    latents, codebook = torch.randn(rows, 12, device=CUDA), torch.randn(4096, 12, device=CUDA)
    out = torch.empty(rows, dtype=torch.int64, device=CUDA)
    nearest_codebook(latents, codebook, normalize=True, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nearest_codebook(latents, codebook, normalize=True, out=out)
    latents.copy_(torch.randn_like(latents))
    graph.replay()
    assert torch.equal(out, nearest_codebook(latents, codebook, normalize=True))


@pytest.mark.gpu
def test_rows_beyond_32_bits_on_a_gpu() -> None:
    rows = (1 << 31) // 256 + 100
    latents = torch.zeros(rows, 256, dtype=torch.float32, device=CUDA)
    codebook = torch.randn(3, 256, device=CUDA)
    latents[-1] = codebook[2]
    latents[-2] = codebook[1]
    assert nearest_codebook(latents, codebook)[-2:].tolist() == [1, 2]


@pytest.mark.parametrize("more", [0, 1 << 31, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_more_codes_than_kernels_count(name: str | None, dtype: torch.dtype, more: int) -> None:
    """Codebooks of one row in memory, with more codes than 32 bits count."""
    latents, codebook = torch.zeros(2, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    codebook = codebook.expand((1 << 31) - 1024 + more, 3)
    message = r"^codebook: expected at most 2147482623 rows, got [0-9]+$"
    with pytest.raises(ValueError, match=message):
        nearest_codebook(latents, codebook, backend=name)
    with pytest.raises(ValueError, match=message):
        torch.ops.titok.nearest_codebook(latents, codebook, False, name)
