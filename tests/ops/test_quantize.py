"""quantize: golden values and gradients of the official quantizer, and what training relies on."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from titok.ops import nearest_codebook, quantize

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "cases" / "quantizer.npz"


def golden_codebook(size: int, width: int) -> torch.Tensor:
    seed = zlib.crc32(b"embedding.weight")
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(rng.standard_normal((size, width), dtype=np.float32) * np.float32(0.5))


def channels_last(x: np.ndarray) -> torch.Tensor:
    """The golden (B, C, 1, N) as (B, N, C)."""
    return torch.from_numpy(x).squeeze(2).transpose(1, 2).contiguous()


@pytest.mark.parametrize("case", ["l2", "plain"])
@pytest.mark.parametrize(("kind", "tolerance"), [("f64", 1e-11), ("out", 3e-6)])
def test_golden(case: str, kind: str, tolerance: float) -> None:
    data = np.load(GOLDEN)
    dtype = torch.float64 if kind == "f64" else torch.float32

    def expected(name: str) -> np.ndarray:
        return data[f"{kind}.{case}.{name}"]

    def check(got: torch.Tensor, name: str) -> None:
        want = expected(name)
        want_tensor = channels_last(want) if want.ndim == 4 else torch.from_numpy(np.asarray(want))
        assert got.dtype == dtype
        torch.testing.assert_close(got, want_tensor, rtol=0, atol=tolerance * float(want_tensor.abs().max()))

    z0 = channels_last(data[f"in.{case}.z"]).to(dtype)
    weight = channels_last(data[f"in.{case}.r"]).to(dtype)
    codebook0 = golden_codebook(64, z0.shape[-1]).to(dtype)

    z, codebook = z0.clone().requires_grad_(), codebook0.clone().requires_grad_()
    result = quantize(z, codebook, normalize=case == "l2", commitment_cost=0.25)
    assert torch.equal(result.indices, torch.from_numpy(data[f"out.{case}.indices"][:, 0]))
    check(result.quantized, "z_quantized")
    check(result.loss, "quantizer_loss")
    check(result.commitment_loss, "commitment_loss")
    check(result.codebook_loss, "codebook_loss")
    assert torch.equal(result.counts, torch.bincount(result.indices.flatten(), minlength=64))

    for gradient, name in zip(
        torch.autograd.grad(result.loss, (z, codebook), retain_graph=True),
        ("grad_z_of_quantizer_loss", "grad_embedding_of_quantizer_loss"),
        strict=True,
    ):
        check(gradient, name)
    total = (result.quantized * weight).sum() + result.loss
    check(total, "total")
    for gradient, name in zip(
        torch.autograd.grad(total, (z, codebook)), ("grad_z", "grad_embedding"), strict=True
    ):
        check(gradient, name)

    _, rows = nearest_codebook(z0, codebook0, normalize=case == "l2", return_quantized=True)
    check(rows.reshape(-1, rows.shape[-1]), "entry_of_indices")


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_of_the_losses(normalize: bool) -> None:
    latents = torch.randn(2, 4, 3).double().requires_grad_()
    codebook = torch.randn(6, 3).double().requires_grad_()

    fixed = quantize(latents, codebook, normalize=normalize)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt() if normalize else x.clone()

    # a stop-gradient's argument stays at its value, where finite differences would move it
    stopped_z, stopped_q = unit(latents).detach(), unit(codebook)[fixed.indices].detach()

    def losses(z: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = unit(e)[fixed.indices]
        return 0.25 * (stopped_q - unit(z)).square().mean(), (q - stopped_z).square().mean()

    assert torch.autograd.gradcheck(losses, (latents, codebook))
    got = torch.autograd.grad(fixed.loss, (latents, codebook))
    want = torch.autograd.grad(sum(losses(latents, codebook)), (latents, codebook))
    torch.testing.assert_close(got, want)


def test_straight_through() -> None:
    latents = torch.randn(5, 3, 12, requires_grad=True)
    codebook = torch.randn(40, 12, requires_grad=True)
    result = quantize(latents, codebook)
    torch.testing.assert_close(result.quantized, codebook[result.indices])
    upstream = torch.randn(5, 3, 12)
    result.quantized.backward(upstream)
    assert torch.equal(latents.grad, upstream)
    assert codebook.grad is None


def test_counts() -> None:
    codebook = torch.eye(5)
    result = quantize(codebook[[4, 0, 4, 4, 2]], codebook)
    assert result.counts.tolist() == [1, 0, 1, 0, 3]
    assert result.loss == 0


def test_no_latents() -> None:
    latents = torch.randn(0, 7, 12, requires_grad=True)
    result = quantize(latents, torch.randn(9, 12), normalize=True)
    assert result.quantized.shape == (0, 7, 12)
    assert result.indices.shape == (0, 7)
    assert result.loss == 0
    assert not result.counts.any()
    result.loss.backward()


@pytest.mark.parametrize("normalize", [False, True])
def test_dtypes_and_autocast(normalize: bool) -> None:
    latents, codebook = torch.randn(6, 9, 12), torch.randn(30, 12)
    expected = quantize(latents, codebook, normalize=normalize)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(quantize(latents, codebook, normalize=normalize), expected, strict=True):
            assert torch.equal(got, want)
    half = latents.bfloat16().requires_grad_()
    result = quantize(half, codebook, normalize=normalize)
    assert result.quantized.dtype == result.loss.dtype == torch.float32
    assert torch.equal(result.loss, quantize(half.float(), codebook, normalize=normalize).loss)
    result.loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_non_finite_latents_do_not_hide() -> None:
    latents = torch.randn(4, 12)
    latents[1, 0] = float("nan")
    result = quantize(latents, torch.randn(9, 12))
    assert result.indices[1] == 0
    assert result.loss.isnan()


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_compile(normalize: bool) -> None:
    def step(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = quantize(latents, codebook, normalize=normalize)
        return result.loss + result.quantized.sum(), result.indices, result.counts

    latents, codebook = torch.randn(4, 6, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)
    expected = step(latents, codebook)
    got = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)(latents, codebook)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(x[0], (latents, codebook)) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cost", [-0.1, float("nan")])
def test_bad_commitment_cost(cost: float) -> None:
    with pytest.raises(ValueError, match=r"commitment_cost: expected a number >= 0, got"):
        quantize(torch.zeros(3, 12), torch.zeros(5, 12), commitment_cost=cost)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
def test_a_training_step_is_captured_and_deterministic(normalize: bool) -> None:
    latents = torch.randn(8, 32, 12, device="cuda", requires_grad=True)
    codebook = torch.randn(4096, 12, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        result = quantize(latents, codebook, normalize=normalize)
        return (*result, *torch.autograd.grad(result.loss + result.quantized.sum(), (latents, codebook)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------------------------
# Feature maps and masks


@pytest.mark.parametrize("normalize", [False, True])
def test_feature_maps_are_quantized_as_their_latents_are(normalize: bool) -> None:
    maps, codebook = torch.randn(2, 12, 3, 5, requires_grad=True), torch.randn(40, 12, requires_grad=True)
    got = quantize(maps, codebook, normalize=normalize, dim=1)
    want = quantize(maps.permute(0, 2, 3, 1), codebook, normalize=normalize)
    assert got.indices.shape == (2, 3, 5)
    assert torch.equal(got.quantized, want.quantized.permute(0, 3, 1, 2))
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a, b)
    weights = torch.randn(2, 12, 3, 5)
    grads = torch.autograd.grad((got.quantized * weights).sum() + got.loss, (maps, codebook))
    wanted = torch.autograd.grad(
        (want.quantized.permute(0, 3, 1, 2) * weights).sum() + want.loss, (maps, codebook)
    )
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("padding", [1e4, float("nan"), float("inf")])
def test_padding_takes_no_part(normalize: bool, padding: float) -> None:
    """Whatever the padding holds: results and gradients are those of the other latents alone."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    latents = torch.randn(2, 3, 12).masked_fill(~mask[..., None], padding).requires_grad_()
    codebook = torch.randn(40, 12, requires_grad=True)
    got = quantize(latents, codebook, normalize=normalize, mask=mask)
    want = quantize(latents[mask], codebook, normalize=normalize)
    assert torch.equal(got.indices[mask], want.indices)
    assert got.indices[~mask].tolist() == [-1, -1, -1]
    assert torch.equal(got.quantized[mask], want.quantized)
    assert not got.quantized[~mask].any()
    torch.testing.assert_close(got[2:5], want[2:5])
    assert torch.equal(got.counts, want.counts)
    grads, wanted = (
        torch.autograd.grad(result.loss + result.quantized.square().sum(), (latents, codebook))
        for result in (got, want)
    )
    torch.testing.assert_close(grads, wanted)
    assert not grads[0][~mask].any()


