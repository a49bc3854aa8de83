"""The formulas of training, compared with golden values of the official code and with slow definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from golden import Case
from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig
from titok.training.masking import drop_classes, masked_token_loss, num_masked, random_mask
from titok.training.optim import decayed_parameters, learning_rate
from titok.training.order import micro_batches, seed_of, shuffled_batches

VARIANTS = {
    "mlm": {},
    "mlm_nosmooth": {"label_smoothing": 0.0},
    "mlm_maskedonly": {"unmasked_weight": 0.0},
}


@pytest.mark.parametrize("length", [16, 24, 32, 64, 128])
def test_masked_count_is_the_official_one(length: int) -> None:
    case = Case("losses")
    got = num_masked(case["in.masking.timesteps"], length)
    assert torch.equal(got, case[f"out.masking.num_masked.seq{length}"])


def test_masked_count_at_the_ends() -> None:
    times = torch.tensor([0.0, 1.0 - 2.0**-24])
    assert num_masked(times, 8).tolist() == [8, 1]  # all tokens, and at least one


def test_masked_positions_are_the_official_ones() -> None:
    case = Case("losses")
    mask = random_mask(case["in.masking.timesteps"], case["in.masking.uniform"])
    assert torch.equal(mask, case["out.masking.masks"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_accuracy_and_gradient_are_the_official_ones(variant: str) -> None:
    case = Case("losses")
    for dtype, compare, out in (
        (torch.float32, case.assert_float32, "out"),
        (torch.float64, case.assert_float64, "f64"),
    ):
        logits = case["in.mlm.logits"].to(dtype).requires_grad_()
        loss, accuracy = masked_token_loss(
            logits, case["in.mlm.targets"], case["in.mlm.mask"], **VARIANTS[variant]
        )
        loss.backward()
        compare(f"{out}.{variant}.loss", loss.detach())
        compare(f"{out}.{variant}.correct_tokens", accuracy)
        compare(f"{out}.{variant}.grad_logits", logits.grad)


def test_row_without_masked_tokens_counts_as_wrong() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2], [0, 1]]), 3).float()
    mask = torch.tensor([[True, True], [False, False]])
    _, accuracy = masked_token_loss(logits, logits.argmax(-1), mask)
    assert accuracy.item() == pytest.approx(0.5)


def test_classes_are_dropped_below_the_probability() -> None:
    dropped = drop_classes(torch.tensor([1, 2, 3]), 10, torch.tensor([0.0, 0.1, 0.05]), 0.1)
    assert dropped.tolist() == [10, 2, 10]
    assert drop_classes(torch.tensor([1]), 10, torch.tensor([0.0]), 0.0).tolist() == [1]


@pytest.mark.parametrize(
    ("base", "final", "warmup", "total"),
    [(1e-4, 1e-5, 10_000, 1_000_000), (2e-4, 1e-5, 100, 1_000), (1e-4, 0.0, 0, 1_000)],
)
def test_learning_rate_is_the_official_one_until_the_end_and_then_held(
    base: float, final: float, warmup: int, total: int
) -> None:
    case = Case("schedules")
    name = f"out.lr.cosine.base{base:g}.end{final:g}.warmup{warmup}.total{total}"
    name = name.replace("base1e-04", "base0.0001").replace("base2e-04", "base0.0002")
    for step, want in zip(case["in.lr.steps"].tolist(), case[name].tolist(), strict=True):
        got = learning_rate(step, base=base, final=final, warmup=warmup, total=total)
        # After the last step the rate of the official code rises again, and ours stays.
        assert got == pytest.approx(want if step <= total else final, rel=1e-9, abs=1e-18), step


def test_weight_decay_acts_on_matrices_alone() -> None:
    vit = ViTConfig(width=16, layers=1, heads=2, patch_size=8)
    config = TokenizerConfig(
        image_size=(8, 8), encoder=vit, decoder=vit, num_latent_tokens=2, code_dim=4, codebook_size=8
    )
    layer = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    want = {f"{side}.trunk.blocks.0.{part}.weight" for side in ("encoder", "decoder") for part in layer}
    assert decayed_parameters(TiTok(config)) == want | {
        "encoder.project.weight",
        "decoder.head.0.weight",
        "decoder.smooth.weight",
    }
    generator = GeneratorConfig(2, 8, num_classes=3, width=16, layers=1, heads=2, mlp_width=32)
    want = {f"trunk.blocks.0.{part}.weight" for part in layer}
    assert decayed_parameters(MaskGIT(generator)) == want | {"lm_head.weight"}


def test_every_epoch_is_a_permutation_and_any_step_can_be_the_first() -> None:
    stream = shuffled_batches(7, 3, seed=5)
    batches = [next(stream) for _ in range(14)]  # 42 indices: six epochs, whose ends lie within batches
    epochs = torch.cat(batches).reshape(6, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    later = shuffled_batches(7, 3, seed=5, first_step=4)
    assert all(torch.equal(next(later), batch) for batch in batches[4:])
    assert not torch.equal(torch.cat([next(shuffled_batches(7, 7, seed=6))]), epochs[0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_processes_together_read_every_picture_once_an_epoch(world_size: int) -> None:
    """Three epochs of 20 pictures, in steps of 12 that are cut into four micro-batches."""
    parts = [micro_batches(shuffled_batches(20, 12, seed=5), 3, rank, world_size) for rank in range(world_size)]
    steps = [[list(itertools.islice(part, 4 // world_size)) for part in parts] for _ in range(5)]
    # A step's micro-batches in the order of the data: the first of each process, then the second of each.
    read = [batch for step in steps for same_turn in zip(*step, strict=True) for batch in same_turn]
    epochs = torch.cat(read).reshape(3, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs.tolist())


def test_a_batch_may_be_longer_than_the_data() -> None:
    assert next(shuffled_batches(2, 5, seed=0)).bincount().tolist() in ([3, 2], [2, 3])


def test_seeds_of_neighbours_differ() -> None:
    seeds = {seed_of(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 400
    assert all(0 <= s < 1 << 63 for s in seeds)
    assert math.log2(max(seeds)) > 55
