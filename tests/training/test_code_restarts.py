"""Codes that no latent uses are replaced by latents of the batch."""

from __future__ import annotations

import pytest
import torch
from test_training import pictures, tokenizer_training

from titok import TiTok
from titok.training.tokenizer import TokenizerObjective

pytestmark = pytest.mark.usefixtures("one_thread")


def _objective(**changes: object) -> TokenizerObjective:
    config = tokenizer_training(**changes)
    return TokenizerObjective(TiTok(config.model), config)


def test_codes_start_from_the_first_batch() -> None:
    objective = _objective(random_shift=0, random_flip=False)
    objective.start(pictures())
    objective(pictures(), 0)
    latents = torch.nn.functional.normalize(objective.model.encode_latents(pictures()), dim=-1).flatten(0, 1)
    codes = objective.model.quantizer.codebook
    # Every code is one of the normalized latents, and no latent is taken twice.
    nearest = torch.cdist(codes.double(), latents.double()).min(dim=1)
    assert nearest.values.max() < 1e-6
    assert len(nearest.indices.unique()) == 16
    assert objective.shared_figures()["codes"] > 8


def test_unused_codes_are_restarted_and_used_ones_stay() -> None:
    objective = _objective(random_shift=0, random_flip=False)
    restarts, codes = objective.restarts, objective.model.quantizer.codebook
    objective(pictures(), 1)
    codes.data.copy_(torch.nn.functional.normalize(torch.randn(16, 4), dim=-1))
    before = codes.detach().clone()
    restarts.used[:] = torch.arange(16) < 10
    objective.after_step(2)  # codes are replaced after three
    assert torch.equal(codes, before)
    objective.after_step(3)
    assert torch.equal(codes[:10], before[:10])
    latents = torch.nn.functional.normalize(objective.model.encode_latents(pictures()), dim=-1).flatten(0, 1)
    assert torch.cdist(codes[10:].double(), latents.double()).min(dim=1).values.max() < 1e-6
    assert not restarts.used.any()


def test_codes_are_left_alone_late_in_the_run() -> None:
    objective = _objective(steps=12, restart_until=0.7)
    objective(pictures(), 8)
    before = objective.model.quantizer.codebook.detach().clone()
    objective.restarts.used.zero_()
    objective.after_step(9)  # 75% of the steps
    assert torch.equal(objective.model.quantizer.codebook, before)


def test_codes_in_use_and_their_entropy() -> None:
    restarts = _objective().restarts
    latents = torch.zeros(8, 4)
    restarts.observe(latents, torch.tensor([4, 2, 1, 1] + [0] * 12), 0)
    figures = restarts.figures()
    assert figures["codes"] == 4
    assert float(figures["entropy"]) == pytest.approx(1.75)  # 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 bits
    restarts.observe(latents, torch.tensor([0] * 15 + [8]), 1)
    figures = restarts.figures()
    assert (figures["codes"], figures["entropy"]) == (5, 0)
