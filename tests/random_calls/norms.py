"""Random calls of `layer_norm`, `add_layer_norm` and `group_norm_silu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oracles
from random_calls.draw import BF16, EPS, F32, F64, FLOATS, Draw, assert_close, same_bits
from titok import ops

LAYOUTS = ("gap", "step", "permuted", "expanded")
WRONG_EPS = (0.0, -1.0, float("nan"), float("inf"), None, "text")


def _backend(draw: Draw, *names: str) -> str | None:
    backend: str | None = draw.pick(None, None, None, "auto", *names)
    draw.note(backend=backend)
    return backend


def _finish(name: str, out: Any, result: Any, expected: Any) -> None:
    """`out=` is what is returned, and takes what a call without it returns."""
    for target, value, other in zip(out, result, expected, strict=True):
        assert target is value, f"{name}: `out` is not what is returned"
        assert same_bits(value, other), f"{name}: other values with `out` than without"


# ---------------------------------------------------------------------------------------------------------------


def add_layer_norm(draw: Draw) -> None:
    alone = draw.chance(0.3)
    large = draw.chance(0.05)
    shape = [draw.size(most=4) for _ in range(draw.pick(0, 1, 1, 2, 3))] + [draw.size(least=1)]
    if large:
        shape = [draw.pick(97, 300, 1100), draw.pick(48, 64, 130, 257)]
    one_dtype = draw.pick(True, False)
    dtypes = [draw.pick(*FLOATS)] * 4 if one_dtype else [draw.pick(*FLOATS) for _ in range(4)]
    if draw.chance(0.5):  # those that the C++ kernel takes
        dtypes = [dtype if dtype in (F32, BF16) else F32 for dtype in dtypes]
    spread, centre = draw.pick((1, 0), (1, 0), (1e-3, 0), (30, 100), (1e-20, 0))
    gradient = draw.chance(0.35)

    def rows(name: str, dtype: torch.dtype) -> Tensor:
        x = draw.normal(*shape, dtype=dtype, spread=spread, centre=centre)
        if not gradient and draw.chance(0.1):
            x = draw.sprinkle(x, torch.nan, torch.inf, -torch.inf, probability=0.02)
        return draw.tensor(name, x, LAYOUTS, gradient=gradient)

    arguments: dict[str, Any] = {"x": rows("x", dtypes[0])}
    if not alone:
        arguments["residual"] = rows("residual", dtypes[1])
    for name, dtype in (("weight", dtypes[2]), ("bias", dtypes[2] if draw.chance(0.8) else dtypes[3])):
        values = draw.normal(shape[-1], dtype=dtype)
        arguments[name] = draw.tensor(name, values, ("step", "expanded"), gradient=gradient)
    arguments["eps"] = draw.pick(1e-12, 1e-6, 1e-5, 0.1)
    arguments["out_dtype"] = draw.pick(None, None, *FLOATS)
    backend = _backend(draw, "cpp", "plain")
    draw.note(eps=arguments["eps"], out_dtype=arguments["out_dtype"], gradient=gradient)
    op = ops.layer_norm if alone else ops.add_layer_norm
    if draw.chance(0.12):
        wrong = {"eps": WRONG_EPS, "out_dtype": (torch.int32, torch.bool)}
        draw.spoil(arguments, wrong)
        return draw.must_raise(lambda: op(**arguments))

    kernel_dtypes = {t.dtype for t in arguments.values() if isinstance(t, Tensor)} | {arguments["out_dtype"]}
    if backend == "cpp" and not kernel_dtypes <= {F32, BF16, None}:
        backend = None
    results = op(**arguments, backend=backend)
    total, normalised = (arguments["x"], results) if alone else results
    if not alone:
        exact = arguments["x"].double() + arguments["residual"].double()
        assert total.dtype == torch.promote_types(arguments["x"].dtype, arguments["residual"].dtype)
        assert_close("total", total, exact, 0.0)
    assert normalised.dtype == (arguments["out_dtype"] or total.dtype)
    assert normalised.is_contiguous()
    _check_layer_norm(draw, arguments, total, normalised, gradient)
    draw.check_inputs()
    if not alone and not gradient:
        _check_out(draw, arguments, backend, results)


def _check_layer_norm(
    draw: Draw, arguments: dict[str, Any], total: Tensor, normalised: Tensor, gradient: bool
) -> None:
    weight, bias, eps = (arguments[name] for name in ("weight", "bias", "eps"))
    t, w, b = (x.detach().double().requires_grad_() for x in (total, weight, bias))
    expected = oracles.layer_norm(t, w, b, eps)
    finite = total.detach().isfinite().all(-1, keepdim=True)
    expected_values = expected.detach().where(finite, torch.nan)
    if total.numel() == 0:
        assert_close("normalised", normalised, expected_values, 0.0)
        return
    unit = EPS[torch.promote_types(total.dtype, F32)] * (8 + total.shape[-1] ** 0.5)
    deviation = (t.detach().var(-1, correction=0, keepdim=True) + eps).sqrt()
    reach = 1 + t.detach().abs().amax(-1, keepdim=True) / deviation  # how much cancels in x - mean
    bound = unit * (reach * w.detach().abs() + b.detach().abs())
    assert_close("normalised", normalised, expected_values, bound.nan_to_num(1.0))
    if not gradient:
        return
    grads = [draw.normal(*total.shape, dtype=x.dtype) for x in (total, normalised)]
    leaves = [x for x in arguments.values() if isinstance(x, Tensor)]
    alone = "residual" not in arguments
    used = "normalised" if alone else draw.pick("both", "both", "total", "normalised")
    draw.note(gradients_of=used)
    outputs = {"both": (total, normalised), "total": (total,), "normalised": (normalised,)}[used]
    given = {"both": grads, "total": grads[:1], "normalised": grads[1:]}[used]
    found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    d_total, d_weight, d_bias = torch.autograd.grad(expected, (t, w, b), grads[1].double())
    if used == "total":
        d_total, d_weight, d_bias = torch.zeros_like(d_total), torch.zeros_like(d_weight), torch.zeros_like(d_bias)
    rounding = EPS[total.dtype] * (
        d_total.abs() + grads[0].double().abs()
    )  # each may be rounded before they are added
    if used != "normalised":
        d_total = d_total + grads[0].double()
    standard = (reach * 3 + 3) ** 2
    slope = (grads[1].double().abs() * w.detach().abs()).amax(-1, keepdim=True) / deviation
    rows_bound = unit * standard * slope + rounding
    n = total.numel() ** 0.5
    sums_bound = unit * n * (grads[1].double().abs() * standard).reshape(-1, total.shape[-1]).sum(0)
    checks = [("grad x", d_total, rows_bound)] * (1 if alone else 2)
    checks += [("grad weight", d_weight, sums_bound), ("grad bias", d_bias, sums_bound)]
    for (name, exact, bound), actual in zip(checks, found, strict=True):
        assert_close(name, torch.zeros_like(exact) if actual is None else actual, exact, bound)


def _check_out(draw: Draw, arguments: dict[str, Any], backend: str | None, results: tuple[Tensor, ...]) -> None:
    out = [torch.empty_like(r) for r in results]
    changed = ""
    for name in ("x", "residual"):  # the sum may take the place of what it is the sum of
        given = arguments[name]
        in_place = given.dtype == results[0].dtype and given.is_contiguous() and draw.chance(0.3)
        if in_place:
            out[0], changed = given, name
            break
    _finish("add_layer_norm", out, ops.add_layer_norm(**arguments, out=tuple(out), backend=backend), results)
    draw.check_inputs(changed)


# ---------------------------------------------------------------------------------------------------------------


def group_norm_silu(draw: Draw) -> None:
    large = draw.chance(0.05)
    groups, width = draw.size(least=1, most=9), draw.size(least=1, most=17)
    shape = [draw.size(most=3), groups * width, draw.size(most=9), draw.size(most=9)]
    if large:
        shape[2:] = [draw.pick(31, 40), draw.pick(33, 64)]
    dtype = draw.pick(F32, BF16, *FLOATS)
    spread, centre = draw.pick((1, 0), (1, 0), (1e-3, 0), (3, 20), (1e-20, 0))
    gradient = draw.chance(0.3) and not large
    layouts = ("channels last",) * 6 + ("gap", "step", "permuted")

    def image(name: str) -> Tensor:
        x = draw.normal(*shape, dtype=dtype, spread=spread, centre=centre)
        if not gradient and draw.chance(0.1):
            x = draw.sprinkle(x, torch.nan, torch.inf, probability=0.01)
        return draw.tensor(name, x, layouts, gradient=gradient)

    x = image("x")
    parameter = dtype if draw.chance(0.5) else (F64 if dtype == F64 else F32)
    arguments: dict[str, Any] = {"x": x, "num_groups": groups}
    for name in ("weight", "bias"):
        values = draw.normal(shape[1], dtype=parameter)
        arguments[name] = draw.tensor(name, values, ("step",), gradient=gradient)
    arguments |= {"eps": draw.pick(1e-6, 1e-5, 0.1), "out_dtype": draw.pick(None, None, None, *FLOATS)}
    if draw.chance(0.5):
        arguments["residual"] = image("residual")
    backend = _backend(draw, "plain", "cpp")
    draw.note(eps=arguments["eps"], groups=groups, out_dtype=arguments["out_dtype"], gradient=gradient)
    if draw.chance(0.12):
        wrong = {
            "eps": WRONG_EPS,
            "num_groups": (0, -1, shape[1] + 1, 1 << 40, 1.5, None, True),
            "out_dtype": (torch.int32,),
        }
        draw.spoil(arguments, wrong, ["residual"])
        return draw.must_raise(lambda: ops.group_norm_silu(**arguments))
    if backend == "cpp" and not ({dtype, arguments["out_dtype"]} <= {F32, BF16, None} and x.stride(1) == 1):
        backend = None
    results = ops.group_norm_silu(**arguments, backend=backend)
    pair = isinstance(results, tuple)
    total, normalised = results if pair else (x, results)
    if pair:
        assert total.dtype == dtype
        assert_close("total", total, x.double() + arguments["residual"].double(), 0.0)
    assert normalised.dtype == (arguments["out_dtype"] or dtype)
    assert normalised.is_contiguous(memory_format=_format(x))
    _check_group_norm(draw, arguments, total, normalised, gradient)
    draw.check_inputs()
    if not gradient:
        results = results if pair else (results,)
        out = tuple(torch.empty_like(r) for r in results)
        again = ops.group_norm_silu(**arguments, out=out if pair else out[0], backend=backend)
        _finish("group_norm_silu", out, again if pair else (again,), results)
        draw.check_inputs()


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def _check_group_norm(
    draw: Draw, arguments: dict[str, Any], total: Tensor, normalised: Tensor, gradient: bool
) -> None:
    weight, bias, groups, eps = (arguments[name] for name in ("weight", "bias", "num_groups", "eps"))
    t, w, b = (x.detach().double().requires_grad_() for x in (total, weight, bias))
    if total.numel() == 0:
        assert normalised.shape == total.shape
        if gradient:
            normalised.sum().backward()
            assert all(not p.grad.any() for p in (weight, bias))
        return
    expected = oracles.group_norm_silu(t, groups, w, b, eps)
    grouped = t.detach().unflatten(1, (groups, -1))
    deviation = (grouped.var((2, 3, 4), correction=0, keepdim=True) + eps).sqrt()
    reach = (1 + grouped.abs().amax((2, 3, 4), keepdim=True) / deviation).expand_as(grouped).flatten(1, 2)
    finite = grouped.sum((2, 3, 4), keepdim=True).isfinite().expand_as(grouped).flatten(1, 2)
    scale = w.detach().abs()[:, None, None]
    unit = EPS[torch.promote_types(total.dtype, F32)] * (8 + grouped[0, 0].numel() ** 0.5)
    polynomial = 1e-4 if normalised.dtype == BF16 else 0.0  # the exponential of the kernel for bfloat16 results
    bound = unit * (reach * scale + b.detach().abs()[:, None, None] + 1) + polynomial * expected.detach().abs()
    values = expected.detach().where(finite, torch.nan)
    assert_close("normalised", normalised, values, bound.nan_to_num(1.0))
    if not gradient:
        return
    grads = [draw.normal(*total.shape, dtype=x.dtype) for x in (total, normalised)]
    leaves = [x for x in arguments.values() if isinstance(x, Tensor)]
    pair = "residual" in arguments
    found = torch.autograd.grad(
        (total, normalised) if pair else (normalised,), leaves, grads if pair else grads[1:]
    )
    d_total, d_weight, d_bias = torch.autograd.grad(expected, (t, w, b), grads[1].double())
    if pair:
        d_total = d_total + grads[0].double()
    standard = (3 * reach + 3) ** 2
    slope = (2 * grads[1].double().abs() * scale).unflatten(1, (groups, -1)).amax((2, 3, 4), keepdim=True)
    slope = (slope / deviation).expand_as(grouped).flatten(1, 2)
    curve = 1 + reach * scale  # the gradient of SiLU changes with what it is taken of
    map_bound = unit * standard * slope * curve.amax((1, 2, 3), keepdim=True) + EPS[total.dtype] * d_total.abs()
    sums_bound = unit * (2 * grads[1].double().abs() * standard * curve).sum((0, 2, 3))
    checks = [
        ("grad x", d_total, map_bound),
        ("grad weight", d_weight, sums_bound),
        ("grad bias", d_bias, sums_bound),
        ("grad residual", d_total, map_bound),
    ]
    for (name, exact, bound), actual in zip(checks, found, strict=False):
        assert_close(name, actual, exact, bound)
