"""`attention`, which takes queries, keys and values apart, against SDPA and against a definition in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titok.ops import attention, masked_attention

B, N, H, D = 2, 7, 3, 8


def parts(packed: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    qkv = torch.randn(B, N, 3 * H * D, dtype=dtype)
    return tuple(x if packed else x.contiguous() for x in qkv.chunk(3, dim=-1))


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    heads = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None]
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_and_gradients_are_those_of_sdpa(packed: bool, masked: bool, dtype: torch.dtype) -> None:
    q, k, v = parts(packed, dtype)
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7]) if masked else None
    weights = torch.randn(B, N, H * D, dtype=dtype)

    def result(function) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)

    got = result(lambda q, k, v: attention(q, k, v, H, key_mask=mask, scale=0.3))
    torch.testing.assert_close(got, result(lambda q, k, v: sdpa(q, k, v, mask, 0.3)), atol=2e-6, rtol=2e-6)


def test_gradients_by_finite_differences() -> None:
    inputs = tuple(x[:1, :3].detach().requires_grad_() for x in parts(True, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, H), inputs)


def test_parts_of_one_tensor_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("titok.ops.attention")  # the function of this name hides it

    seen: list[Tensor] = []
    monkeypatch.setattr(
        module, "masked_attention", lambda qkv, *a, **k: seen.append(qkv) or masked_attention(qkv, *a, **k)
    )
    qkv = torch.randn(B, N, 3 * H * D, requires_grad=True)
    out = attention(*qkv.chunk(3, dim=-1), H, query_range=(2, 5))
    assert seen[0].data_ptr() == qkv.data_ptr()
    want = masked_attention(qkv, H, query_range=(2, 5))
    assert torch.equal(out, want)
    assert torch.equal(torch.autograd.grad(out.sum(), qkv)[0], torch.autograd.grad(want.sum(), qkv)[0])

    q, k, v = qkv.detach().chunk(3, dim=-1)
    for arguments in ((k, q, v), (q, k, k), (q, k, v.clone()), (q[:, 1:], k[:, :-1], v[:, 1:])):
        expected = masked_attention(torch.cat(arguments, dim=-1), H)
        assert torch.equal(attention(*arguments, H), expected)
        assert seen[-1].data_ptr() != arguments[0].data_ptr()


def test_wrong_arguments() -> None:
    q, k, v = parts(False)
    with pytest.raises(ValueError, match=r"k: expected shape \(2, 7, 24\), got \(2, 6, 24\)"):
        attention(q, k[:, 1:], v[:, 1:], H)
    with pytest.raises(TypeError, match="v: expected dtype float32, got float64"):
        attention(q, k, v.double(), H)
    with pytest.raises(ValueError, match="heads"):
        attention(q, k, v, 5)


def test_vmap() -> None:
    q, k, v = (torch.stack(x) for x in zip(parts(True), parts(True), strict=True))
    got = torch.vmap(lambda q, k, v: attention(q, k, v, H))(q, k, v)
    torch.testing.assert_close(got[1], sdpa(q[1], k[1], v[1]))


@pytest.mark.slow
def test_compile() -> None:
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, H), fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in parts(False)]
    got, want = compiled(*inputs), attention(*inputs, H)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs)
    )
