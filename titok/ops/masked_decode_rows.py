"""The numbers of each row of `masked_decode_step`, checked and packed into two tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.checks import check_int, check_integer, check_number, check_tensor
from titok.ops.masked_decode_plain import POLICIES, TOP_P_ONE

_FLOAT_MAX = torch.finfo(torch.float32).max
_MOST_NATS = 1e6  # above the entropy of any number of tokens, and far from an overflow of its integer units
_MOST_FACTOR = 1e6  # above (n + 1) (1 - p) for any number n of tokens, and far from an overflow
_STEPS, _COUNTS = 1 << 31, 1 << 31


class PackedRows(NamedTuple):
    """The numbers of each row, and those of all rows."""

    integers: Tensor  # (B, 8) int64, with the columns that titok/ops/masked_decode_plain.py names
    floats: Tensor  # (B, 6) float32, likewise
    mask_token: int  # 0 where `undecided` is given
    edits: bool
    block_length: int  # 0: no blocks
    truncates: bool  # whether top_k or top_p may leave out codes


def pack_rows(
    tokens: Tensor,
    *,
    policy: str,
    mask_token: int | None = None,
    undecided: Tensor | None = None,
    count: int | Tensor = 1,
    threshold: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    window: tuple[int, int] | Tensor | None = None,
    block_length: int | None = None,
    step: int | Tensor = 0,
    seed: int | Tensor = 0,
    sample: int | Tensor = 0,
    guidance: float | Tensor = 1.0,
    softmax_temperature: float | Tensor = 1.0,
    temperature: float | Tensor = 0.0,
    noise_temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    edit_threshold: float | Tensor | None = None,
) -> PackedRows:
    """Checks and packs the numbers of `masked_decode_step`, which documents them.

    Values of CPU tensors are checked. Values of CUDA tensors are clamped into range, because reading them would make
    the host wait for the GPU.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    check_tensor("tokens", tokens, shape=("B", "N"), dtypes=(torch.int64,))
    check_choice("policy", policy, POLICIES)
    if undecided is not None:
        check_tensor("undecided", undecided, shape=tokens.shape, dtypes=(torch.bool,), device=tokens.device)
    if (mask_token is None) == (undecided is None):
        raise ValueError("mask_token: expected either mask_token or undecided, got both or none of them")
    limits = {"threshold": threshold, "entropy": entropy_bound, "factor": factor}
    if policy in limits and limits[policy] is None:
        name = "entropy_bound" if policy == "entropy" else policy
        raise ValueError(f"{name}: expected a number for policy {policy!r}, got None")
    integers = {"seed": seed, "sample": sample, "step": step, "count": count, "top_k": top_k}
    batch = len(tokens)
    columns = [_integer(name, value, tokens) for name, value in integers.items()]
    fraction = _number("top_p", top_p, tokens, 0.0, 1.0, exclude_least=True)
    if isinstance(fraction, Tensor):
        columns.append((fraction * TOP_P_ONE).to(torch.int64).clamp(0, TOP_P_ONE))
    else:
        columns.append(int(fraction * TOP_P_ONE))
    columns += _window(window, tokens)
    sample = columns[1]
    if not isinstance(sample, Tensor):
        if sample + batch > 1 << 63:
            raise ValueError(f"sample: expected sample + B <= 2^63, got {sample} + {batch}")
        columns[1] = torch.arange(batch, device=tokens.device) + sample
    whole = torch.stack([_column(value, tokens, torch.int64) for value in columns], 1)

    guidance = _number("guidance", guidance, tokens, -_FLOAT_MAX, _FLOAT_MAX)
    softmax = _number("softmax_temperature", softmax_temperature, tokens, 0.0, math.inf, exclude_least=True)
    draw = _number("temperature", temperature, tokens, 0.0, math.inf)
    noise = _number("noise_temperature", noise_temperature, tokens, 0.0, math.inf)
    nats = _at_most("entropy_bound", entropy_bound, tokens, _MOST_NATS)
    doubt = _at_most("factor", factor, tokens, _MOST_FACTOR)
    least = _log_probability("threshold", threshold, tokens)
    limit = {"entropy": nats, "factor": doubt}.get(policy, least)
    edit = _log_probability("edit_threshold", edit_threshold, tokens)
    # The divisor of the draw is rounded to float32 before its inverse is taken, as in `maskgit_decode_step`.
    inverses = (_inverse(_column(softmax, tokens, torch.float64)), _inverse(_column(draw, tokens, torch.float32)))
    values = (guidance, *inverses, noise, limit, edit)
    parts = [_column(value, tokens, torch.float32) for value in values]
    if block_length is not None and check_int("block_length", block_length) < 1:
        raise ValueError(f"block_length: expected at least 1, got {block_length}")
    return PackedRows(
        whole,
        torch.stack(parts, 1),
        mask_token=0 if mask_token is None else check_int("mask_token", mask_token),
        edits=edit_threshold is not None,
        block_length=block_length or 0,
        truncates=isinstance(top_k, Tensor) or top_k != 0 or isinstance(top_p, Tensor) or top_p != 1.0,
    )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def _column(value: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) of a number or of a tensor."""
    if isinstance(value, Tensor):
        return value.clamp(-_FLOAT_MAX, _FLOAT_MAX).to(dtype) if value.is_floating_point() else value
    if dtype == torch.float32:
        value = min(max(value, -_FLOAT_MAX), _FLOAT_MAX)
    return torch.full((tokens.shape[0],), value, dtype=dtype, device=tokens.device)


def _integer(name: str, value: Any, tokens: Tensor) -> Any:
    """One of the integers of a row, in its range; a seed becomes the signed integer of the same bits."""
    ranges = {"step": _STEPS, "count": _COUNTS, "top_k": _COUNTS, "sample": 1 << 63}
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=(len(tokens),), dtypes=(torch.int64,), device=tokens.device)
        if name == "seed":
            return value
        if value.is_cpu and value.numel() and type(value) is Tensor:
            for number in (int(value.min()), int(value.max())):
                if not 0 <= number < ranges[name]:
                    raise ValueError(f"{name}: expected integers in [0, {ranges[name]}), got {number}")
        return value.clamp(0, ranges[name] - 1)
    number = check_int(name, value)
    if name == "seed":
        seed = check_integer(name, number, 64)
        return seed - (1 << 64) if seed >> 63 else seed
    if not 0 <= number < ranges[name]:
        raise ValueError(f"{name}: expected an integer in [0, {ranges[name]}), got {number}")
    return number


def _window(window: Any, tokens: Tensor) -> list[Any]:
    length = tokens.shape[1]
    if window is None:
        return [0, length]
    if isinstance(window, Tensor):
        check_tensor("window", window, shape=(len(tokens), 2), dtypes=(torch.int64,), device=tokens.device)
        return [window[:, 0].clamp(0, length), window[:, 1].clamp(0, length)]
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window: expected a pair (start, end) or a tensor, got {type(window).__name__}")
    start, end = check_int("window", window[0]), check_int("window", window[1])
    if not 0 <= start <= end <= length:
        raise ValueError(f"window: expected 0 <= start <= end <= {length}, got {window}")
    return [start, end]


def _number(
    name: str, value: Any, tokens: Tensor, least: float, most: float, *, exclude_least: bool = False
) -> Any:
    """A float, or a float64 tensor (B,), in [least, most] and below infinity."""
    kind = f"a number in {'(' if exclude_least else '['}{least:g}, {most:g}]"
    if isinstance(value, Tensor):
        dtypes = (torch.float32, torch.float64)
        check_tensor(name, value, shape=(len(tokens),), dtypes=dtypes, device=tokens.device)
        wide = value.to(torch.float64)
        if wide.is_cpu and type(value) is Tensor:
            fits = (wide > least if exclude_least else wide >= least) & (wide <= most) & (wide < math.inf)
            if not bool(fits.all()):
                raise ValueError(f"{name}: expected {kind}, got {wide[~fits][0].item()}")
        return wide.clamp(least, min(most, _FLOAT_MAX))
    number = check_number(name, value)
    if not least <= number <= most or number == math.inf or (exclude_least and number == least):
        raise ValueError(f"{name}: expected {kind}, got {number}")
    return number


def _at_most(name: str, value: Any, tokens: Tensor, most: float) -> Any:
    """A number >= 0, lowered to `most`; 0 for None."""
    number = _number(name, 0.0 if value is None else value, tokens, 0.0, _FLOAT_MAX)
    return number.clamp_max(most) if isinstance(number, Tensor) else min(number, most)


def _inverse(temperature: Tensor) -> Tensor:
    """1 / temperature, and 0 for a temperature of 0."""
    return torch.where(temperature > 0, 1.0 / temperature.double(), 0.0)


def _log_probability(name: str, threshold: Any, tokens: Tensor) -> Any:
    """The logarithm of a probability; 0 where there is none, which no log-probability exceeds."""
    if threshold is None:
        return 0.0
    threshold = _number(name, threshold, tokens, 0.0, 1.0)
    if isinstance(threshold, Tensor):
        return threshold.log()
    return math.log(threshold) if threshold > 0.0 else -_FLOAT_MAX
