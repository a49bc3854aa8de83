"""Random calls of `masked_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oracles
from random_calls.draw import BF16, EPS, F32, FLOATS, Draw, assert_close
from titok import ops

WRONG = {
    "num_heads": (0, -1, 1 << 40, 1.5, None, True),
    "query_range": ((-1, 2), (2, 1), (0, 1 << 40), (0, None), 3, (0.0, 1.0)),
    "scale": (float("nan"), float("inf"), "text", True),
}


def masked_attention(draw: Draw) -> None:
    heads, head_dim = draw.size(least=1, most=5), draw.size(least=1, most=97)
    batch, tokens = draw.size(most=3), draw.size(most=130)
    dtype = draw.pick(F32, BF16, *FLOATS)
    spread = draw.pick(1.0, 1.0, 0.1, 3.0)
    gradient = draw.chance(0.4)
    values = draw.normal(batch, tokens, 3 * heads * head_dim, dtype=dtype, spread=spread)
    mask = None
    if draw.chance(0.6):
        shown = draw.bits(batch, tokens, probability=draw.pick(0.1, 0.5, 0.9, 1.0))
        mask = draw.tensor("key_mask", shown, ("step", "permuted", "expanded"))
    backend = draw.pick(None, None, None, "auto", "cpp", "sdpa", "plain")
    if backend == "cpp" and dtype not in (F32, BF16):
        backend = None
    layouts = ["gap", "step", "permuted", "expanded"]
    if not gradient and draw.chance(0.15):
        # Hidden tokens must be finite, but for "cpp", which alone takes infinities. In an expanded qkv, the visible
        # tokens of one sample would be hidden ones of another.
        layouts.remove("expanded")
        visible = torch.ones(batch, tokens, dtype=torch.bool) if mask is None or backend == "cpp" else mask
        for value in (torch.nan, torch.inf, -torch.inf) if backend == "cpp" else (torch.nan,):
            hit = draw.bits(*values.shape, probability=0.003) & visible[..., None]
            values = values.masked_fill(hit, value)
    arguments: dict[str, Any] = {
        "qkv": draw.tensor("qkv", values, layouts, gradient=gradient),
        "num_heads": heads,
        "scale": draw.pick(None, None, 0.5, -0.2, 0.0, 1),
    }
    if mask is not None:
        arguments["key_mask"] = mask
    if draw.chance(0.5):
        start = draw.random.randint(0, tokens)
        arguments["query_range"] = (start, draw.random.randint(start, tokens))
    draw.note(
        **{k: v for k, v in arguments.items() if not isinstance(v, Tensor)}, backend=backend, gradient=gradient
    )
    if draw.chance(0.12):
        arguments.setdefault("query_range", None)
        draw.spoil(arguments, WRONG, ["key_mask"])
        return draw.must_raise(lambda: ops.masked_attention(**arguments))
    out = ops.masked_attention(**arguments, backend=backend)
    exact = {k: v for k, v in arguments.items() if k != "qkv"}
    leaf = arguments["qkv"].detach().double().requires_grad_()
    queries = exact.get("query_range", (0, tokens))
    assert out.dtype == dtype
    assert out.is_contiguous()
    if batch == 0:
        assert out.shape == (0, queries[1] - queries[0], heads * head_dim)
        return
    expected = (
        oracles.attention(leaf, exact.pop("num_heads"), **exact) if tokens else leaf[..., : heads * head_dim]
    )
    if mask is not None:  # without a visible key the output is 0, whatever the query holds
        expected = expected.where(mask.any(1)[:, None, None], 0.0)
    scale = head_dim**-0.5 if exact["scale"] is None else exact["scale"]
    finite = leaf.detach().nan_to_num(0, 0, 0).unflatten(-1, (3, heads, head_dim))
    q, k, v = (x.abs().amax((0, 1)) if x.numel() else x.new_zeros(heads, head_dim) for x in finite.unbind(2))
    scores = float((q * k).sum(-1).max()) * abs(
        scale
    )  # their largest value, and what their rounding error follows
    unit, unit32 = EPS[dtype], EPS[torch.promote_types(dtype, F32)]
    largest = float(v.max()) if v.numel() else 0.0
    bound = largest * (2 * unit + unit32 * (16 + 4 * scores))
    assert_close("out", out, expected, bound)
    draw.check_inputs()
    if not gradient:
        return
    grad = draw.tensor("grad", draw.normal(*out.shape, dtype=dtype), ("gap", "step", "permuted", "expanded"))
    (found,) = torch.autograd.grad(out, arguments["qkv"], grad)
    (d_qkv,) = torch.autograd.grad(expected, leaf, grad.double())
    reach = float(finite.abs().max()) if finite.numel() else 0.0
    size = float(grad.double().abs().max()) if grad.numel() else 0.0
    rows = (queries[1] - queries[0]) or 1
    slope = size * (1 + 4 * reach * reach * head_dim * abs(scale))  # of dS, then of dQ and dK
    bound = slope * (2 * unit + unit32 * (32 + 8 * scores)) * rows**0.5
    assert_close("grad qkv", found, d_qkv, bound)
    draw.check_inputs()
