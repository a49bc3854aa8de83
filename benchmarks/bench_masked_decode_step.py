"""`masked_decode_step` against the schedulers of diffusers: `python -m benchmarks.bench_masked_decode_step`.

Each scheduler's step runs on the same float32 logits as titok's, in turns in one process. Peak extra memory is the
growth of the process's largest resident set over one call, measured once before the timings. On a busy machine
`--cpu-time` counts the seconds that the process ran, which suits one thread.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titok.ops import masked_decode_step


def pairs(tokens: Tensor, logits: Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By scheduler: titok's step and the scheduler's."""
    import diffusers

    mask = logits.shape[-1]
    refinement = diffusers.BlockRefinementScheduler(block_length=tokens.shape[1])
    refinement.set_timesteps(8)
    entropy = diffusers.EntropyBoundScheduler(num_inference_steps=8)
    amused = diffusers.AmusedScheduler(mask_token_id=mask)
    amused.set_timesteps(8)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)

    def ours(**arguments: Any) -> Callable[[], Any]:
        return lambda: masked_decode_step(tokens, logits, **arguments)

    noisy = {"temperature": 1.0, "noise_temperature": 2.0}
    return {
        "AmusedScheduler": (
            ours(policy="count", count=tokens.shape[1] // 2, mask_token=mask, **noisy),
            lambda: amused.step(logits, 7, tokens),
        ),
        "BlockRefinementScheduler": (
            ours(policy="threshold", threshold=0.9, count=4, mask_token=mask),
            lambda: refinement.step(logits, 0, tokens, mask_token_id=mask, threshold=0.9),
        ),
        "BlockRefinementScheduler, top-p 0.9": (
            ours(policy="threshold", threshold=0.9, count=4, mask_token=mask, temperature=1.0, top_p=0.9),
            lambda: refinement.step(
                logits, 0, tokens, mask_token_id=mask, threshold=0.9, temperature=1.0, top_p=0.9
            ),
        ),
        "EntropyBoundScheduler": (
            ours(
                policy="entropy",
                entropy_bound=0.1,
                undecided=everywhere,
                temperature=1.0,
                softmax_temperature=0.8,
                renoise=True,
            ),
            lambda: entropy.step(logits, 0, tokens),
        ),
    }


def peak_growth(run: Callable[[], Any]) -> float:
    """MiB by which a call raises the largest resident set; 0 where an earlier call of the process used more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--codes", type=int, nargs="+", default=[4096, 126_464])
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", help="only this scheduler, by its name in the table")
    options.add_argument(
        "--decided", type=int, default=0, help="tokens of each row that are decided before the step"
    )
    options.add_argument("--cpu-time", action="store_true", help="time of the process in place of wall-clock time")
    return options


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print("codes, batch, scheduler: titok ms, scheduler ms, ratio; titok MiB, scheduler MiB beyond the inputs")
    for codes in options.codes:
        for batch in options.batch:
            logits = 3 * torch.randn(batch, options.tokens, codes)
            tokens = torch.full((batch, options.tokens), codes)
            tokens[:, : options.decided] = 1
            for name, (ours, theirs) in pairs(tokens, logits).items():
                if options.only not in (None, name):
                    continue
                memory = peak_growth(ours), peak_growth(theirs)
                times = [(seconds(ours, clock), seconds(theirs, clock)) for _ in range(options.repeats)]
                mine, others = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
                print(
                    f"{codes}, {batch}, {name}: {mine:.2f}, {others:.2f}, {others / mine:.1f}; "
                    f"{memory[0]:.1f}, {memory[1]:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
