"""Every op of titok on GPUs that are not there (`fake_cuda`), and the faults that such a dry run finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_cuda import Recorder, fake_gpus
from titok import nn, ops
from titok.inference import fused_linear
from titok.inference.folded_upsample import fold_upsample_conv, upsample_conv

pytest.importorskip("triton")

GPUS = pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64


@GPUS
@pytest.mark.parametrize("bias", [False, True])
def test_folded_upsampling(device: str, bias: bool) -> None:
    with fake_gpus() as recorder, torch.no_grad():
        weight = torch.empty(8, 8, 3, 3, dtype=BF16, device=device)
        folded = fold_upsample_conv(weight, torch.empty(8, dtype=BF16, device=device) if bias else None)
        x = torch.empty(2, 8, 4, 6, dtype=BF16, device=device).contiguous(memory_format=torch.channels_last)
        recorder.clear()
        result = upsample_conv(x, folded)
        assert result.shape == (2, 8, 8, 12)
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert recorder.findings == []


def calls(device: str) -> dict[str, Any]:
    """Every op of titok that has kernels for a GPU -> a call of it as models make it."""

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def channels_last(*shape: int) -> Tensor:
        return empty(*shape).contiguous(memory_format=torch.channels_last)

    qkv, key_mask = empty(2, 65, 3 * 128), empty(2, 65, dtype=torch.bool)
    x, maps, rows, weight = empty(2, 65, 128), channels_last(2, 64, 32, 32), empty(2, 65, 128), empty(128)
    scale, statistics = empty(64, dtype=F32), empty(2, 32, dtype=F32)
    logits, codebook = empty(100, 1024), empty(1024, 256)
    titok = torch.ops.titok
    return {
        "add_layer_norm": lambda: ops.add_layer_norm(x, rows, weight, weight, 1e-6),
        "add_layer_norm_backward": lambda: titok.add_layer_norm_backward(x, rows, x, weight, 1e-6),
        "code_mixture": lambda: ops.code_mixture(logits, codebook),
        "code_mixture_backward": lambda: titok.code_mixture_backward(
            empty(100, 256), logits, codebook, empty(100, 256), True
        ),
        "group_norm_silu": lambda: ops.group_norm_silu(maps, 32, scale, scale, 1e-6, residual=maps),
        "group_norm_silu_backward": lambda: titok.group_norm_silu_backward(
            maps, maps, maps, scale, scale, statistics, statistics
        ),
        "masked_attention": lambda: ops.masked_attention(qkv, 2, key_mask=key_mask, query_range=(1, 9)),
        "masked_attention_backward": lambda: titok.masked_attention_backward(
            rows, qkv, None, rows, empty(2, 2, 65, dtype=F32), 2, 0, 65, 0.125
        ),
        "masked_decode_partial": lambda: titok.masked_decode_partial(
            empty(3, 32, 4096),
            None,
            None,
            None,
            empty(3, 8, dtype=I64),
            empty(3, 6, dtype=F32),
            empty(3, 32, 13, dtype=I64),
            "peak",
            0,
            0,
            0,
            2,
            4096,
            False,
            True,
            False,
            False,
        ),
        "masked_decode_step": lambda: titok.masked_decode_step(
            empty(3, 32, dtype=I64),
            empty(3, 32, 4096),
            None,
            None,
            None,
            empty(3, 32, dtype=torch.bool),
            None,
            None,
            empty(3, 8, dtype=I64),
            empty(3, 6, dtype=F32),
            4096,
            "threshold",
            "probability",
            "model",
            False,
            False,
            32,
            False,
            False,
        ),
        "maskgit_decode_step": lambda: ops.maskgit_decode_step(
            empty(3, 32, dtype=I64), empty(3, 32, 4096), step=0, steps=8, num_masked=20, mask_token=4096
        ),
        "nearest_codebook": lambda: ops.nearest_codebook(empty(64, 12), empty(4096, 12)),
    }


@GPUS
@pytest.mark.parametrize("name", sorted(calls("meta")))
def test_every_op(name: str, device: str) -> None:
    """Its kernel is chosen, all tensors that it makes are on its device, and it launches at least one kernel."""
    with fake_gpus() as recorder, torch.no_grad():
        call = calls(device)[name]
        recorder.clear()
        results = call()
        for result in results if isinstance(results, tuple) else (results,):
            assert str(result.device) == device
    assert recorder.findings == []
    in_cuda = name in ("masked_decode_step", "maskgit_decode_step")
    assert recorder.backends[name] == ("cuda" if in_cuda else "triton")
    assert recorder.device_ops != []


def test_every_op_with_kernels_has_a_call() -> None:
    names = {op.name for op in Recorder()._ops.values() if {"triton", "cuda"} & set(op.backends)}
    assert names == set(calls("meta"))


def functions(device: str) -> dict[str, Callable[[], Any]]:
    """Every public function of `titok.ops` that computes, and what models and modules call beside them."""

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def channels_last(*shape: int) -> Tensor:
        return empty(*shape).contiguous(memory_format=torch.channels_last)

    x, weight, tokens, logits = empty(2, 65, 128), empty(128), empty(3, 32, dtype=I64), empty(3, 32, 4096)
    latents, codebook, is_visible = empty(2, 32, 12), empty(4096, 12), empty(2, 32, dtype=torch.bool)
    scale, maps = empty(64, dtype=F32), channels_last(2, 64, 32, 32)

    def split_step() -> Any:
        """`masked_decode_step` with its codes over two ranks, gathered on one of them."""
        decode = ops.begin_masked_decode(tokens, 4096, policy="threshold", threshold=0.9, mask_token=4096)
        while not decode.is_complete:
            parts = [
                ops.masked_decode_partial(decode, part, first_code=2048 * rank, first_chunk=rank)
                for rank, part in enumerate(logits.split(2048, dim=2))
            ]
            decode = ops.masked_decode_reduce(decode, torch.cat(parts, dim=2))
        return ops.finish_masked_decode(decode)

    def packed_step() -> Any:
        params, workspace = empty(10, dtype=torch.int32), empty(3, dtype=torch.int32)
        return ops.maskgit_decode_step_packed(
            tokens, logits, params=params, mask_token=4096, workspace=workspace, return_order=True
        )

    def quantizer_step() -> Any:
        quantizer = nn.EMAVectorQuantizer(64, 12, restart_below=0.1, normalize=True)
        quantizer.to_empty(device=device)
        return quantizer(empty(2, 32, 12, dtype=F32), is_visible)

    return {
        "add_layer_norm": lambda: ops.add_layer_norm(x, x, weight, weight, 1e-6),
        "attention": lambda: ops.attention(x, x, x, 2),
        "code_mixture": lambda: ops.code_mixture(empty(100, 1024), empty(1024, 256)),
        "group_norm_silu": lambda: ops.group_norm_silu(maps, 32, scale, scale, 1e-6),
        "layer_norm": lambda: ops.layer_norm(x, weight, weight, 1e-6),
        "layer_norm_of_sum": lambda: ops.layer_norm_of_sum(x, x, weight, weight, 1e-6),
        "masked_attention": lambda: ops.masked_attention(empty(2, 65, 3 * 128), 2),
        "masked_decode_step": lambda: ops.masked_decode_step(
            tokens, logits, policy="count", count=3, mask_token=4096, top_k=50, temperature=1.0, seed=7
        ),
        "begin_masked_decode, masked_decode_partial, masked_decode_reduce, finish_masked_decode": split_step,
        "maskgit_decode_step": lambda: ops.maskgit_decode_step(
            tokens, logits, logits, step=0, steps=8, num_masked=20, mask_token=4096, guidance=2.0
        ),
        "maskgit_decode_step_packed": packed_step,
        "nearest_codebook": lambda: ops.nearest_codebook(latents, codebook, normalize=True),
        "quantize": lambda: ops.quantize(latents, codebook, mask=is_visible),
        "quantize, of a feature map": lambda: ops.quantize(maps, empty(4096, 64), dim=1),
        "EMAVectorQuantizer, a training step": quantizer_step,
    }


def tensors_of(results: Any) -> list[Tensor]:
    return [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]


@GPUS
@pytest.mark.parametrize("name", functions("meta"))
def test_every_public_function(name: str, device: str) -> None:
    with fake_gpus() as recorder, torch.no_grad():
        call = functions(device)[name]
        recorder.clear()
        assert {str(result.device) for result in tensors_of(call())} == {device}
    assert recorder.findings == []
    assert recorder.device_ops != []


def test_every_public_function_has_a_call() -> None:
    of_this_process = {
        "backends", "is_ordinary", "is_plain", "last_backend", "last_backends", "only_plain", "through_dispatcher",
    }  # fmt: skip
    on_the_host = {"pack_step_params"}
    types = {name for name in ops.__all__ if isinstance(getattr(ops, name), type)}
    called = {name for key in functions("meta") for name in key.split(", ")}
    assert set(ops.__all__) - of_this_process - on_the_host - types - called == set()


@GPUS
def test_fused_linear_layers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one launch, with all of its tensors on one GPU."""
    monkeypatch.setattr(fused_linear, "LINEAR_GELU_LAYERS", {(128, 256): 1 << 20})
    monkeypatch.setattr(fused_linear, "LINEAR_ADD_NORM_LAYERS", frozenset({(128, 256)}))
    with fake_gpus() as recorder, torch.no_grad():

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=BF16, device=device)

        x, weight, bias, residual = empty(2, 65, 128), empty(256, 128), empty(256), empty(2, 65, 256)
        counters = fused_linear.new_counters(torch.device(device))
        recorder.clear()
        with fused_linear.counters(counters):
            hidden = fused_linear.gelu(x, weight, bias)
            results = fused_linear.add_norm(x, weight, bias, residual, bias, bias, 1e-6)
    assert hidden is not None
    assert results is not None
    assert {str(t.device) for t in (hidden, *results)} == {device}
    assert recorder.findings == []
    assert recorder.device_ops == ["linear_gelu", "linear_add_norm"]


