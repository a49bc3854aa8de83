"""`sample_tokens`: what tokens depend on, known tokens, dropout, bad input. Parity: tests/models/test_parity.py."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch

from titok import GeneratorConfig, MaskGIT, SamplingConfig, sample_steps, sample_tokens
from titok.generation.schedules import mask_ratio, schedule

K, V, CLASSES = 16, 64, 10
RULES = ["titok", "maskgit"]


@pytest.fixture(scope="module")
def generator() -> MaskGIT:
    torch.manual_seed(0)
    config = GeneratorConfig(K, V, num_classes=CLASSES, width=64, layers=2, heads=4, mlp_width=128)
    model = MaskGIT(config)
    for p in model.parameters():  # with the usual deviation of 0.02 draws would hardly depend on the input
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_depends_on_seed_and_index_alone(generator: MaskGIT, rule: Any) -> None:
    labels = torch.arange(12) % CLASSES
    config = SamplingConfig(confidence=rule, guidance_scale=2.0, temperature=4.5)
    in_one_batch = sample_tokens(generator, labels, config, seed=7)
    for size in (1, 5):
        cut = [
            sample_tokens(generator, labels[i : i + size], config, seed=7, first_sample=i)
            for i in range(0, 12, size)
        ]
        assert torch.equal(torch.cat(cut), in_one_batch)
    assert torch.equal(sample_tokens(generator, labels, config, seed=7), in_one_batch)
    other = sample_tokens(generator, labels, config, seed=8)
    assert (other != in_one_batch).float().mean() > 0.5
    same_label = sample_tokens(generator, torch.zeros(12, dtype=torch.int64), config, seed=7)
    assert len(same_label.unique(dim=0)) == 12, "samples of one class must differ by their index"
    assert int(in_one_batch.min()) >= 0
    assert int(in_one_batch.max()) < V


@pytest.mark.parametrize("steps", [1, 2, 8, 15, 16, 17, 40])
def test_masked_counts_and_known_tokens(generator: MaskGIT, steps: int) -> None:
    config = SamplingConfig(steps=steps)
    tokens, trace = sample_tokens(generator, [1, 2, 3], config, trace=True)
    assert trace.tokens.shape == (steps + 1, 3, K)
    assert torch.equal(trace.tokens[-1], tokens)
    left, want = K, [K]
    for step in range(steps):  # the definition: at least one is decided, and at least one is left
        target = math.floor(K * math.acos((step + 1) / steps) / (math.pi / 2))
        left = 0 if step == steps - 1 else max(1, min(left - 1, target))
        want.append(left)
    masked = trace.tokens == V
    assert masked.sum(-1).tolist() == [[n] * 3 for n in want]
    for before, after in zip(trace.tokens[:-1], trace.tokens[1:], strict=True):
        known = before != V
        assert torch.equal(before[known], after[known])
    # Without a trace, steps that would draw the last token and mask it again are left out. The result is the same.
    assert torch.equal(sample_tokens(generator, [1, 2, 3], config), tokens)


@pytest.mark.parametrize("known", [0, 6])
def test_steps_are_those_of_the_trace(generator: MaskGIT, known: int) -> None:
    config = SamplingConfig(steps=20, temperature=4.5)  # more steps than tokens: some decide none
    init = torch.full((3, K), V)
    init[1, :known] = 5
    arguments: dict[str, Any] = {"seed": 6, "first_sample": 4, "init_tokens": init}
    steps = list(sample_steps(generator, [1, 2, 3], config, **arguments))
    tokens, trace = sample_tokens(generator, [1, 2, 3], config, trace=True, **arguments)
    assert torch.equal(torch.stack(steps), trace.tokens)
    assert torch.equal(steps[-1], tokens)


def test_a_step_runs_when_its_tokens_are_asked_for(generator: MaskGIT, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    features = generator.features
    monkeypatch.setattr(generator, "features", lambda ids: passes.append(torch.is_grad_enabled()) or features(ids))
    steps = sample_steps(generator, [1, 2], SamplingConfig(steps=3))
    for number, _ in enumerate(steps):
        assert passes == [False] * number
        assert torch.is_grad_enabled(), "the caller's setting must not change between two steps"
    assert len(passes) == 3


def test_steps_name_a_bad_argument_at_the_call(generator: MaskGIT) -> None:
    with pytest.raises(ValueError, match="labels"):
        sample_steps(generator, [CLASSES + 1])
    with pytest.raises(ValueError, match="init_tokens: expected 2 rows, one for each label, got 1"):
        sample_steps(generator, [1, 2], init_tokens=torch.full((1, K), V))
    with pytest.raises(TypeError, match="generator: expected a MaskGIT, got None"):
        sample_steps(None, [1])  # type: ignore[arg-type]


def test_known_init_tokens_stay(generator: MaskGIT) -> None:
    init = torch.randint(V, (5, K))
    init[0], init[1, :5], init[2, -1] = V, V, V
    before = init.clone()
    tokens, trace = sample_tokens(generator, [0, 1, 2, 3, 4], init_tokens=init, trace=True)
    assert torch.equal(init, before), "the argument must not change"
    known = init != V
    assert torch.equal(tokens[known], init[known])
    assert (tokens < V).all()
    counts = (trace.tokens == V).sum(-1)
    assert counts[0].tolist() == [K, 5, 1, 0, 0]
    assert counts[1].tolist() == [14, 4, 1, 0, 0]  # floor(n * acos(1/8) / (pi/2)), at least one left
    assert torch.equal(trace.confidences == math.inf, trace.tokens[:-1] != V)
    alone = sample_tokens(generator, [1], init_tokens=init[1:2], first_sample=1)
    assert torch.equal(alone[0], tokens[1])


def test_unconditional_and_guidance_free_runs_agree(generator: MaskGIT) -> None:
    """With "no class" as the label both passes are equal: w * u + (1 - w) * u = u."""
    labels = torch.full((3,), generator.no_class)
    guided = SamplingConfig(guidance_scale=3.0, temperature=0.0)
    free = SamplingConfig(guidance_scale=0.0, temperature=0.0)
    assert torch.equal(sample_tokens(generator, labels, guided), sample_tokens(generator, labels, free))


def test_init_tokens_that_are_all_masked_are_no_init_tokens(generator: MaskGIT) -> None:
    for count in (1, 3):
        init = torch.full((count, K), V)
        tokens, trace = sample_tokens(generator, range(count), seed=2, init_tokens=init, trace=True)
        assert torch.equal(tokens, sample_tokens(generator, range(count), seed=2))
        assert (trace.tokens == V).sum(-1)[:, 0].tolist() == [16, 14, 13, 12, 10, 9, 7, 5, 0]


@pytest.mark.parametrize("steps", [3, 8, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES)
def test_a_sample_with_init_tokens_depends_on_its_own_alone(generator: MaskGIT, rule: Any, steps: int) -> None:
    """Whatever is known of the other samples of the batch, from nothing to everything."""
    config = SamplingConfig(steps=steps, confidence=rule, temperature=4.5)
    labels, masked = torch.arange(6), torch.tensor([K, 0, K, 1, 5, K - 1])
    init = torch.randint(V, (6, K)).masked_fill(torch.rand(6, K).argsort(dim=1) < masked[:, None], V)
    tokens, trace = sample_tokens(generator, labels, config, seed=4, init_tokens=init, trace=True)
    assert torch.equal(sample_tokens(generator, labels, config, seed=4, init_tokens=init), tokens)
    counts = (trace.tokens == V).sum(-1)  # (steps + 1, B)
    assert counts[0].tolist() == masked.tolist()
    for i in range(6):
        alone, own = sample_tokens(
            generator, labels[i : i + 1], config, seed=4, first_sample=i, init_tokens=init[i : i + 1], trace=True
        )
        assert torch.equal(alone[0], tokens[i])
        assert torch.equal((own.tokens == V).sum(-1)[:, 0], counts[:, i])
    without = sample_tokens(generator, labels, config, seed=4)
    assert torch.equal(tokens[masked == K], without[masked == K])


def test_init_tokens_with_as_many_known_ones_in_every_sample(generator: MaskGIT) -> None:
    """Counts that all samples share reach the op in another argument than counts that differ."""
    init = torch.randint(V, (3, K))
    init[0, :9], init[1, 3:12], init[2, ::2], init[2, 1] = V, V, V, V
    assert (init == V).sum(1).tolist() == [9, 9, 9]
    other = torch.cat([init, torch.randint(V, (1, K))])
    tokens = sample_tokens(generator, [1, 2, 3], init_tokens=init)
    assert torch.equal(sample_tokens(generator, [1, 2, 3, 4], init_tokens=other)[:3], tokens)


def test_dropout_is_off_while_sampling(generator: MaskGIT) -> None:
    want = sample_tokens(generator, [1, 2], seed=3)
    generator.train()
    try:
        assert torch.equal(sample_tokens(generator, [1, 2], seed=3), want)
        assert generator.training
    finally:
        generator.eval()


def test_sampling_leaves_a_model_that_another_thread_trains_alone() -> None:
    """The other thread reads the mode and computes with dropout while a forward pass of the sampling runs."""
    torch.manual_seed(0)
    config = GeneratorConfig(K, V, num_classes=CLASSES, width=32, layers=2, heads=2, mlp_width=64, dropout=0.5)
    model = MaskGIT(config).eval()
    want = sample_tokens(model, [1, 2], seed=3)
    model.train()
    tokens, labels = torch.full((2, K), V), torch.tensor([1, 2])
    modes, gradients, within = [], [], threading.Event()

    def train() -> None:
        for _ in range(5):
            assert within.wait(60)
            within.clear()
            first, second = model(tokens, labels), model(tokens, labels)
            modes.append(all(module.training for module in model.modules()))
            modes.append(not torch.equal(first, second))  # dropout is random
            gradients.append(torch.autograd.grad(first.sum(), model.lm_head.weight)[0])

    trainer = threading.Thread(target=train)

    def let_the_trainer_run(*_: Any) -> None:
        if threading.current_thread() is not trainer:
            within.set()

    hook = model.trunk.register_forward_pre_hook(let_the_trainer_run)
    trainer.start()
    while trainer.is_alive():
        assert torch.equal(sample_tokens(model, [1, 2], seed=3), want)
        assert all(module.training for module in model.modules())
    trainer.join()
    hook.remove()
    assert modes == [True] * 10
    assert len(gradients) == 5


def test_empty_batch(generator: MaskGIT) -> None:
    tokens, trace = sample_tokens(generator, [], trace=True)
    assert tokens.shape == (0, K)
    assert tokens.dtype == torch.int64
    assert trace.tokens.shape == (9, 0, K)


def test_one_token_and_one_code() -> None:
    model = MaskGIT(GeneratorConfig(1, 1, num_classes=1, width=8, layers=1, heads=1, mlp_width=8))
    assert sample_tokens(model, [0, 0], SamplingConfig(steps=3)).tolist() == [[0], [0]]


def test_mask_ratios_fall_from_one_to_zero() -> None:
    for name in ("arccos", "cosine", "linear", "root", "square"):
        ratios = [mask_ratio(name, i / 100) for i in range(101)]  # type: ignore[arg-type]
        assert ratios[0] == pytest.approx(1)
        assert ratios[-1] == pytest.approx(0, abs=1e-12)
        assert all(a > b for a, b in itertools.pairwise(ratios)), name
    assert mask_ratio("root", 0.25) == pytest.approx(0.5)
    assert mask_ratio("square", 0.5) == pytest.approx(0.75)
    assert mask_ratio("cosine", 0.5) == pytest.approx(math.sqrt(0.5))


def test_last_step_is_greedy_and_final() -> None:
    *_, last = schedule(SamplingConfig(steps=5, temperature=9.0))
    assert last.final
    assert last.noise_temperature == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [CLASSES + 1]}, r"labels: expected classes in \[0, 10\], got 11"),
        ({"labels": [-1]}, "labels: expected classes"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels: expected shape \(B\), got \(2, 2\)"),
        ({"seed": -1}, r"seed: expected an int in \[0, 2\^64\), got -1"),
        ({"seed": 1 << 64}, "seed"),
        ({"first_sample": -1}, "first_sample"),
        ({"init_tokens": torch.zeros(1, K - 1, dtype=torch.int64)}, r"init_tokens: expected shape \(B, 16\)"),
        ({"init_tokens": torch.full((1, K), V + 1)}, r"init_tokens: expected ids in \[0, 65\)"),
        ({"init_tokens": torch.zeros(2, K, dtype=torch.int64)}, "init_tokens: expected 1 rows"),
    ],
)
def test_bad_values(generator: MaskGIT, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(generator, **{"labels": [0], **change})


def test_bad_types(generator: MaskGIT) -> None:
    with pytest.raises(TypeError, match="labels: expected dtype int64, got float32"):
        sample_tokens(generator, torch.zeros(1))
    with pytest.raises(TypeError, match="init_tokens: expected dtype int64"):
        sample_tokens(generator, [0], init_tokens=torch.zeros(1, K))
