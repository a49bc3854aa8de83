"""Random calls of `nearest_codebook`, `quantize` and `code_mixture`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oracles
from random_calls.draw import EPS, F32, F64, FLOATS, Draw, assert_close, same_bits
from titok import ops

LAYOUTS = ("gap", "step", "permuted", "expanded")


def _latents_and_codebook(draw: Draw, *, gradient: bool = False) -> dict[str, Any]:
    width, codes = draw.size(least=1, most=65), draw.size(least=1, most=130)
    leading = [draw.size(most=33) for _ in range(draw.pick(0, 1, 1, 1, 2))]
    if draw.chance(0.05):
        leading, codes = [draw.pick(97, 200)], draw.pick(513, 1000)
    dtypes = [draw.pick(F32, *FLOATS) for _ in range(2)]
    if draw.chance(0.5):
        dtypes = [F32, F32]
    codebook = draw.normal(codes, width, dtype=dtypes[1])
    latents = draw.normal(*leading, width, dtype=dtypes[0], spread=draw.pick(1, 1, 1e-3, 30))
    if draw.chance(0.3):  # equal codes, of which the first is to be chosen
        codebook[draw.bits(codes, probability=0.5)] = codebook[0].clone()
    if not gradient and draw.chance(0.2):
        values = (torch.nan, torch.inf, -torch.inf)
        latents = draw.sprinkle(latents, *values, probability=0.02)
        codebook = draw.sprinkle(codebook, *values, probability=draw.pick(0.005, 0.05, 1.0))
    return {
        "latents": draw.tensor("latents", latents, LAYOUTS, gradient=gradient),
        "codebook": draw.tensor("codebook", codebook, LAYOUTS, gradient=gradient),
        "normalize": draw.pick(True, False),
    }


def _check_indices(indices: Tensor, arguments: dict[str, Any]) -> None:
    """Each latent's code is as near as any, the first of equal ones, and one that may be chosen."""
    latents, codebook, normalize = (arguments[name] for name in ("latents", "codebook", "normalize"))
    assert indices.shape == latents.shape[:-1]
    assert indices.dtype == torch.int64
    assert bool(((indices >= 0) & (indices < len(codebook))).all())
    if indices.numel() == 0:
        return
    z, e, found = (
        latents.detach().reshape(-1, latents.shape[-1]).double(),
        codebook.detach().double(),
        indices.reshape(-1),
    )
    usable = e.float().square().sum(-1).isfinite()
    finite = z.float().square().sum(-1).isfinite()
    assert not found[~finite].any(), "a latent that is not finite has a code other than 0"
    if not usable.any():
        assert not found.any(), "no code may be chosen, and one other than 0 was"
        return
    assert bool(usable[found[finite]].all()), "a code that is not finite was chosen"
    z, found = z[finite], found[finite]
    distances = torch.from_numpy(oracles.squared_distances(z.numpy(), e[usable].numpy(), normalize))
    numbers = usable.nonzero()[:, 0]
    place = torch.searchsorted(numbers, found)
    chosen = distances.gather(1, place[:, None])[:, 0]
    unit = EPS[F64 if F64 in (latents.dtype, codebook.dtype) else F32]
    sizes = 2.0 if normalize else z.square().sum(1) + e[usable].square().sum(1).max()
    excess = chosen - distances.min(1).values
    assert bool((excess <= unit * (8 + z.shape[1] ** 0.5) * sizes).all()), (
        f"a farther code by {float(excess.max())}"
    )
    equal = (e[usable][:, None] == e[usable][None]).all(-1).int().argmax(1)  # of each code, the first equal one
    assert bool((equal[place] == place).all()), "not the first of equal codes"


def nearest_codebook(draw: Draw) -> None:
    arguments = _latents_and_codebook(draw)
    backend = draw.pick(None, None, "auto", "cpp", "plain")
    draw.note(normalize=arguments["normalize"], backend=backend)
    if draw.chance(0.1):
        draw.spoil(arguments, {})
        return draw.must_raise(lambda: ops.nearest_codebook(**arguments))
    if backend == "cpp" and F64 in (arguments["latents"].dtype, arguments["codebook"].dtype):
        backend = None
    indices = ops.nearest_codebook(**arguments, backend=backend)
    _check_indices(indices, arguments)
    draw.check_inputs()
    out = torch.full_like(indices, -1)
    assert ops.nearest_codebook(**arguments, out=out, backend=backend) is out
    assert torch.equal(out, indices)
    again, rows = ops.nearest_codebook(**arguments, return_quantized=True, backend=backend)
    assert torch.equal(again, indices)
    expected = _rows(arguments["codebook"].double(), indices, arguments["normalize"])
    assert_close("rows", rows, expected, EPS[rows.dtype] * 8)
    draw.check_inputs()


def _rows(codebook: Tensor, indices: Tensor, normalize: bool) -> Tensor:
    return _normalised(codebook[indices], normalize)


def _normalised(x: Tensor, normalize: bool) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) if normalize else x