# ---------------------------------------------------------------------------------------------------------------
# What the recorder finds


def _launched_on_two(x: Tensor) -> None:
    """A launcher that allocates on the current device, which is another one than that of its arguments."""
    from titok.kernels import add_layer_norm
    from titok.kernels._launch import record

    elsewhere, weight = torch.empty(3, 3, device="cuda"), x.new_empty(3)
    with record():
        add_layer_norm.forward(x, x, weight, weight, 1e-6, elsewhere, elsewhere)


FAULTS = {
    "_local_scalar_dense: the host waits": lambda x: x[0, 0].item(),
    "nonzero: the host waits": lambda x: x.nonzero(),
    "index: the host waits": lambda x: x[x > 0],
    "synchronize: the host waits": lambda x: torch.cuda.synchronize(),
    "from cuda:1 to cpu": lambda x: x.cpu(),
    "from cuda:1 to cuda:0": lambda x: x.to("cuda:0"),
    "its source is not pinned": lambda x: torch.empty(3).to(x.device, non_blocking=True),
    "because it blocks": lambda x: torch.empty(3, pin_memory=True).to(x.device),
    "that is not channels-last": lambda x: ops.group_norm_silu(
        x.new_empty(1, 8, 3, 5), 2, x.new_empty(8), x.new_empty(8), 1e-6
    ),
    "two devices": lambda x: x + torch.empty(3, 3, device="cuda:0"),
    "launched with tensors on ['cuda:0', 'cuda:1']": _launched_on_two,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    with fake_gpus() as recorder:
        x = torch.empty(3, 3, device="cuda:1")
        try:
            FAULTS[fault](x)
        except Exception as error:  # an op whose result depends on values raises
            recorder.findings.append(str(error))
    assert any(fault in finding for finding in recorder.findings), recorder.findings


def test_one_op_more_than_the_ceiling_is_found() -> None:
    with fake_gpus() as recorder:
        x = torch.empty(3, 3, device="cuda:1")
        x.exp().t()  # a view is no work
        recorder.expect_at_most(1)
        recorder.expect_at_most(3, others=2)
        with pytest.raises(AssertionError, match=r"3 ops on the GPU, at most 2 are allowed: .*aten::exp"):
            recorder.expect_at_most(2, others=2)
        ops.layer_norm_of_sum(x, x, x[0], x[0], 1e-6)  # a launch of titok's counts like an op of PyTorch's
        with pytest.raises(AssertionError, match="add_layer_norm_forward"):
            recorder.expect_at_most(1)
