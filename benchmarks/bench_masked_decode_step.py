"""`masked_decode_step` against the schedulers of diffusers: `python -m benchmarks.bench_masked_decode_step`.

Each scheduler's step runs on the same float32 logits as titok's, in turns in one process. Peak extra memory is the
growth of the process's resident set over one call, measured once before the timings (Linux). Results are not compared
here, because both sides draw other random numbers; `tests/ops/test_masked_decode_diffusers.py` compares the greedy
steps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.memory import peak_growth
from benchmarks.harness.results import Results, quantiles
from benchmarks.harness.timing import measure
from titok.ops import masked_decode_step

GREEDY = "BlockRefinementScheduler"


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
        GREEDY: (
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


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--codes", type=int, nargs="+", default=[4096, 126_464])
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--seconds", type=float, default=4.0, help="for each case (default: %(default)s)")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", help="only this scheduler, by its name in the table")
    options.add_argument("--json", metavar="FILE", help="results file to append to (default: none)")
    return options


def compare(case: dict[str, Any], runs: dict[str, Callable[[], Any]], seconds: float, results: Results) -> None:
    """Measures one case, writes it, and prints its line."""
    growth = {side: peak_growth(run, "cpu") for side, run in runs.items()}
    measured = measure(runs, seconds, warm=True, rounds=2)
    numbers = {"peak_growth_bytes": growth, "conditions": measured.conditions}
    results.row("masked_decode_step", case, measured.samples, **numbers)
    mine, others = (1e3 * quantiles(measured.samples[side])[0] for side in runs)
    memory = ("not known" if size is None else f"{size / 2**20:.1f}" for size in growth.values())
    print(
        f"{case['codes']}, {case['batch']}, {case['decided']}, {case['scheduler']}: {mine:.2f}, {others:.2f}, "
        f"{others / mine:.1f}, {len(measured.samples['titok'])}; {', '.join(memory)}",
        flush=True,
    )


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    print(
        "codes, batch, decided, scheduler: titok ms, scheduler ms, ratio, calls; titok MiB, scheduler MiB of memory"
    )
    for codes, batch in itertools.product(options.codes, options.batch):
        logits = 3 * torch.randn(batch, options.tokens, codes)
        for decided in (0, options.tokens // 2):
            tokens = torch.full((batch, options.tokens), codes)
            tokens[:, :decided] = 1
            for name, (ours, theirs) in pairs(tokens, logits).items():
                # Of the greedy step alone: how much is saved where half of the tokens are decided.
                if options.only not in (None, name) or (decided and name != GREEDY):
                    continue
                case = {"scheduler": name, "codes": codes, "batch": batch, "tokens": options.tokens}
                case |= {"decided": decided, "dtype": "float32", "threads": options.threads}
                compare(case, {"titok": ours, "diffusers": theirs}, options.seconds, results)


if __name__ == "__main__":
    main()
