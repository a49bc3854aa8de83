"""Times other tile sizes of Triton kernels, at shapes of the presets: `python -m benchmarks.tune --limit 60`.

A candidate takes the place of the tile in the launcher's table while it runs. The table in `kernels/_tuning.py` is not
written. A candidate is left out where its result is not close to that of the table's tile, or where its kernel needs
more registers or shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import tables
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from titok import ops

CURRENT = "as in the table"
SECONDS = 0.3  # a candidate


class Tunable(NamedTuple):
    """What a kernel's launcher reads.

    Attributes:
        constant: the name in the modules of kernels.
        key: of the entry, where the constant is a dictionary.
        candidates: values for it. A tuple of numbers stands for a tile, see `kernels/_tuning.py`.
        calls: (device) -> calls of the op that launch the kernel, by their shape.
    """

    constant: str
    key: Any
    candidates: tuple[Any, ...]
    calls: Callable[[str], Mapping[str, Callable[[], Any]]]


def bf16(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def attention(shapes: tuple[tuple[int, int, int, int], ...], device: str) -> dict[str, Callable[[], Any]]:
    """Attention over qkv of (B, N, H, D)."""
    return {
        f"B={B} N={N} H={H} D={D}": partial(
            ops.masked_attention, bf16(device, B, N, 3 * H * D), H, backend="triton"
        )
        for B, N, H, D in shapes
    }


def group_norm(shapes: tuple[tuple[int, int, int], ...], device: str) -> dict[str, Callable[[], Any]]:
    """Group norms of channels-last maps of (B, C, pixels a side), with a residual sum."""
    calls: dict[str, Callable[[], Any]] = {}
    for B, C, side in shapes:
        x, residual = (
            bf16(device, B, C, side, side).contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        norm = partial(ops.group_norm_silu, x, 32, bf16(device, C), bf16(device, C), 1e-6, residual=residual)
        calls[f"B={B} C={C} px={side}"] = partial(norm, backend="triton")
    return calls


def mixture(rows: int, device: str) -> dict[str, Callable[[], Any]]:
    call = partial(ops.code_mixture, bf16(device, rows, 1024), bf16(device, 1024, 256), backend="triton")
    return {f"M={rows} K=1024 C=256": call}


def add_norm(rows: int, width: int, device: str) -> dict[str, Callable[[], Any]]:
    x, residual = bf16(device, rows, width), bf16(device, rows, width)
    norm = partial(
        ops.add_layer_norm, x, residual, bf16(device, width), bf16(device, width), 1e-6, backend="triton"
    )
    return {f"M={rows} D={width}": norm}


def windows(shapes: tuple[tuple[int, int, int], ...], device: str) -> dict[str, Callable[[], Any]]:
    """Placing the windows of upsampled maps of (B, C, pixels a side of the small map)."""
    calls: dict[str, Callable[[], Any]] = {}
    for B, C, side in shapes:
        wide, bias = bf16(device, B, 2 * C, side + 1, side + 1), bf16(device, C)
        result = bf16(device, B, C, 2 * side, 2 * side).contiguous(memory_format=torch.channels_last)
        read = wide.contiguous(memory_format=torch.channels_last)
        calls[f"B={B} C={C} px={side}"] = partial(placed, read, bias, result)
    return calls


def placed(read: Tensor, bias: Tensor, result: Tensor) -> Tensor:
    from titok.kernels import place_windows

    place_windows.place(read, bias, result, 1)
    return result


def gelu(rows: int, device: str) -> dict[str, Callable[[], Any]]:
    """A product with its GELU in one launch, as the generators use it at small batch sizes."""
    x, weight, bias = bf16(device, rows, 768), bf16(device, 3072, 768), bf16(device, 3072)

    def call() -> Any:
        from titok.inference import fused_linear

        return fused_linear.gelu(x, weight, bias)

    return {f"M={rows} K=768 N=3072": call}


MAPS = partial(group_norm, ((16, 256, 128), (4, 128, 512)))
# Kernel -> what its launcher reads. The kernels of one launcher have the same.
TUNABLES: dict[str, Tunable] = {
    "masked_attention_forward_tiled": Tunable(
        "MASKED_ATTENTION_FORWARD",
        (2, 64),
        (
            (64, 64, 4, 2),
            (64, 64, 4, 4),
            (128, 64, 4, 3),
            (128, 64, 8, 3),
            (128, 128, 8, 2),
            (64, 128, 4, 2),
            (32, 64, 4, 3),
        ),
        partial(attention, ((64, 289, 16, 64), (64, 321, 16, 64))),
    ),
    "masked_attention_forward_whole": Tunable(
        "MASKED_ATTENTION_FORWARD_WHOLE",
        (2, 64),
        ((32, 0, 4, 1), (32, 0, 2, 1), (64, 0, 2, 1), (64, 0, 8, 1), (16, 0, 2, 1)),
        partial(attention, ((128, 33, 16, 48), (128, 65, 16, 48))),
    ),
    "group_norm_silu_sums": Tunable(
        "GROUP_NORM_SILU_SUMS",
        None,
        ((8, 128, 4, 3), (16, 128, 4, 2), (16, 128, 4, 4), (32, 128, 4, 3), (32, 128, 8, 3), (32, 64, 4, 3)),
        MAPS,
    ),
    "group_norm_silu_normalise": Tunable(
        "GROUP_NORM_SILU_NORMALISE",
        None,
        ((16, 128, 4, 1), (32, 128, 4, 1), (64, 128, 4, 1), (128, 128, 8, 1)),
        MAPS,
    ),
    "place_windows": Tunable(
        "PLACE_WINDOWS",
        None,
        ((4, 512, 4, 1), (16, 512, 4, 1), (16, 512, 8, 1)),
        partial(windows, ((32, 128, 256), (64, 512, 32))),
    ),
    "linear_gelu": Tunable(
        "LINEAR_GELU", None, ((64, 64, 4, 4), (128, 32, 4, 5), (64, 32, 4, 4)), partial(gelu, 66)
    ),
    "group_norm_silu_one_pass": Tunable(
        "GROUP_NORM_SILU_ONE_PASS_VALUES",
        None,
        (4096, 8192, 32768),
        partial(group_norm, ((64, 512, 32), (64, 512, 16))),
    ),
    "code_mixture_forward": Tunable(
        "CODE_MIXTURE_FORWARD",
        2,
        ((64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
        partial(mixture, 64 * 1024),
    ),
    "add_layer_norm_forward": Tunable(
        "ADD_LAYER_NORM_CHANNELS_PER_WARP", None, (128, 256, 512), partial(add_norm, 64 * 321, 1024)
    ),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "kernels", nargs="*", help=f"of {', '.join(TUNABLES)}; others are named and left out (default: all)"
    )
    p.add_argument("--limit", type=float, default=300.0, help="seconds for everything (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="results file to append to (default: none)")
    return p


def holders(constant: str) -> list[Any]:
    """The modules of kernels that have this constant.

    Raises:
        LookupError: none has.
    """
    loaded = [module for name, module in sys.modules.items() if name.startswith("titok.kernels.")]
    found = [module for module in loaded if hasattr(module, constant)]
    if not found:
        raise LookupError(f"no module of kernels that is loaded has {constant}")
    return found


def with_entry(current: Any, key: Any, candidate: Any) -> Any:
    """The value of a constant with a candidate in the place of its entry `key`, or of itself where the key is None."""
    entry = current[key] if key is not None else current
    if isinstance(candidate, tuple):
        if hasattr(entry, "_fields"):  # a tile
            value = type(entry)(*candidate)
        else:  # tiles with the most columns that each of them holds
            value = tuple((most, type(tile)(*candidate)) for most, tile in entry)
    else:
        value = candidate
    return value if key is None else {**current, key: value}


@contextmanager
def in_place(constant: str, value: Any) -> Iterator[None]:
    """Within, the launchers of this process read `value`."""
    modules = holders(constant)
    before = [getattr(module, constant) for module in modules]
    for module in modules:
        setattr(module, constant, value)
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            setattr(module, constant, old)


def is_close(result: Any, reference: Any) -> bool:
    """Whether results in bfloat16 agree within the rounding of their largest numbers."""
    pairs = zip(result, reference, strict=True) if isinstance(result, tuple) else [(result, reference)]
    return all(
        bool((a.float() - b.float()).abs().max() <= 2**-6 * b.float().abs().max().clamp(min=1)) for a, b in pairs
    )


def tune(kernel: str, results: Results, device: str, *, end: float) -> None:
    """Times the candidates of one kernel, writes a row for each shape, and prints a table of it."""
    tunable = TUNABLES[kernel]
    for shape, call in tunable.calls(device).items():
        if time.monotonic() > end:
            print(f"{kernel} {shape}: no time left")
            continue
        with torch.no_grad():
            reference = call()
            current = getattr(holders(tunable.constant)[0], tunable.constant)

            def run_with(value: Any, call: Callable[[], Any] = call) -> Any:
                with in_place(tunable.constant, value):
                    return call()

            runs: dict[str, Callable[[], Any]] = {CURRENT: call}
            for candidate in tunable.candidates:
                value = with_entry(current, tunable.key, candidate)
                try:
                    close = is_close(run_with(value), reference)
                except Exception as error:  # too many registers, too much shared memory, no compilation
                    print(f"{kernel} {shape} {candidate}: {type(error).__name__}: {error}".splitlines()[0])
                    continue
                if close:
                    runs[str(candidate)] = partial(run_with, value)
                else:
                    print(f"{kernel} {shape} {candidate}: the result differs")
            samples = interleave(runs, SECONDS * len(runs), warm=True, hide_launches=True)
        row = results.row("tuning", {"kernel": kernel, "constant": tunable.constant, "shape": shape}, samples)
        tables.show(*tables.tuning_table([row]))


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune: no CUDA device here")
    end = time.monotonic() + arguments.limit
    results, tuned = Results(arguments.json), set()
    for kernel in arguments.kernels or TUNABLES:
        if kernel not in TUNABLES:
            print(f"{kernel}: it has no tile to be tuned here")
            results.note(f"{kernel} has no tile to be tuned")
        elif TUNABLES[kernel].constant not in tuned:
            tuned.add(TUNABLES[kernel].constant)
            tune(kernel, results, "cuda", end=end)


if __name__ == "__main__":
    main()
