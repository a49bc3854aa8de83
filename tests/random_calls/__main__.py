"""The command: `python -m random_calls --calls 20000` in the folder tests/."""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from random_calls import attention, decode, norms, quantizers, raw
from random_calls.draw import Draw
from titok.ops.core.available import extension, why_no_cpp

CALLS: dict[str, Callable[[Draw], None]] = {
    "add_layer_norm": norms.add_layer_norm,
    "group_norm_silu": norms.group_norm_silu,
    "masked_attention": attention.masked_attention,
    "nearest_codebook": quantizers.nearest_codebook,
    "quantize": quantizers.quantize,
    "code_mixture": quantizers.code_mixture,
    "maskgit_decode_step": decode.maskgit_decode_step,
    "masked_decode_step": decode.masked_decode_step,
    "extension_function": raw.extension_function,
    "registered_op": raw.registered_op,
}
HOST_KERNELS = ("cuda_kernel_on_host", "masked_cuda_kernels_on_host")


def make_call(
    seed: int, number: int, calls: Mapping[str, Callable[[Draw], None]] = CALLS
) -> tuple[str, str | None]:
    """Makes call `number` of a seed and checks it. Returns which it was, and what is wrong or None.

    A call of a function that is not in `calls` is left out.
    """
    draw = Draw(seed, number)
    name = draw.pick(*CALLS, *HOST_KERNELS)
    if name not in calls:
        return "", None
    threads = draw.pick(1, 1, 2, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    draw.note(threads=threads)
    try:
        calls[name](draw)
    except Exception as error:
        where = traceback.format_exc(limit=-3)
        chosen = "\n".join(f"  {key}: {value}" for key, value in draw.story.items())
        return name, f"{name}, call {number} of seed {seed}: {error}\n{chosen}\n{where}"
    finally:
        torch.set_num_threads(before)
    return name, None


def main() -> int:
    parser = argparse.ArgumentParser(prog="random_calls", description="Random calls of every op of titok.")
    parser.add_argument("--calls", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first call; with --calls 1, one call alone"
    )
    parser.add_argument(
        "--op", choices=(*CALLS, *HOST_KERNELS), action="append", help="only this op; may be given more than once"
    )
    parser.add_argument("--cuda-host", type=Path, help="also call this host build of the CUDA kernels")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many (default: %(default)s)")
    parser.add_argument("--progress", type=Path, help="a file that holds the number of the call that runs")
    options = parser.parse_args()
    calls = {name: call for name, call in CALLS.items() if options.op is None or name in options.op}
    if options.cuda_host:
        from cuda_host import host_kernel, masked_kernel

        on_host = (
            functools.partial(decode.cuda_kernel_on_host, kernel=host_kernel.load(options.cuda_host)),
            functools.partial(decode.masked_cuda_kernels_on_host, kernel=masked_kernel.load(options.cuda_host)),
        )
        named = zip(HOST_KERNELS, on_host, strict=True)
        calls |= {name: call for name, call in named if options.op is None or name in options.op}
    if missing := why_no_cpp():
        sys.exit(f"random_calls: {missing}")
    print(f"random calls of seed {options.seed}, C++ kernels: {extension().cpu_isa()}", flush=True)
    progress = os.open(options.progress, os.O_CREAT | os.O_WRONLY, 0o644) if options.progress else None
    begin, counts, failures = time.monotonic(), collections.Counter(), 0
    for number in itertools.count(options.first):
        made = sum(counts.values())
        if made == options.calls or time.monotonic() - begin > options.seconds or failures == options.failures:
            break
        if progress is not None:
            os.pwrite(progress, f"{number}\n".encode(), 0)
        name, wrong = make_call(options.seed, number, calls)
        if name:
            counts[name] += 1
        if wrong is not None:
            failures += 1
            print(wrong, flush=True)
    each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    seconds = time.monotonic() - begin
    print(f"{made} calls in {seconds:.0f} s, {failures} wrong: {each}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
