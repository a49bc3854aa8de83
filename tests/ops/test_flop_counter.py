"""What `torch.utils.flop_counter` counts for the ops, against products counted by hand and against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from titok import engine, ops

B, N, H, D = 2, 7, 3, 5  # samples, tokens, heads, channels of a head
START, STOP = 1, 5  # of the queries
M, K, C = 6, 11, 4  # rows, codes, channels of a code
PRODUCT = 2 * B * H * (STOP - START) * N * D  # scores, or weighted values
MIXTURE = 2 * M * K * C


def attend(qkv: Tensor) -> Tensor:
    return ops.masked_attention(qkv, H, query_range=(START, STOP))


def attend_plain(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    return torch.softmax(q[:, :, START:STOP] @ k.mT, -1) @ v


def mix_plain(logits: Tensor, codebook: Tensor) -> Tensor:
    return torch.softmax(logits, -1) @ codebook


def norm(x: Tensor) -> Tensor:
    weight = torch.ones(8)
    total, rows = ops.add_layer_norm(x, x, weight, weight, 1e-5)
    maps = ops.group_norm_silu(x[:, :, None, None], 2, weight, weight, 1e-5)
    return total + rows + maps[:, :, 0, 0] + ops.layer_norm(x, weight, weight, 1e-5)


def decode(logits: Tensor) -> Tensor:
    return ops.maskgit_decode_step(torch.full((1, 2), 9), logits, step=0, steps=1, num_masked=0, mask_token=9)


# Name: function, shapes of its arguments, FLOP of the forward and of the backward pass (None: it has none).
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], int, int | None]] = {
    # The backward pass computes the scores once more, then two products for each of the forward pass.
    "masked_attention": (attend, [(B, N, 3 * H * D)], 2 * PRODUCT, 5 * PRODUCT),
    "code_mixture": (ops.code_mixture, [(M, K), (K, C)], MIXTURE, 2 * MIXTURE),
    "nearest_codebook": (ops.nearest_codebook, [(M, C), (K, C)], 2 * M * K * C, None),
    "quantize": (lambda z, codes: ops.quantize(z, codes).loss, [(M, C), (K, C)], 2 * M * K * C, 0),
    "norms": (norm, [(3, 8)], 0, 0),
    "maskgit_decode_step": (decode, [(1, 2, 9)], 0, None),
}


def count(run: Callable[..., Any], *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


def tensors(shapes: list[tuple[int, ...]], requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["eager", "plain", "fake"])
def test_counts(name: str, way: str) -> None:
    op, shapes, forward, backward = CASES[name]
    mode = {"eager": torch.enable_grad, "plain": engine.plain, "fake": FakeTensorMode}[way]
    with mode():
        assert count(op, *tensors(shapes)) == forward
        if backward is not None:
            inputs = tensors(shapes, requires_grad=True)
            assert count(lambda: op(*inputs).sum().backward()) == forward + backward


@pytest.mark.parametrize(
    ("name", "plain", "recomputed"), [("masked_attention", attend_plain, PRODUCT), ("code_mixture", mix_plain, 0)]
)
def test_as_the_same_formula_in_plain_pytorch(name: str, plain: Callable[..., Tensor], recomputed: int) -> None:
    op, shapes, *_ = CASES[name]
    inputs = tensors(shapes, requires_grad=True)
    assert count(op, *inputs) == count(plain, *inputs)
    counts = [count(lambda f=f: f(*inputs).sum().backward()) for f in (op, plain)]
    assert counts[0] == counts[1] + recomputed


def test_gradient_of_the_logits_alone() -> None:
    (logits,), (codebook,) = tensors([(M, K)], requires_grad=True), tensors([(K, C)])
    assert count(lambda: ops.code_mixture(logits, codebook).sum().backward()) == 2 * MIXTURE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked_attention", "code_mixture"])
def test_counts_of_compiled_code(name: str) -> None:
    op, shapes, forward, backward = CASES[name]
    assert backward is not None
    inputs = tensors(shapes, requires_grad=True)
    compiled = torch.compile(op, backend="aot_eager")  # some PyTorch releases run it eagerly within the counter
    compiled(*inputs).sum().backward()
    assert count(lambda: compiled(*inputs).sum().backward()) == forward + backward


def test_every_op_has_a_formula() -> None:
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "titok::" in name
    }
    assert "group_norm_silu_backward" in names
    for name in names - {"quantize"}:  # which PyTorch takes apart
        assert getattr(torch.ops.titok, name) in flop_registry
