"""The convolutions of GPUs. Without one, everything but the call of cuDNN runs on CPU tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from titok import VQGANConfig
from titok.inference import cudnn
from titok.inference.prepared_weights import PreparedParameter
from titok.models import vqgan
from titok.models.vqgan import MaskGITVQGAN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"hidden_channels": 32, "channel_multipliers": (1, 1, 2), "blocks_per_level": 2, "code_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [3, 8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_conv(with_bias: bool, outputs: int, dtype: torch.dtype) -> None:
    weight = torch.randn(outputs, 16, 3, 3, dtype=dtype, device=DEVICE)
    bias = torch.randn(outputs, dtype=dtype, device=DEVICE) if with_bias else None
    x = torch.randn(2, 16, 5, 7, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    laid_out = cudnn.lay_out(weight)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert len(laid_out) == (8 if dtype == torch.bfloat16 else outputs)
    restored = cudnn.restore(laid_out, outputs)
    assert torch.equal(restored, weight)
    assert restored.is_contiguous()
    with cudnn.tuning():
        got = cudnn.conv(x, laid_out, bias, outputs)
    want = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert got.shape == want.shape
    assert got.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3  # PyTorch lets cuDNN round float32 to TF32
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("shortcut_of_result", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 6e-2)], ids=str)
def test_a_prepared_pixel_decoder(
    dtype: torch.dtype, tolerance: float, shortcut_of_result: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights laid out for cuDNN, sums taken by norms, and folded upsampling against the model in training's form."""
    monkeypatch.setattr(cudnn, "is_used", lambda tensor: True)
    torch.manual_seed(0)
    model = MaskGITVQGAN(VQGANConfig(**SMALL, codebook_size=8, shortcut_of_result=shortcut_of_result))
    model = model.to(dtype).eval().to(DEVICE)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    codes = torch.randint(8, (2, 3, 5), device=DEVICE)
    with torch.enable_grad():
        want = model.decode(codes).detach()  # every block takes its own sum
    model.prepare()
    prepared = {name for name, p in model.named_parameters() if isinstance(p, PreparedParameter)}
    assert {"decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.levels.1.upsample.weight"} <= prepared
    with torch.no_grad():
        got = model.decode(codes)
    assert (got - want).double().norm() <= tolerance * want.double().norm()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_norms_take_the_sums_of_residual_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "is_used", lambda tensor: True)
    sums = []
    norm = vqgan.group_norm_silu
    monkeypatch.setattr(
        vqgan, "group_norm_silu", lambda *a, **k: (sums.append(k.get("residual") is not None), norm(*a, **k))[1]
    )
    decoder = MaskGITVQGAN(VQGANConfig(**SMALL, codebook_size=8)).decoder.eval()
    with torch.no_grad():
        decoder(torch.randn(1, 16, 4, 4))
    assert sum(sums) > 4