def quantize(draw: Draw) -> None:
    arguments = _latents_and_codebook(draw, gradient=True)
    cost = draw.pick(0.25, 0.0, 2.0)
    draw.note(normalize=arguments["normalize"], cost=cost)
    if draw.chance(0.1):
        arguments["commitment_cost"] = cost
        draw.spoil(arguments, {"commitment_cost": (-1.0, float("nan"))})
        return draw.must_raise(lambda: ops.quantize(**arguments))
    latents, codebook, normalize = (arguments[name] for name in ("latents", "codebook", "normalize"))
    result = ops.quantize(**arguments, commitment_cost=cost)
    _check_indices(result.indices, arguments)
    z, e = (x.detach().double().requires_grad_() for x in (latents, codebook))
    zn, q = _normalised(z, normalize), _rows(e, result.indices, normalize)
    count = max(latents.numel(), 1)
    commitment = cost * (q.detach() - zn).square().sum() / count
    attraction = (q - zn.detach()).square().sum() / count
    unit = EPS[result.quantized.dtype]
    scale = (float(zn.detach().abs().max()) if zn.numel() else 0.0) + float(
        _normalised(e.detach(), normalize).abs().max()
    )
    assert_close("quantized", result.quantized, q, 4 * unit * scale)
    assert_close("commitment_loss", result.commitment_loss, commitment, unit * 64 * scale**2 * (1 + cost))
    assert_close("codebook_loss", result.codebook_loss, attraction, unit * 64 * scale**2)
    assert_close("loss", result.loss, commitment + attraction, unit * 64 * scale**2 * (1 + cost))
    assert torch.equal(result.counts, torch.bincount(result.indices.reshape(-1), minlength=len(codebook)))
    grad = draw.normal(*latents.shape, dtype=result.quantized.dtype)
    found = torch.autograd.grad(
        (result.quantized, result.loss), (latents, codebook), (grad, torch.ones_like(result.loss))
    )
    straight = zn + (q - zn).detach()
    exact = torch.autograd.grad(
        (straight, commitment + attraction), (z, e), (grad.double(), torch.tensor(1.0).double())
    )
    for name, actual, expected, x in zip(("grad latents", "grad codebook"), found, exact, (z, e), strict=True):
        # Dividing by the norm multiplies the gradient, and its rounding error, by its reciprocal.
        steepness = (
            1 / x.detach().square().sum(-1).sqrt().clamp_min(1e-12) if normalize and x.numel() else torch.ones(1)
        )
        largest = 1 + (float(expected.abs().max()) if expected.numel() else 0.0)
        assert_close(name, actual, expected, unit * 256 * largest * float(1 + steepness.max()))
    draw.check_inputs()


def code_mixture(draw: Draw) -> None:
    codes, width = draw.size(least=1, most=130), draw.size(least=1, most=65)
    leading = [draw.size(most=17) for _ in range(draw.pick(0, 1, 1, 2))]
    dtypes = [draw.pick(*FLOATS), draw.pick(*FLOATS)]
    gradient = draw.chance(0.4)
    logits = draw.normal(*leading, codes, dtype=dtypes[0], spread=draw.pick(1.0, 5.0))
    if not gradient and draw.chance(0.1):
        logits = draw.sprinkle(logits, -torch.inf, torch.nan, probability=0.05)
    arguments: dict[str, Any] = {
        "logits": draw.tensor("logits", logits, LAYOUTS, gradient=gradient),
        "codebook": draw.tensor(
            "codebook", draw.normal(codes, width, dtype=dtypes[1]), LAYOUTS, gradient=gradient
        ),
    }
    draw.note(gradient=gradient)
    if draw.chance(0.1):
        draw.spoil(arguments, {})
        return draw.must_raise(lambda: ops.code_mixture(**arguments))
    mixture = ops.code_mixture(**arguments, backend=draw.pick(None, "auto", "plain"))
    assert mixture.dtype == dtypes[0]
    leaf, book = (x.detach().double().requires_grad_() for x in arguments.values())
    rounded = book.to(dtypes[0]).double()
    expected = oracles.code_mixture(leaf, rounded)
    largest = float(rounded.detach().abs().max())
    unit = EPS[dtypes[0]]
    assert_close("mixture", mixture, expected, largest * unit * (4 + codes**0.5 / 4))
    draw.check_inputs()
    if not gradient or mixture.numel() == 0:
        return
    grad = draw.tensor("grad", draw.normal(*mixture.shape, dtype=dtypes[0]), LAYOUTS)
    found = torch.autograd.grad(mixture, tuple(arguments.values()), grad)
    exact = torch.autograd.grad(expected, (leaf, book), grad.double())
    slope = float(grad.double().abs().max()) * (1 + largest * width)
    for name, actual, right in zip(("grad logits", "grad codebook"), found, exact, strict=True):
        rows = max(mixture.numel() // width, 1) ** 0.5
        assert_close(name, actual, right, slope * (EPS[F32] if unit < EPS[F32] else 2 * unit) * rows)
    draw.check_inputs()
    assert same_bits(grad, grad.clone())
