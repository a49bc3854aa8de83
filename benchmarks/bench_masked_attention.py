"""`masked_attention` against its peers, layer to layer: `python -m benchmarks.bench_masked_attention`.

Every candidate starts from qkv (B, N, 3*H*D) and ends with (B, N, H*D), so each pays for the transposes it needs.

- `eager`: matrix products and softmax on split heads.
- `sdpa`: heads split by transposed copies, then scaled_dot_product_attention.
- `titok`: the back end that titok chooses, on a CPU C++.
- `views`: titok's `backend="sdpa"`, which gives scaled_dot_product_attention views instead of copies.
- `flash`, `math`, and on a GPU `cudnn` and `efficient`: scaled_dot_product_attention on views with this back end of
  PyTorch alone, where it takes the shape. The documents compare with the fastest of these, `sdpa` and `views`.
- `flash-attn`, if that package is installed and the dtype is not float32: reads the packed qkv.

FLOP: two products of 2 * B * H * N * N * D forward, and five more backward, of which one computes the scores
again.

Bytes: qkv and the output once forward. Backward reads both and the output's gradient, and writes the gradient of
qkv.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.op_report import OpReport, checked, op_parser
from titok.ops import backends, masked_attention

# (tokens, heads, head dim) of the generators of L-32, B-64 and S-128, then of the encoders of L-32, B-64 and S-128
SHAPES = ((33, 16, 48), (65, 16, 48), (129, 16, 64), (289, 16, 64), (321, 12, 64), (385, 8, 64))
# Those of the generators of L-32 and L-64, then of the decoders of L-32 at 256 pixels and of L-64 at 512 pixels
FEW_SHAPES = ((33, 16, 48), (65, 16, 48), (289, 16, 64), (321, 16, 64))
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def eager(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    probabilities = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2).reshape(batch, tokens, width // 3)


def sdpa(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def sdpa_by(backend: SDPBackend, qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def takes(run: Callable[[Tensor, int], Tensor], qkv: Tensor, heads: int) -> bool:
    """Whether a back end of PyTorch computes this shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says why a back end does not
            run(qkv, heads)
    except RuntimeError:
        return False
    return True


def flash_attn(qkv: Tensor, heads: int) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, heads, -1))).flatten(2)


def titok(qkv: Tensor, heads: int) -> Tensor:
    return masked_attention(qkv, heads)


def rotated(qkv: Tensor, heads: int, seed: int) -> tuple[Tensor, int]:
    """The same values, moved along the channels by an amount that depends on the seed."""
    return qkv.roll(31 * seed, -1), heads


def train(run: Callable[[Tensor, int], Tensor], leaf: Tensor, heads: int, grad: Tensor) -> Any:
    return torch.autograd.grad(run(leaf, heads), leaf, grad)


@pytest.mark.parametrize("run", [eager, sdpa, titok])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [SHAPES[0], SHAPES[3]])
@pytest.mark.benchmark(group="masked_attention")
def test_bench(benchmark: Any, run: Callable[..., Any], tokens: int, heads: int, head_dim: int) -> None:
    benchmark.group += f"[N={tokens}, H={heads}, D={head_dim}]"
    benchmark(run, torch.randn(1, tokens, 3 * heads * head_dim), heads)


def parser() -> argparse.ArgumentParser:
    return op_parser(__doc__)


def main() -> None:
    arguments = parser().parse_args()
    report = OpReport("masked_attention", arguments)
    candidates: dict[str, Callable[..., Any]] = {"eager": eager, "sdpa": sdpa, "titok": titok}
    if backends()["flash-attn"] == "available" and report.dtype != torch.float32:
        candidates["flash-attn"] = flash_attn
    candidates["views"] = partial(masked_attention, backend="sdpa")
    if arguments.compile:
        candidates["compiled"] = torch.compile(eager, dynamic=False)
    for batch in arguments.batch:
        for tokens, heads, head_dim in FEW_SHAPES if arguments.few else SHAPES:
            shape = (batch, tokens, 3 * heads * head_dim)
            leaf = torch.randn(shape, device=report.device).to(report.dtype).requires_grad_()
            grad = torch.randn_like(leaf[..., : heads * head_dim])
            peers = dict(candidates)
            by_backend = {name: partial(sdpa_by, backend) for name, backend in BACKENDS.items()}
            peers |= {name: run for name, run in by_backend.items() if takes(run, leaf.detach(), heads)}
            forward = checked(peers, partial(rotated, leaf.detach(), heads), "eager")
            both = {name: partial(train, run, leaf, heads, grad) for name, run in peers.items()}
            product = 2.0 * batch * heads * tokens * tokens * head_dim
            forward_bytes = leaf.nbytes + grad.nbytes
            directions = (("forward", forward, 2, 1), ("forward+backward", both, 7, 3))
            for direction, runs, products, passes in directions[:1] if arguments.few else directions:
                sizes = {"direction": direction, "B": batch, "N": tokens, "H": heads, "D": head_dim}
                report.case(sizes, runs, num_bytes=passes * forward_bytes, flops=products * product)


if __name__ == "__main__":
    main()
