"""`masked_decode_step` gives the tokens of the schedulers of diffusers, over whole trajectories of random logits.

`torch.multinomial` is replaced by an arg max within their steps, because their random numbers are not titok's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from titok.ops import masked_decode_step as decode
from titok.ops.core.available import why_no_cpp

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow  # importing diffusers takes seconds
BACKENDS = ["plain", pytest.param("cpp", marks=pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp())))]
LENGTH, CODES, STEPS, TRAJECTORIES = 24, 37, 6, 60
MASK = CODES


def scheduler(name: str, **options: Any) -> Any:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)(**options)


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kwargs: p.argmax(-1, keepdim=True))


def logits_of(number: int, step: int, scale: float = 4.0) -> Tensor:
    g = torch.Generator().manual_seed(1000 * number + step)
    return scale * torch.randn(1 + number % 3, LENGTH, CODES, generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_amused(backend: str, schedule: str, greedy: None) -> None:
    theirs = scheduler("AmusedScheduler", mask_token_id=MASK, masking_schedule=schedule)
    for number in range(TRAJECTORIES):
        theirs.set_timesteps(STEPS, temperature=(0, 0))
        tokens = torch.full((1 + number % 3, LENGTH), MASK)
        tokens[:, : number % 7] = 1  # a given start, as for inpainting
        for step, timestep in enumerate(theirs.timesteps.tolist()):
            logits, ratio = logits_of(number, step), torch.tensor((step + 1) / STEPS)
            want = theirs.step(logits, timestep, tokens).prev_sample
            share = torch.cos(ratio * math.pi / 2) if schedule == "cosine" else 1 - ratio
            masked = int((tokens[0] == MASK).sum())
            count = max(1, min(masked - 1, int(LENGTH * share))) if timestep else 0
            got = decode(tokens, logits, policy="count", count=count, mask_token=MASK, step=step, backend=backend)
            assert torch.equal(got.tokens, want), (number, step)
            tokens = want
        assert (tokens != MASK).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_refinement(backend: str) -> None:
    theirs = scheduler("BlockRefinementScheduler", block_length=LENGTH)
    edited = 0
    for number in range(TRAJECTORIES):
        theirs.set_timesteps(STEPS)
        quotas = theirs.get_num_transfer_tokens(LENGTH, STEPS).tolist()
        tokens = torch.full((1 + number % 3, LENGTH), MASK)
        tokens[:, : number % 5] = 2
        prompt = torch.arange(LENGTH) < number % 5
        threshold, edit = 0.3 + 0.1 * (number % 6), (None, 0.5, 0.9)[number % 3]
        for step in range(STEPS + 2):
            logits, before = logits_of(number, step), tokens.clone()
            options = {"threshold": threshold, "editing_threshold": edit}
            want = theirs.step(logits, step, tokens, mask_token_id=MASK, prompt_mask=prompt, **options)
            got = decode(
                *(tokens, logits),
                policy="threshold",
                count=quotas[min(step, STEPS - 1)],
                threshold=threshold,
                edit_threshold=edit,
                editable=~prompt.expand_as(tokens).clone(),
                mask_token=MASK,
                backend=backend,
                return_log_probabilities=True,
            )
            assert torch.equal(got.tokens, want.prev_sample), (number, step)
            masked = before == MASK
            drawn = want.sampled_probs.double().log()
            assert got.log_probabilities is not None
            assert torch.allclose(got.log_probabilities[masked].double(), drawn[masked], atol=2e-5)
            edited += int(want.editing_transfer_index.sum())
            tokens = want.prev_sample
    assert edited > 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_refinement_with_uniform_noise(backend: str) -> None:
    theirs = scheduler("BlockRefinementScheduler", block_length=LENGTH)
    for number in range(TRAJECTORIES):
        theirs.set_timesteps(STEPS)
        batch = 1 + number % 3
        tokens = torch.randint(CODES, (batch, LENGTH))
        step_map = torch.full((batch, LENGTH), -1, dtype=torch.int32)
        threshold, edit = 0.3 + 0.1 * (number % 6), (None, 0.6)[number % 2]
        for step in range(STEPS):
            logits, undecided = logits_of(number, step), step_map < 0
            options = {"threshold": threshold, "editing_threshold": edit}
            want = theirs.step(logits, step, tokens, mask_token_id=None, **options)
            target = -(-(step + 1) * LENGTH // STEPS)
            got = decode(
                *(tokens, logits),
                policy="threshold",
                undecided=undecided,
                count=(target - (~undecided).sum(-1)).clamp_min(0),
                threshold=threshold,
                edit_threshold=edit,
                renoise=True,
                step=step,
                step_map=step_map,
                backend=backend,
            )
            assert got.step_map is not None
            decided = got.step_map >= 0
            assert torch.equal(decided, ~undecided | want.transfer_index), (number, step)
            assert torch.equal(got.tokens[decided], want.prev_sample[decided]), (number, step)
            assert ((got.tokens >= 0) & (got.tokens < CODES)).all()
            tokens, step_map = want.prev_sample, got.step_map
        assert (step_map >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_bound(backend: str, greedy: None) -> None:
    theirs = scheduler("EntropyBoundScheduler", num_inference_steps=STEPS)
    accepted = 0
    for number in range(TRAJECTORIES):
        tokens = torch.randint(CODES, (1 + number % 3, LENGTH))
        for step in range(STEPS):
            logits, bound = logits_of(number, step, scale=3.0), (0.0, 0.1, 1.0, 5.0)[number % 4]
            want = theirs.step(logits, step, tokens, entropy_bound=bound)
            got = decode(
                *(tokens, logits),
                policy="entropy",
                undecided=torch.ones_like(tokens, dtype=torch.bool),
                entropy_bound=bound,
                softmax_temperature=0.4 + 0.4 * (STEPS - step) / STEPS,
                renoise=True,
                step=step,
                step_map=torch.full_like(tokens, -1, dtype=torch.int32),
                backend=backend,
            )
            assert got.step_map is not None
            assert torch.equal(got.step_map >= 0, want.accepted_index), (number, step)
            index = want.accepted_index
            assert torch.equal(got.tokens[index], want.prev_sample[index]), (number, step)
            accepted += int(index.sum())
            tokens = want.prev_sample
    assert accepted > TRAJECTORIES * STEPS
