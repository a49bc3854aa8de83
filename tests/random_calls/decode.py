"""Random calls of both decode steps, and of the host build of their CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracles
from decode_cases import random_call, random_split, split_step
from maskgit_cases import random_case
from random_calls.draw import Draw, same_bits
from titok import ops

LARGEST = np.finfo(np.float32).max
NUMBERS = {
    "step": (-1, 9, 1 << 40),
    "seed": (-1, 1 << 64),
    "first_sample": (-1, 1 << 63),
    "num_masked": (-1,),
    "guidance": (float("nan"), float("inf")),
    "softmax_temperature": (0.0, -1.0, float("nan"), float("inf")),
    "noise_temperature": (-1.0, float("nan"), float("inf")),
    "confidence": ("other", None),
}


def _expected(
    logits: tuple[np.ndarray, np.ndarray | None], numbers: dict[str, Any], sample: int, position: int
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Of one masked position: the logits (V,), the uniform number of its draw, the noise of its confidence, and the
    probabilities (V,)."""
    cond, uncond = logits
    f32 = np.float32
    with np.errstate(all="ignore"):
        guided = cond
        if uncond is not None and numbers["guidance"] != 1.0:
            guided = uncond + (cond - uncond) * f32(numbers["guidance"])
        y = guided * f32(1.0 / numbers["softmax_temperature"])
        y = np.nan_to_num(y, nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)
        temperature = f32(min(numbers["noise_temperature"], float(LARGEST)))
        scale = f32(1.0)
        if numbers["confidence"] == "titok":
            scale = f32(min(1.0 / float(temperature), float(LARGEST))) if temperature > 0 else f32(0.0)
        weights = (
            np.exp(((y - y.max()) * scale).astype(np.float64)) if scale > 0 else (y == y.max()).astype(np.float64)
        )
    number = numbers["first_sample"] + sample
    counter = (position, numbers["step"], number % 2**32, number >> 32)
    words = oracles.philox4x32(counter, (numbers["seed"] % 2**32, numbers["seed"] >> 32))
    uniform = (words[0] * 2**32 + words[1]) / 2**64
    gumbel = -math.log(-math.log(((words[2] >> 9) + 0.5) / 2**23))
    return y, uniform, gumbel * float(temperature), weights / weights.sum()


def check_step(case: dict[str, Any], new: Tensor, confidence: Tensor) -> None:
    """Every code is the one that its uniform number stands for, and the least confident positions stay masked."""
    tokens, numbers, mask_token = case["tokens"], case["numbers"], case["mask_token"]
    assert new.shape == confidence.shape == tokens.shape
    for b in range(tokens.shape[0]):
        masked = [n for n in range(tokens.shape[1]) if tokens[b, n] == mask_token]
        keep = min(int(case["keep"][b]), len(masked))
        order = sorted(masked, key=lambda n: (float(confidence[b, n]), n))
        for n in range(tokens.shape[1]):
            code, score = int(new[b, n]), float(confidence[b, n])
            if n not in masked:
                assert (code, score) == (int(tokens[b, n]), math.inf), f"known position {(b, n)} was touched"
                continue
            y, uniform, noise, probabilities = _expected(case["logits"](b, n), numbers, b, n)
            if n in order[:keep]:
                assert code == mask_token, f"position {(b, n)} should have stayed masked"
                continue
            assert code != mask_token, f"position {(b, n)} should have been decided"
            assert 0 <= code < len(y)
            greedy = numbers["confidence"] == "titok" and numbers["noise_temperature"] < 1e-45
            if greedy:
                assert code == int(np.argmax(y)), f"position {(b, n)}: code {code} is not the likeliest"
            else:
                low, high = probabilities[:code].sum(), probabilities[: code + 1].sum()
                slack = 2e-6 + len(y) * 2.0**-30
                assert low - slack <= uniform <= high + slack, f"position {(b, n)}: {uniform} draws no code {code}"
            base = y[code] if numbers["confidence"] == "titok" else math.log(max(probabilities[code], 1e-300))
            exact = float(base) + noise
            if max(abs(exact), abs(noise)) > 3e38:  # in float32 this overflows, or nearly
                assert not abs(score) < 1e30
                continue
            slack = 1e-5 * (1 + abs(float(base)) + abs(noise)) + 1e-6 * numbers["noise_temperature"]
            assert abs(score - exact) <= slack, f"confidence at {(b, n)}: {score}, not {exact}"


# ---------------------------------------------------------------------------------------------------------------


