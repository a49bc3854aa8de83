"""Results of timed calls, compared with the plain path, so that a side that skips its work is reported and not timed.

A `Checked` candidate gets fresh inputs for every timed call, so that no result of an earlier call is right. The results
of some calls are kept as they are when the clock stops, and compared after the measurement.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.compiled import compiled_parts

MORE_INPUTS = 8  # that are tried until two give different results


@dataclass(frozen=True)
class Checked:
    """A candidate whose results can be compared with those of another way of computing.

    Calling it runs it once, with the inputs of seed 0.

    Attributes:
        run: what is timed.
        inputs: seed -> the arguments of `run`. Made before the clock starts. Different seeds give different results.
        expected: the plain path: the same arguments -> the right result. It is run after the measurement.
        must_be_compiled: whether it is an error if `run` does not run what `torch.compile` made.
        tolerance: how far a result may be from the right one, as a share of the distance between the right results of
            two seeds.
    """

    run: Callable[..., Any]
    inputs: Callable[[int], tuple[Any, ...]]
    expected: Callable[..., Any]
    must_be_compiled: bool = False
    tolerance: float = 0.25

    def __call__(self) -> Any:
        return self.run(*self.inputs(0))


def keeps_result(call: int) -> bool:
    """Whether the result of a call is kept: of the calls 0, 1, 2, 4, 8, ..."""
    return call & (call - 1) == 0


class NotTensors(TypeError):
    """A result contains something else than plain tensors with values."""


def snapshot(result: Any) -> list[Tensor]:
    """Copies of all tensors in a result, made at once, so that work which a side does later comes too late.

    Raises:
        NotTensors: the result contains something else than plain tensors with values, such as a promise of a result.
    """
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, tuple | list) and result:
        return [tensor for part in result for tensor in snapshot(part)]
    if type(result) is not Tensor or result.is_meta:
        raise NotTensors(f"it returns {type(result).__name__} in place of tensors that hold the result")
    return [result.detach().clone()]


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """How far two results are from each other.

    For integers of 64 bits (tokens, indices) the share of entries that differ; for other tensors the root of the mean
    squared difference. The largest over all tensors; infinite for results of different shapes and for NaN.
    """
    if [t.shape for t in first] != [t.shape for t in second]:
        return math.inf
    found = [0.0]
    for a, b in zip(first, second, strict=True):
        a, b = a.cpu(), b.cpu()
        differ = a.ne(b).double() if a.dtype == torch.int64 else (a.double() - b.double()).square()
        mean = float(differ.mean()) if differ.numel() else 0.0
        found.append(mean if a.dtype == torch.int64 else math.sqrt(mean))
    return math.inf if any(math.isnan(value) for value in found) else max(found)


def problem(candidate: Checked, kept: Mapping[int, Sequence[Tensor]]) -> str | None:
    """What is wrong with the results of a candidate, or None.

    The last result that was kept and a random one of the others are compared with the plain path.

    Args:
        kept: seed -> what the timed call with this seed returned.
    """
    if candidate.must_be_compiled and not compiled_parts(candidate):
        return "it does not run what torch.compile made"
    if len(kept) < 2:
        return None  # one result alone gives no scale for a distance
    *others, last = kept
    seeds = (random.choice(others), last)
    right = {seed: snapshot(candidate.expected(*candidate.inputs(seed))) for seed in seeds}
    scale = distance(*right.values())
    for more in range(1, MORE_INPUTS + 1):  # small models return the same for some inputs
        if scale > 0:
            break
        scale = distance(right[last], snapshot(candidate.expected(*candidate.inputs(max(kept) + more))))
    if scale == 0:
        return "the plain path returns the same for different inputs, so that the check would see no difference"
    for seed, other in (seeds, seeds[::-1]):
        off = distance(kept[seed], right[seed])
        if off > candidate.tolerance * scale:
            if distance(kept[seed], kept[other]) == 0:
                return "it returns the same result for different inputs"
            return (
                f"its result is {off / scale:.0%} as far from that of the plain path as results of two inputs are"
            )
    return None
