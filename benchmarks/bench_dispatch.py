"""What PyTorch's dispatcher adds to a call of an op: `python -m benchmarks.bench_dispatch`.

Each op is timed on inputs so small that a call is all overhead, in two ways: as eager code without gradients calls
it, which goes around the dispatcher, and inside `titok.ops.through_dispatcher()`, which calls the registered op.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness.results import Results, quantiles
from benchmarks.harness.timing import interleave
from titok import ops

CALLS = 20  # in one sample


def cases(device: str) -> dict[str, Callable[[], Any]]:
    """Op -> one call on tiny inputs."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    decode_step = partial(ops.maskgit_decode_step, step=0, steps=2, num_masked=2, mask_token=16)
    image = randn(1, 32, 4, 4).to(memory_format=torch.channels_last)
    return {
        "nearest_codebook": partial(ops.nearest_codebook, randn(4, 12), randn(16, 12)),
        "masked_attention": partial(ops.masked_attention, randn(1, 4, 3 * 64), 1),
        "code_mixture": partial(ops.code_mixture, randn(4, 16), randn(16, 16)),
        "group_norm_silu": partial(ops.group_norm_silu, image, 8, randn(32), randn(32), 1e-6),
        "add_layer_norm": partial(ops.add_layer_norm, randn(4, 64), randn(4, 64), randn(64), randn(64), 1e-5),
        "maskgit_decode_step": partial(decode_step, torch.full((1, 4), 16, device=device), randn(1, 4, 16)),
    }


def repeated(call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        call()


def dispatched(call: Callable[[], Any]) -> None:
    with ops.through_dispatcher():
        repeated(call)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=3.0, help="for each op (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="results file to append to (default: none)")
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)  # with more, waking them for inputs this small would be most of the time
    results = Results(arguments.json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("microseconds a call, medians of interleaved runs")
    print(f"{'op':20}{'backend':>10}{'eager path':>12}{'dispatcher':>12}{'difference':>12}")
    for op, call in cases(device).items():
        candidates = {"eager": partial(repeated, call), "dispatched": partial(dispatched, call)}
        with torch.no_grad():
            samples = interleave(candidates, arguments.seconds)
        backend = ops.last_backend(op) or ""
        results.row("dispatch", {"op": op, "calls": CALLS, "backend": backend}, samples)
        eager, slow = (quantiles(samples[name])[0] / CALLS * 1e6 for name in ("eager", "dispatched"))
        print(f"{op:20}{backend:>10}{eager:12.1f}{slow:12.1f}{slow - eager:12.1f}")


if __name__ == "__main__":
    main()
