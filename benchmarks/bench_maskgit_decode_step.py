"""`maskgit_decode_step` against the official step: `python -m benchmarks.bench_maskgit_decode_step`.

The official step computes noise -log(-log u) for every code, an arg max, a gather and a sort, which reads and
writes about a dozen tensors of B x N x V. "diffusers" is the step of its `AmusedScheduler` after the guidance, which it
leaves to its caller. titok's op reads the logits of masked positions once. Both draw from the
same distribution, with different random numbers. Bytes: both passes' logits of the masked positions.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.checks import Checked
from benchmarks.harness.op_report import OpReport, op_parser
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
    remaining = (masked.sum(dim=-1, keepdim=True) - 1).clamp(max=left).clamp(min=1)
    cut_off = score.sort(dim=-1).values.gather(-1, remaining - 1)
    return torch.where(score <= cut_off, CODES, new)


def diffusers_step() -> Callable[..., Tensor] | None:
    """The step of diffusers' scheduler for masked codes; None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers.schedulers import AmusedScheduler

    scheduler = AmusedScheduler(mask_token_id=CODES)
    scheduler.set_timesteps(STEPS)

    def run(tokens: Tensor, cond: Tensor, uncond: Tensor, step: int) -> Tensor:
        logits = uncond + GUIDANCE * (cond - uncond)
        result: Tensor = scheduler.step(logits, scheduler.timesteps[step], tokens).prev_sample
        return result

    return run


def titok_step(
    tokens: Tensor, cond: Tensor, uncond: Tensor, step: int, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
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
        **options,
    )


def case(batch: int, step: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, N) as at the start of `step`, conditional logits (B, N, V), unconditional logits (B, N, V)."""
    masked = TOKENS if step == 0 else math.floor(TOKENS * math.acos(step / STEPS) / (math.pi / 2))
    tokens = torch.randint(CODES, (batch, TOKENS), device=device)
    tokens.scatter_(1, torch.rand(batch, TOKENS, device=device).argsort(dim=1)[:, :masked], CODES)
    cond, uncond = (3 * torch.randn(2, batch, TOKENS, CODES, device=device)).to(dtype).unbind()
    return tokens, cond, uncond


def shuffled(inputs: tuple[Tensor, Tensor, Tensor], step: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same tokens, with logits moved along the codes by an amount that depends on the seed."""
    tokens, cond, uncond = inputs
    return tokens, cond.roll(31 * seed, -1), uncond.roll(31 * seed, -1), step


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("run", [official_step, titok_step], ids=["official", "titok"])
@pytest.mark.benchmark(group="maskgit_decode_step")
def test_bench(benchmark: Any, batch: int, run: Callable[..., Any]) -> None:
    benchmark.group += f"[B={batch}, N={TOKENS}, V={CODES}]"
    benchmark(run, *case(batch, 0, torch.float32, "cpu"), 0)


def parser() -> argparse.ArgumentParser:
    return op_parser(__doc__)


def main() -> None:
    arguments = parser().parse_args()
    report = OpReport("maskgit_decode_step", arguments)
    candidates: dict[str, Callable[..., Any]] = {"official": official_step, "titok": titok_step}
    if arguments.compile:
        candidates["compiled"] = torch.compile(official_step, dynamic=False)
    if (peer := diffusers_step()) is not None:
        candidates["diffusers"] = peer
    for batch in arguments.batch:
        for step in (0, 4):
            inputs = case(batch, step, report.dtype, report.device)
            runs: dict[str, Any] = {
                name: functools.partial(run, *inputs, step) for name, run in candidates.items()
            }
            # Only titok's own paths draw the same random numbers. The others are not compared.
            plain = functools.partial(titok_step, backend="plain")
            runs["titok"] = Checked(titok_step, functools.partial(shuffled, inputs, step), plain)
            num_bytes = 2 * int((inputs[0] == CODES).sum()) * CODES * inputs[1].element_size()
            sizes = {"batch": batch, "tokens": TOKENS, "codes": CODES, "step": step}
            report.case(sizes, runs, num_bytes=num_bytes, flops=0.0)


if __name__ == "__main__":
    main()
