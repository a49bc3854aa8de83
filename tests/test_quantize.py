"""quantize: golden values and gradients of the official quantizer, and what training relies on."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from titok.ops import nearest_codebook, quantize

GOLDEN = Path(__file__).parent / "data" / "golden" / "cases" / "quantizer.npz"


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