def test_padding_alone() -> None:
    got = quantize(torch.randn(2, 3, 12), torch.randn(9, 12), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert (got.indices == -1).all()
    assert got.loss == 0
    assert not got.counts.any()


@pytest.mark.parametrize("masked", [False, True])
def test_the_indices_of_vector_quantize_pytorch(masked: bool) -> None:
    """Feature maps, and sequences with padding; indices are compared by distance where two codes are equally near."""
    other = pytest.importorskip("vector_quantize_pytorch")
    shape = (3, 7, 12) if masked else (2, 12, 5, 6)
    latents, mask = torch.randn(shape), torch.rand(3, 7) < 0.6 if masked else None
    module = other.VectorQuantize(dim=12, codebook_size=50, accept_image_fmap=not masked).eval()
    quantized, indices, _ = module(latents, mask=mask)
    got = quantize(latents, module.codebook, mask=mask, dim=-1 if masked else 1)
    assert torch.equal(got.indices, indices)
    torch.testing.assert_close(got.quantized, quantized)


def test_wrong_masks_and_dimensions() -> None:
    latents, codebook = torch.randn(2, 3, 12), torch.randn(9, 12)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\), got \(2, 4\)"):
        quantize(latents, codebook, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: expected dtype bool, got float32"):
        quantize(latents, codebook, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"dim: expected a dimension of latents \(2, 3, 12\), got 3"):
        quantize(latents, codebook, dim=3)
    with pytest.raises(TypeError, match="dim: expected an int, got float"):
        quantize(latents, codebook, dim=1.5)


@pytest.mark.slow
def test_masks_and_feature_maps_compile() -> None:
    def step(maps: torch.Tensor, codebook: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(quantize(maps, codebook, mask=mask, dim=1))

    arguments = torch.randn(2, 12, 3, 5), torch.randn(40, 12), torch.rand(2, 3, 5) < 0.5
    got = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)(*arguments)
    torch.testing.assert_close(got, step(*arguments))
