"""Every kernel at shapes so small that compute-sanitizer is quick: odd sizes, tails of tiles, forward and backward.

`benchmarks.gpu` runs these under memcheck and racecheck. Inputs are drawn on the CPU, so that nearly all kernels that
run are those of this repository. Results are compared with the plain path, on the CPU in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_cuda import fake_gpus
from maskgit_cases import random_case
from titok import ops
from titok.inference import fused_linear

pytest.importorskip("triton")

ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=ON_THE_CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def maps(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# Op with a case -> (op, tensors that require gradients). The op takes the tensors and `backend`.
CASES: dict[str, Callable[[], tuple[Callable[..., Any], list[Tensor]]]] = {
    "masked_attention, few tokens": lambda: (
        lambda qkv, **how: ops.masked_attention(qkv, 2, **how),
        [normal(2, 33, 3 * 2 * 48)],
    ),
    "masked_attention, tiles of keys": lambda: (
        lambda qkv, **how: ops.masked_attention(qkv, 1, query_range=(1, 180), **how),
        [normal(1, 197, 3 * 64)],
    ),
    "masked_attention, key mask": lambda: (
        lambda qkv, **how: ops.masked_attention(qkv, 2, key_mask=torch.arange(35, device=qkv.device)[None] < 20, **how),
        [normal(1, 35, 3 * 2 * 32)],
    ),
    "add_layer_norm": lambda: (
        lambda x, r, w, b, **how: ops.add_layer_norm(x, r, w, b, 1e-6, **how),
        [normal(3, 7, 72), normal(3, 7, 72), normal(72), normal(72)],
    ),
    "group_norm_silu, one pass": lambda: (
        lambda x, w, b, **how: ops.group_norm_silu(x, 4, w, b, 1e-6, **how),
        [maps(2, 32, 5, 5), normal(32), normal(32)],
    ),
    "group_norm_silu, three passes": lambda: (
        lambda x, r, w, b, **how: ops.group_norm_silu(x, 3, w, b, 1e-6, residual=r, **how),
        [maps(1, 24, 17, 19), maps(1, 24, 17, 19), normal(24), normal(24)],
    ),
    "code_mixture": lambda: (ops.code_mixture, [normal(37, 70), normal(70, 24)]),
}  # fmt: skip


def results(run: Callable[..., Any], leaves: list[Tensor], backend: str) -> list[Tensor]:
    """What the op returns, and the gradients of the sum of squares of that."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    returned = run(*leaves, backend=backend)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    loss = sum(output.float().square().sum() for output in outputs)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, dtype: torch.dtype, device: str) -> None:
    run, leaves = CASES[name]()
    leaves = [leaf.to(dtype) for leaf in leaves]
    got = results(run, [leaf.to(device) for leaf in leaves], "triton")
    want = results(run, [leaf.double() for leaf in leaves], "plain")
    for ours, exact in zip(got, want, strict=True):
        error = (ours.cpu().double() - exact).norm() / exact.norm()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
def test_every_argument_is_on_the_gpu(name: str) -> None:
    """With GPUs that are not there: a case mixes no devices, and its kernels are launched."""
    with fake_gpus() as recorder, torch.no_grad():
        run, leaves = CASES[name]()
        leaves = [leaf.to("cuda:0") for leaf in leaves]
        recorder.clear()
        run(*leaves, backend="triton")
    assert recorder.findings == []
    assert recorder.device_ops != []


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "codes", "width"), [(5, 33, 7), (70, 130, 12), (3, 17, 80)])
def test_nearest_codebook(rows: int, codes: int, width: int, device: str) -> None:
    latents, codebook = normal(rows, width), normal(codes, width)
    indices = ops.nearest_codebook(latents.to(device), codebook.to(device), backend="triton").cpu()
    distances = torch.cdist(latents.double(), codebook.double())
    torch.testing.assert_close(distances.gather(1, indices[:, None])[:, 0], distances.min(1).values)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "triton", marks=ON_THE_CPU),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_decode_step(number: int, device: str, backend: str) -> None:
    case = random_case(number, codes=(7, 255, 1031), most_tokens=12)
    tensors = [None if t is None else t.to(device) for t in case.tensors]
    got = ops.maskgit_decode_step(*tensors, **case.arguments, backend=backend)
    assert torch.equal(got.cpu(), ops.maskgit_decode_step(*case.tensors, **case.arguments, backend="plain"))


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 150])
def test_linear_layers_in_one_launch(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which program of a block of rows normalises it depends on chance, the result does not."""
    monkeypatch.setattr(fused_linear, "LINEAR_GELU_LAYERS", {(64, 192): 1 << 20})
    monkeypatch.setattr(fused_linear, "LINEAR_ADD_NORM_LAYERS", frozenset({(64, 192)}))
    shapes = ((rows, 64), (192, 64), (192,), (rows, 192), (192,), (192,))
    x, weight, bias, residual, scale, shift = (normal(*shape).to(device, torch.float16) for shape in shapes)
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    activated = fused_linear.gelu(x, weight, bias)
    with fused_linear.counters(counters):
        found = [fused_linear.add_norm(x, weight, bias, residual, scale, shift, 1e-5) for _ in range(3)]
    assert activated is not None
    assert found[0] is not None
    assert not counters.any()
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other or (), strict=True))
    y = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    exact = (torch.nn.functional.gelu(y), y + residual.double())
    norm = torch.nn.functional.layer_norm(found[0][0].double(), (192,), scale.double(), shift.double(), 1e-5)
    for result, expected in zip((activated, *found[0]), (*exact, norm), strict=True):
        assert (result.double() - expected).abs().max() <= 2e-3 * expected.abs().max()
