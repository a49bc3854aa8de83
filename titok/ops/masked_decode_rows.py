"""The arguments of `masked_decode_step`: logits checked, the numbers of each row packed into two tensors."""

from __future__ import annotations

import math
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.checks import check_int, check_integer, check_number, check_tensor
from titok.ops.masked_decode_plain import POLICIES, SAMPLE, TOP_P_ONE

MAX_CODES = 262_144  # so that the sum of the weights stays within 2^48
MAX_TOKENS = 4_096
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FLOAT_MAX = torch.finfo(torch.float32).max
_MOST_NATS = 1e6  # above the entropy of any number of tokens, and far from an overflow of its integer units
_MOST_FACTOR = 1e6  # above (n + 1) (1 - p) for any number n of tokens, and far from an overflow
_STEPS, _COUNTS = 1 << 31, 1 << 31


def check_logits(a: Any) -> None:
    """Checks `tokens`, `cond_logits`, `uncond_logits`, `rows` and `uncond_rows` of the arguments of a decode step.

    Shapes, dtypes and devices; nothing that would make the host wait for a GPU.
    """
    check_tensor("tokens", a.tokens, shape=("B", "N"), dtypes=(torch.int64,))
    if a.tokens.shape[1] > MAX_TOKENS:
        raise ValueError(f"tokens: expected at most {MAX_TOKENS} per row, got {a.tokens.shape[1]}")
    check_logits_at(a, a.tokens.shape, a.tokens.device)
    codes = a.cond_logits.shape[-1]
    if not 1 <= codes <= MAX_CODES:
        raise ValueError(f"cond_logits: expected 1 <= V <= {MAX_CODES}, got V = {codes}")


def check_logits_at(a: Any, positions: tuple[int, ...], device: torch.device) -> None:
    """Checks the logits of the arguments of a decode step, and their rows, for (B, N) positions."""
    if a.rows is None and a.uncond_rows is not None:
        raise ValueError("uncond_rows: expected None without rows, got a tensor")
    leading: tuple[int | str, ...] = tuple(positions) if a.rows is None else ("R",)
    check_tensor("cond_logits", a.cond_logits, shape=(*leading, "V"), dtypes=LOGIT_DTYPES, device=device)
    codes = a.cond_logits.shape[-1]
    if a.uncond_logits is not None:
        dtypes = (a.cond_logits.dtype,)
        check_tensor("uncond_logits", a.uncond_logits, shape=(*leading, codes), dtypes=dtypes, device=device)
    for name, logits in (("cond_logits", a.cond_logits), ("uncond_logits", a.uncond_logits)):
        if logits is not None and codes > 1 and logits.numel() and logits.stride(-1) != 1:
            raise ValueError(f"{name}: expected stride 1 along V, got strides {logits.stride()}")
    for name, index in (("rows", a.rows), ("uncond_rows", a.uncond_rows)):
        if index is not None:
            check_tensor(name, index, shape=positions, dtypes=(torch.int64,), device=device)


def check_row_values(a: Any, read: Tensor, kind: str) -> None:
    """Checks the rows of the logits at the positions `read`, (B, N) bool. Only on a CPU can they be read at no cost."""
    pairs = (("rows", a.rows, a.cond_logits), ("uncond_rows", a.uncond_rows, a.uncond_logits))
    for name, index, logits in pairs:
        if index is not None and logits is not None:
            used = index[read]
            if used.numel() and (int(used.min()) < 0 or int(used.max()) >= logits.shape[0]):
                raise ValueError(f"{name}: expected rows in [0, {logits.shape[0]}) at {kind} positions")


def contiguous_but_logits(a: Any) -> Any:
    """The arguments with contiguous tensors, but for the logits, whose strides the kernels take."""
    given = {
        name: value.contiguous()
        for name, value in zip(a._fields, a, strict=True)
        if isinstance(value, Tensor) and not value.is_contiguous() and name not in ("cond_logits", "uncond_logits")
    }
    return a._replace(**given) if given else a


class PackedRows(NamedTuple):
    """The numbers of each row, and those of all rows."""

    integers: Tensor  # (B, 8) int64, with the columns that titok/ops/masked_decode_plain.py names
    floats: Tensor  # (B, 6) float32, likewise
    mask_token: int  # 0 where `undecided` is given
    edits: bool
    block_length: int  # 0: no blocks
    truncates: bool  # whether top_k or top_p may leave out codes


class RowNumbers(NamedTuple):
    """Arguments of `masked_decode_step`, which documents them: one value for all rows, or (B,) tensors."""

    mask_token: int | None
    undecided: Tensor | None
    count: int | Tensor  # type: ignore[assignment]  # it replaces the method of tuples, which nothing calls
    threshold: float | Tensor | None
    entropy_bound: float | Tensor | None
    factor: float | Tensor | None
    window: tuple[int, int] | Tensor | None
    block_length: int | None
    step: int | Tensor
    seed: int | Tensor
    sample: int | Tensor
    guidance: float | Tensor
    softmax_temperature: float | Tensor
    temperature: float | Tensor
    noise_temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    edit_threshold: float | Tensor | None