def _case(draw: Draw, codes: tuple[int, ...], most_tokens: int) -> dict[str, Any]:
    (tokens, cond, uncond), numbers = random_case(draw.random.getrandbits(31), codes, most_tokens)
    mask_token = numbers.pop("mask_token")
    other = draw.pick(mask_token, mask_token, -1, mask_token + 7, 1 << 62, -(1 << 63))
    tokens = tokens.masked_fill(tokens == mask_token, other)
    if draw.chance(0.05):
        empty = draw.pick(0, 1)
        tokens, cond = tokens.narrow(empty, 0, 0), cond.narrow(empty, 0, 0)
        uncond = None if uncond is None else uncond.narrow(empty, 0, 0)
    draw.note(**numbers, mask_token=other)
    return {"tokens": tokens, "cond": cond, "uncond": uncond, "numbers": numbers, "mask_token": other}


def maskgit_decode_step(draw: Draw) -> None:
    large = draw.chance(0.04)
    case = _case(draw, (4096,) if large else (1, 2, 3, 7, 8, 17, 40, 255, 513, 1031), 20 if large else 9)
    numbers, batch, length = case["numbers"], *case["tokens"].shape
    packed = draw.chance(0.3)
    arguments: dict[str, Any] = {"mask_token": case["mask_token"]}
    by_rows = draw.chance(0.3) and case["cond"].numel() > 0
    for name in ("cond", "uncond"):
        logits = case[name]
        if logits is None:
            continue
        if by_rows:  # any rows, some of them used twice, some not at all
            logits = logits.flatten(0, 1)
            index = torch.randint(len(logits), (batch, length), generator=draw.generator)
            case[f"{name}_rows"] = index
            unused = draw.pick(-1, -(1 << 62), 1 << 40)  # at known positions no row is read
            index = torch.where(case["tokens"] == case["mask_token"], index, unused)
            arguments["rows" if name == "cond" else "uncond_rows"] = draw.tensor(name + "_rows", index, ("step",))
        wide = draw.tensor(name, logits, ("gap", "expanded") if logits.shape[-1] > 1 else ("step", "gap"))
        if logits.shape[-1] > 1 and wide.stride(-1) == 0:  # codes must be neighbours
            wide = draw.tensor(name, logits)
        case[name] = arguments[f"{name}_logits"] = wide
    arguments["tokens"] = draw.tensor("tokens", case["tokens"], ("step", "permuted"))
    keep = numbers["num_masked"]
    case["keep"] = torch.full((batch,), keep)
    if draw.chance(0.3):
        case["keep"] = torch.randint(0, length + 2, (batch,), generator=draw.generator)
        arguments["num_masked"] = draw.tensor("num_masked", case["keep"], ("step",))
    backend = draw.pick(None, None, "auto", "cpp", "plain")
    draw.note(packed=packed, backend=backend)
    step_numbers = dict(numbers)
    if packed:
        arguments["confidence"] = numbers["confidence"]
        arguments["params"] = draw.tensor("params", ops.pack_step_params(**numbers), ("step",))
    else:
        if "num_masked" in arguments:
            del step_numbers["num_masked"]
        arguments |= step_numbers
    op: Callable[..., Any] = ops.maskgit_decode_step_packed if packed else ops.maskgit_decode_step
    if draw.chance(0.15):
        return _check_wrong(draw, op, arguments, case)
    new, confidence = op(**arguments, return_confidence=True, backend=backend)
    case["logits"] = lambda b, n: tuple(_row(case, name, b, n) for name in ("cond", "uncond"))
    if not (packed is False and "num_masked" not in numbers):
        check_step(case, new, confidence)
    draw.check_inputs()
    out = torch.full_like(case["tokens"], -7, memory_format=torch.contiguous_format)
    in_place = arguments["tokens"].is_contiguous() and draw.chance(0.5)
    target = arguments["tokens"] if in_place else out
    again, scores = op(**arguments, out=target, return_confidence=True, backend=backend)
    assert again is target
    assert torch.equal(again, new)
    assert same_bits(scores, confidence)
    draw.check_inputs("tokens" if in_place else "")


def _row(case: dict[str, Any], name: str, b: int, n: int) -> np.ndarray | None:
    logits = case[name]
    if logits is None:
        return None
    rows = case.get(f"{name}_rows")
    row = logits[b, n] if rows is None else logits[rows[b, n]]
    values: np.ndarray = row.float().numpy()
    return values


