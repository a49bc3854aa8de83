"""`maskgit_decode_step` against the official step: `python -m benchmarks.bench_maskgit_decode_step`.

The official step computes noise -log(-log u) for every code, an arg max, a gather and a sort, which reads and
writes about a dozen tensors of B x N x V. titok's op reads the logits of masked positions once. Both draw from the
same distribution, with different random numbers. Bytes: both passes' logits of the masked positions.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from titok.ops import maskgit_decode_step

TOKENS, CODES, STEPS = 64, 4096, 8
BATCHES = (1, 8, 64)
GUIDANCE, TEMPERATURE = 4.5, 9.5


def official_step(tokens: Tensor, cond: Tensor, uncond: Tensor, step: int) -> Tensor:
    """The official decoding step as tensor expressions, written from a description of what it computes."""
    ratio = (step + 1) / STEPS
    noise_temperature = TEMPERATURE * (1 - ratio)
    masked = tokens == CODES
    logits = GUIDANCE * cond + (1 - GUIDANCE) * uncond
    logits = logits / (0.5 + 0.8 * (1 - ratio))
    noise = -torch.log((-torch.log(torch.rand_like(logits).clamp(min=1e-20))).clamp(min=1e-20))
    drawn = (logits + noise_temperature * noise).argmax(dim=-1)
    new = torch.where(masked, drawn, tokens)
    score = logits.gather(-1, new.clamp(max=CODES - 1)[..., None])[..., 0]
    score = torch.where(masked, score, math.inf)
    fresh = -torch.log((-torch.log(torch.rand_like(score).clamp(min=1e-20))).clamp(min=1e-20))
    score = score + noise_temperature * fresh
    left = math.floor(TOKENS * math.acos(ratio) / (math.pi / 2))
    left = max(1, min(int(masked[0].sum()) - 1, left))
    cut_off = score.sort(dim=-1).values[:, left - 1 : left]
    return torch.where(score <= cut_off, CODES, new)


def titok_step(tokens: Tensor, cond: Tensor, uncond: Tensor, step: int) -> Tensor | tuple[Tensor, Tensor]:
    ratio = (step + 1) / STEPS
    return maskgit_decode_step(
        tokens,
        cond,
        uncond,
        step=step,
        steps=STEPS,
        num_masked=math.floor(TOKENS * math.acos(ratio) / (math.pi / 2)),
        mask_token=CODES,
        guidance=GUIDANCE,
        softmax_temperature=0.5 + 0.8 * (1 - ratio),
        noise_temperature=TEMPERATURE * (1 - ratio),
    )


def case(batch: int, step: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, N) as at the start of `step`, conditional logits (B, N, V), unconditional logits (B, N, V)."""
    masked = TOKENS if step == 0 else math.floor(TOKENS * math.acos(step / STEPS) / (math.pi / 2))
    tokens = torch.randint(CODES, (batch, TOKENS), device=device)
    tokens.scatter_(1, torch.rand(batch, TOKENS, device=device).argsort(dim=1)[:, :masked], CODES)
    cond, uncond = (3 * torch.randn(2, batch, TOKENS, CODES, device=device)).to(dtype).unbind()
    return tokens, cond, uncond


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("run", [official_step, titok_step], ids=["official", "titok"])
@pytest.mark.benchmark(group="maskgit_decode_step")
def test_bench(benchmark: Any, batch: int, run: Callable[..., Any]) -> None:
    benchmark.group += f"[B={batch}, N={TOKENS}, V={CODES}]"
    benchmark(run, *case(batch, 0, torch.float32, "cpu"), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="for each line of the table (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", metavar="FILE", help="results file to append to (default: none)")
    arguments = parser.parse_args()
    results = Results(arguments.json)
    steps: dict[str, Callable[..., Any]] = {"official": official_step, "titok": titok_step}
    if arguments.device == "cuda":
        steps["compiled"] = torch.compile(official_step)
    where = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"N={TOKENS} V={CODES} {arguments.dtype} on {where}; medians of interleaved calls, times in ms")
    print(f"{'batch':>5} {'step':>4} {'masked':>6} {'titok':>8} {'GB/s':>7}  times as long")
    for batch in BATCHES:
        for step in (0, 4):
            inputs = case(batch, step, getattr(torch, arguments.dtype), arguments.device)
            runs = {name: functools.partial(run, *inputs, step) for name, run in steps.items()}
            samples = interleave(runs, arguments.seconds)
            masked = int((inputs[0] == CODES).sum())
            num_bytes = 2 * masked * CODES * inputs[1].element_size()
            median = {name: statistics.median(values) for name, values in samples.items()}
            ours = median.pop("titok")
            others = "  ".join(f"{name} {seconds / ours:.1f}x" for name, seconds in median.items())
            rate = num_bytes / ours / 1e9
            line = f"{batch:5} {step:4} {masked // batch:6} {ours * 1e3:8.3f} {rate:7.1f}  {others}"
            print(line, flush=True)
            shape = {"batch": batch, "tokens": TOKENS, "codes": CODES, "step": step, "dtype": arguments.dtype}
            results.row("maskgit_decode_step", shape, samples, bytes=num_bytes)


if __name__ == "__main__":
    main()