def pack_rows(tokens: Tensor, policy: str, given: RowNumbers) -> PackedRows:
    """Checks and packs the numbers of `masked_decode_step`, which documents them.

    Values of CPU tensors are checked. Values of CUDA tensors are clamped into range, because reading them would make
    the host wait for the GPU.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
    """
    check_tensor("tokens", tokens, shape=("B", "N"), dtypes=(torch.int64,))
    check_choice("policy", policy, POLICIES)
    if given.undecided is not None:
        check_tensor("undecided", given.undecided, shape=tokens.shape, dtypes=(torch.bool,), device=tokens.device)
    if (given.mask_token is None) == (given.undecided is None):
        raise ValueError("mask_token: expected either mask_token or undecided, got both or none of them")
    limits = {"threshold": given.threshold, "entropy": given.entropy_bound, "factor": given.factor}
    if policy in limits and limits[policy] is None:
        name = "entropy_bound" if policy == "entropy" else policy
        raise ValueError(f"{name}: expected a number for policy {policy!r}, got None")
    names = ("seed", "sample", "step", "count", "top_k")
    batch = len(tokens)
    columns = [_integer(name, getattr(given, name), tokens) for name in names]
    fraction = _number("top_p", given.top_p, tokens, 0.0, 1.0, exclude_least=True)
    if isinstance(fraction, Tensor):
        columns.append((fraction * TOP_P_ONE).to(torch.int64).clamp(0, TOP_P_ONE))
    else:
        columns.append(int(fraction * TOP_P_ONE))
    columns += _window(given.window, tokens)
    if not isinstance(columns[SAMPLE], Tensor) and columns[SAMPLE] + batch > 1 << 63:
        raise ValueError(f"sample: expected sample + B <= 2^63, got {columns[SAMPLE]} + {batch}")
    whole = _stack(columns, tokens, torch.int64, None if isinstance(columns[SAMPLE], Tensor) else SAMPLE)

    guidance = _number("guidance", given.guidance, tokens, -_FLOAT_MAX, _FLOAT_MAX)
    softmax = _number("softmax_temperature", given.softmax_temperature, tokens, 0.0, math.inf, exclude_least=True)
    draw = _number("temperature", given.temperature, tokens, 0.0, math.inf)
    # The divisor of the draw is rounded to float32 before its inverse is taken, as in `maskgit_decode_step`.
    draw = draw.to(torch.float32) if isinstance(draw, Tensor) else nearest_float32(draw)
    noise = _number("noise_temperature", given.noise_temperature, tokens, 0.0, math.inf)
    nats = _at_most("entropy_bound", given.entropy_bound, tokens, _MOST_NATS)
    doubt = _at_most("factor", given.factor, tokens, _MOST_FACTOR)
    least = _log_probability("threshold", given.threshold, tokens)
    limit = {"entropy": nats, "factor": doubt}.get(policy, least)
    edit = _log_probability("edit_threshold", given.edit_threshold, tokens)
    values = [guidance, _inverse(softmax), _inverse(draw), noise, limit, edit]
    if given.block_length is not None and check_int("block_length", given.block_length) < 1:
        raise ValueError(f"block_length: expected at least 1, got {given.block_length}")
    return PackedRows(
        whole,
        _stack(values, tokens, torch.float32),
        mask_token=0 if given.mask_token is None else check_int("mask_token", given.mask_token),
        edits=given.edit_threshold is not None,
        block_length=given.block_length or 0,
        truncates=isinstance(given.top_k, Tensor)
        or given.top_k != 0
        or isinstance(given.top_p, Tensor)
        or given.top_p != 1.0,
    )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def nearest_float32(value: float) -> float:
    """The nearest float32, ties to even. Arithmetic that torch.compile can trace, which `struct` is not."""
    value = min(max(value, -_FLOAT_MAX), _FLOAT_MAX)
    spacing = max(math.frexp(value)[1] - 24, -149)  # exponent of the distance between the float32 around the value
    return math.ldexp(round(math.ldexp(value, -spacing)), spacing)


def _stack(columns: list[Any], tokens: Tensor, dtype: torch.dtype, counted: int | None = None) -> Tensor:
    """(B, K) of K numbers or tensors (B,), floats clamped to those of float32; column `counted` grows by 1 a row."""
    batch = tokens.shape[0]
    if dtype == torch.float32:
        columns = [
            c.clamp(-_FLOAT_MAX, _FLOAT_MAX) if isinstance(c, Tensor) else min(max(c, -_FLOAT_MAX), _FLOAT_MAX)
            for c in columns
        ]
    is_eager = type(tokens) is Tensor and tokens.is_cpu and not torch.compiler.is_compiling()
    if is_eager and batch > 0 and not any(isinstance(c, Tensor) for c in columns):
        # Few microseconds; the ops below take some each.
        rows = array("q" if dtype == torch.int64 else "f", columns * batch)
        if counted is not None:
            for b in range(batch):
                rows[b * len(columns) + counted] += b
        return torch.frombuffer(rows, dtype=dtype).view(batch, -1)
    full = [
        c.to(dtype) if isinstance(c, Tensor) else torch.full((batch,), c, dtype=dtype, device=tokens.device)
        for c in columns
    ]
    if counted is not None:
        full[counted] = full[counted] + torch.arange(batch, device=tokens.device)
    return torch.stack(full, 1)


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


def _inverse(temperature: Any) -> Any:
    """1 / temperature, and 0 for a temperature of 0."""
    if isinstance(temperature, Tensor):
        return torch.where(temperature > 0, 1.0 / temperature.double(), 0.0)
    return 1.0 / temperature if temperature > 0.0 else 0.0


def _log_probability(name: str, threshold: Any, tokens: Tensor) -> Any:
    """The logarithm of a probability; 0 where there is none, which no log-probability exceeds."""
    if threshold is None:
        return 0.0
    threshold = _number(name, threshold, tokens, 0.0, 1.0)
    if isinstance(threshold, Tensor):
        return threshold.log()
    return math.log(threshold) if threshold > 0.0 else -_FLOAT_MAX