def _check_wrong(draw: Draw, op: Callable[..., Any], arguments: dict[str, Any], case: dict[str, Any]) -> None:
    """A wrong argument, or an index out of range in one of the tensors."""
    tokens, codes = arguments["tokens"], case["cond"].shape[-1]
    masked = tokens == case["mask_token"]
    kinds = ["argument"]
    if tokens.numel() and not masked.all():
        kinds.append("token")
    if masked.any() and "rows" in arguments:
        kinds.append("row")
    if tokens.numel() and isinstance(arguments.get("num_masked"), Tensor):
        kinds.append("count")
    match draw.pick(*kinds):
        case "token":
            at = draw.random.choice((~masked).nonzero().tolist())
            bad = draw.pick(codes, codes + 1, -2, 1 << 61)
            if bad == case["mask_token"]:
                return
            arguments["tokens"] = tokens.clone()
            arguments["tokens"][tuple(at)] = bad
        case "row":
            arguments["rows"] = arguments["rows"].clone()
            arguments["rows"][masked] = draw.pick(-1, len(case["cond"]), 1 << 61)
        case "count":
            arguments["num_masked"] = torch.full_like(arguments["num_masked"], -1)
        case _:
            wrong = {name: values for name, values in NUMBERS.items() if name in arguments}
            wrong |= {"mask_token": (0, codes - 1)}
            if "params" not in arguments:  # then it may be a tensor or an int
                wrong["num_masked"] = (-1,)
            draw.spoil(arguments, wrong, ["uncond_logits", "rows", "uncond_rows", "num_masked"])
    draw.must_raise(lambda: op(**arguments))


def cuda_kernel_on_host(draw: Draw, kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """`kernel` is tests/cuda_host/host_kernel.py's."""
    threads, rounds = draw.pick((64, 0), (64, 1), (64, 3), (256, 2))
    most = threads * 8 * rounds or 1031
    codes = tuple(v for v in (1, 2, 7, 8, 40, 255, 256, 513, 1031, most) if v <= most)
    case = _case(draw, codes, 5)
    draw.note(threads=threads, rounds=rounds)
    numbers = case["numbers"]
    tensors = tuple(
        draw.tensor(n, case[n], ("gap",), aligned=True) if case[n] is not None else None
        for n in ("cond", "uncond")
    )
    case["cond"], case["uncond"] = tensors
    case["keep"] = torch.full((len(case["tokens"]),), numbers["num_masked"])
    if case["tokens"].numel() == 0:
        return
    arguments = {**numbers, "mask_token": case["mask_token"]}
    order = draw.pick(0, 1, 2)
    new, confidence = kernel(((case["tokens"], *tensors), arguments), threads, rounds, order)
    case["logits"] = lambda b, n: tuple(_row(case, name, b, n) for name in ("cond", "uncond"))
    check_step(case, new, confidence)
    draw.check_inputs()


def masked_decode_step(draw: Draw) -> None:
    """A random call in C++, whole and with its codes split, against plain PyTorch."""
    tensors, arguments = random_call(draw.random.getrandbits(31), most_tokens=8)
    draw.note(shape=tuple(tensors[1].shape), **{k: v for k, v in arguments.items() if not isinstance(v, Tensor)})
    want = ops.masked_decode_step(*tensors, **arguments, backend="plain")
    slices = random_split(tensors[1].shape[-1], draw.random)
    for got in (
        ops.masked_decode_step(*tensors, **arguments, backend="cpp"),
        split_step(tensors, arguments, slices, "cpp"),
    ):
        for name, expected, found in zip(want._fields, want, got, strict=True):
            assert (expected is None) == (found is None), name
            assert expected is None or torch.equal(expected, found), f"{name}: {found}, not {expected}"


def masked_cuda_kernels_on_host(draw: Draw, kernel: Callable[..., ops.DecodeStep]) -> None:
    """`kernel` is tests/cuda_host/masked_kernel.py's."""
    tensors, arguments = random_call(draw.random.getrandbits(31), codes=(1, 7, 256, 1031), most_tokens=2)
    draw.note(shape=tuple(tensors[1].shape), **{k: v for k, v in arguments.items() if not isinstance(v, Tensor)})
    want = ops.masked_decode_step(*tensors, **arguments, backend="plain")
    got = kernel(tensors, arguments, draw.pick(256, 512, 1280), draw.pick(0, 1, 2))
    for name, expected, found in zip(want._fields, want, got, strict=True):
        assert expected is None or torch.equal(expected, found), f"{name}: {found}, not {expected}"
