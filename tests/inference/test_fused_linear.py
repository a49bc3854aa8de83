"""Linear layers with GELU, or with a residual sum and its norm, in one launch: against float64, and where they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titok import engine
from titok.inference import fused_linear
from titok.models.layers import LayerNorm, Linear
from titok.models.transformer import Block

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, N = 64, 128
EPS = 1e-5
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels compute the layers of these tests."""
    monkeypatch.setattr(fused_linear, "LINEAR_GELU_LAYERS", {(K, N): 1 << 20})
    monkeypatch.setattr(fused_linear, "LINEAR_ADD_NORM_LAYERS", frozenset({(K, N), (N, K), (K, K)}))


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def zeros() -> Tensor:
    return torch.zeros(64, dtype=torch.int32, device=DEVICE)


def close(result: Tensor, exact: Tensor) -> bool:
    return bool((result.double() - exact).abs().max() <= TOLERANCE[result.dtype] * exact.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "bias"), [(70, True), (1, False)])
def test_gelu(rows: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = normal(2, rows, K, dtype=dtype), normal(N, K, dtype=dtype) / 8
    offsets = normal(N, dtype=dtype) if bias else None
    result = fused_linear.gelu(x, weight, offsets)
    assert result is not None
    assert (result.shape, result.dtype) == ((2, rows, N), dtype)
    exact = F.gelu(F.linear(x.double(), weight.double(), None if offsets is None else offsets.double()))
    assert close(result, exact)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gelu_in_place(dtype: torch.dtype) -> None:
    """Every normal value of 16 bits, and a tail in the last program, within half a step of the exact GELU."""
    from titok.kernels import linear

    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    normal_values = values[values.isfinite() & (values.abs() >= 4 * torch.finfo(dtype).smallest_normal)]
    x = torch.cat([normal_values, torch.tensor([1.0, -1.0, 3.0], dtype=dtype)]).to(DEVICE)
    exact, result = F.gelu(x.double()), x.clone()
    linear.gelu(result)
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    rounding = 1.01 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.51  # Triton's interpreter rounds down
    assert bool(((result.double() - exact).abs() <= rounding * step + 2e-7 * x.double().abs().clamp(max=10)).all())


def test_layers_of_more_rows_are_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "LINEAR_GELU_LAYERS", {(K, N): 70})
    weight = normal(N, K)
    assert fused_linear.gelu(normal(2, 35, K), weight, None) is not None
    assert fused_linear.gelu(normal(71, K), weight, None) is None


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("width", [N, 3 * K])  # of two column blocks; of three, of which no power of two has room
def test_add_norm(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of rows, of which the last is not full; the counters are zeros again."""
    monkeypatch.setattr(fused_linear, "LINEAR_ADD_NORM_LAYERS", frozenset({(K, width)}))
    x, residual = normal(2, 70, K, dtype=dtype), normal(2, 70, width, dtype=dtype) + 3
    weight, bias, scale, shift = normal(width, K, dtype=dtype), *(normal(width, dtype=dtype) for _ in range(3))
    counters = zeros()
    with fused_linear.counters(counters):
        found = [fused_linear.add_norm(x, weight, bias, residual, scale, shift, EPS) for _ in range(2)]
    assert found[0] is not None
    assert found[1] is not None
    assert not counters.any()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), "the same bits every time"
    total, normalised = found[0]
    assert close(total, F.linear(x.double(), weight.double(), bias.double()) + residual.double())
    assert close(normalised, F.layer_norm(total.double(), (width,), scale.double(), shift.double(), EPS))


def test_a_block_with_all_of_them() -> None:
    """Pre-norm and post-norm blocks give what they give in separate launches, up to rounding."""
    torch.manual_seed(0)
    block = Block(K, 1, N, eps=EPS).to(DEVICE, torch.float16).eval()
    for norm in (block.norm1, block.norm2):
        assert isinstance(norm, LayerNorm)
        torch.nn.init.normal_(norm.weight)
    x = normal(2, 33, K)
    calls: tuple[Callable[..., Any], ...] = (block.post_norm, lambda x: block.attend(x, block.attn.qkv(x)))
    with torch.no_grad():
        for call in calls:
            separate = call(x)
            with fused_linear.counters(zeros()):
                fused = call(x)
            pairs = zip(fused, separate, strict=True) if isinstance(fused, tuple) else [(fused, separate)]
            assert all(close(a, b.double()) for a, b in pairs)


def test_where_they_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, norm = Linear(K, N).to(DEVICE, torch.float16), LayerNorm(N).to(DEVICE, torch.float16)
    x, residual = normal(3, K), normal(3, N)
    weight, bias = layer.weight, layer.bias

    def run(x: Tensor = x) -> tuple[bool, bool]:
        with fused_linear.counters(zeros()):
            return fused_linear.gelu(x, weight, bias) is not None, layer.add_norm(x, residual, norm) is not None

    assert run() == (False, False), "a gradient is wanted"
    with torch.no_grad():
        assert run() == (True, True)
        assert layer.add_norm(x, residual, norm) is None, "without counters"
        assert run(normal(K, 3).T) == (False, False), "not contiguous"
        assert run(x.float()) == (False, False)
        with engine.plain():
            assert run() == (False, False)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert run() == (False, False)
        monkeypatch.undo()
        assert run() == (False, False), "no layer is chosen before a measurement"
    assert fused_linear.new_counters(torch.device("cuda")) is None


def test_a_prepared_layer_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is fused, asking for it must not unpack a weight, which would take longer than the layer."""

    def unpack(*_: Any) -> Tensor:
        raise AssertionError("unpacked")

    layer, norm = Linear(512, 512).requires_grad_(False), LayerNorm(512)
    layer.prepare_weights()
    monkeypatch.setattr("titok.models.layers.onednn.unpack", unpack)
    with torch.no_grad():
        assert layer.add_norm(torch.randn(3, 512), torch.randn(3, 512), norm) is None
