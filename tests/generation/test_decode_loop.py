"""The static-buffer form of the decoding loop, which a GPU captures as a graph: same tokens as the eager loop."""

from __future__ import annotations

import dataclasses
import gc
import warnings

import pytest
import torch

from titok import GeneratorConfig, MaskGIT, SamplingConfig, sample_tokens
from titok.generation import decode_loop
from titok.generation.decode_loop import BUCKETS, StaticDecode, bucket, decode_captured

GUIDED = SamplingConfig(guidance_scale=2.0)


def make(device: str = "cpu") -> MaskGIT:
    torch.manual_seed(0)
    config = GeneratorConfig(16, 64, num_classes=10, width=64, layers=2, heads=4, mlp_width=128)
    model = MaskGIT(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.to(device)


def test_buckets_hold_their_batch_and_waste_at_most_half() -> None:
    for count in range(1, BUCKETS[-1] + 1):
        assert count <= bucket(count) <= max(count * 1.5, 1), count
    assert bucket(BUCKETS[-1] + 1) == BUCKETS[-1]


@pytest.mark.parametrize("labels", [[3], [1, 1, 1, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [10, 10]])
def test_static_buffers_give_the_tokens_of_the_eager_loop(labels: list[int]) -> None:
    model, labels_ = make(), torch.tensor(labels)
    for config in (GUIDED, dataclasses.replace(GUIDED, guidance_schedule="constant", confidence="maskgit")):
        for seed, first in ((0, 0), (5, 3), ((1 << 64) - 1, 1 << 40)):
            want = sample_tokens(model, labels_, config, seed=seed, first_sample=first)
            assert torch.equal(decode_captured(model, config, labels_, seed, first, capture=False), want)


def test_one_set_of_buffers_serves_other_labels_seeds_and_numbers() -> None:
    """Everything but the shape of the work is an input: nothing of the first run may be baked in."""
    model = make()
    static = StaticDecode(model, GUIDED, 6, 4, capture=False)
    other = dataclasses.replace(GUIDED, guidance_scale=7.0, temperature=1.0, softmax_annealing=False)
    for labels, config, seed in (
        ([1, 2, 3, 4, 4], GUIDED, 1),
        ([9, 9, 9], other, 2),
        ([0, 5, 0, 5, 0, 5], other, 3),
    ):
        got = static.run(torch.tensor(labels), config, seed, 11)
        assert torch.equal(got, sample_tokens(model, labels, config, seed=seed, first_sample=11))


def test_long_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "BUCKETS", (1, 2, 4))
    model, labels = make(), torch.arange(10)
    want = sample_tokens(model, labels, GUIDED, seed=1)
    assert torch.equal(decode_captured(model, GUIDED, labels, 1, 0, capture=False), want)


def test_a_failed_capture_is_said_once_and_decoding_goes_on() -> None:
    if torch.cuda.is_available():
        pytest.skip("captures do not fail here")
    model, labels = make(), torch.arange(4)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph, its capture failed"):
        first = decode_captured(model, GUIDED, labels, 1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = decode_captured(model, GUIDED, labels, 1, 0)
    assert torch.equal(first, again)
    assert torch.equal(first, sample_tokens(model, labels, GUIDED, seed=1))


def test_graphs_are_kept_few_and_die_with_their_model() -> None:
    model = make()
    for size in BUCKETS[:10]:
        decode_captured(model, GUIDED, torch.arange(size) % 10, 0, 0, capture=False)
    assert len(decode_loop._graphs[model]) == decode_loop._KEPT
    before = len(decode_loop._graphs)
    del model
    gc.collect()
    assert len(decode_loop._graphs) == before - 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_replay_equals_the_uncaptured_loop(count: int, dtype: torch.dtype) -> None:
    model = make("cuda").to(dtype)
    labels = torch.arange(count) % 10
    for seed in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replayed = decode_captured(model, GUIDED, labels, seed, 0)
        static = StaticDecode(
            model, GUIDED, bucket(count), min(bucket(count), bucket(min(count, 10))), capture=False
        )
        assert torch.equal(replayed, static.run(labels, GUIDED, seed, 0))
