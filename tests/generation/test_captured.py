"""The decoding loop over buffers of fixed shape, which a GPU captures as a graph, returns the eager loop's tokens.

Without a GPU the buffers are tested uncaptured (`capture=False`).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import time
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titok import GeneratorConfig, MaskGIT, SamplingConfig, sample_tokens
from titok.generation import captured
from titok.generation.captured import BUCKETS, StaticDecode, bucket, decode_captured, is_captured
from titok.generation.request import GenerationRequest
from titok.inference.cuda_graphs import GraphCache

GUIDED = SamplingConfig(guidance_scale=2.0)


def make(device: str = "cpu") -> MaskGIT:
    torch.manual_seed(0)
    config = GeneratorConfig(16, 64, num_classes=10, width=64, layers=2, heads=4, mlp_width=128)
    model = MaskGIT(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.to(device)


def request(
    labels: Any, config: SamplingConfig = GUIDED, seed: int = 0, first_sample: int = 0
) -> GenerationRequest:
    model = GeneratorConfig(16, 64, num_classes=10)
    return GenerationRequest.checked(model, labels, seed=seed, first_sample=first_sample, sampling=config)


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
            got = decode_captured(model, request(labels_, config, seed, first), GraphCache(), capture=False)
            assert torch.equal(got, want)


def test_one_set_of_buffers_serves_other_labels_seeds_and_numbers() -> None:
    """Everything but the shape of the work is an input: nothing of the first run may be fixed in it."""
    model = make()
    static = StaticDecode(model, request([8, 8, 0, 3], seed=9, first_sample=2), 6, 4)
    other = dataclasses.replace(GUIDED, guidance_scale=7.0, temperature=1.0, softmax_annealing=False)
    for labels, config, seed in (
        ([1, 2, 3, 4, 4], GUIDED, 1),
        ([9, 9, 9], other, 2),
        ([0, 5, 0, 5, 0, 5], other, 3),
    ):
        got = static.run(model, request(labels, config, seed, 11))
        assert torch.equal(got, sample_tokens(model, labels, config, seed=seed, first_sample=11))


def test_long_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "BUCKETS", (1, 2, 4))
    model, labels = make(), torch.arange(10)
    want = sample_tokens(model, labels, GUIDED, seed=1)
    assert torch.equal(decode_captured(model, request(labels, seed=1), GraphCache(), capture=False), want)


def test_a_failed_capture_warns_once_and_decoding_goes_on() -> None:
    if torch.cuda.is_available():
        pytest.skip("captures do not fail here")
    model, labels, graphs = make(), torch.arange(4), GraphCache()
    with pytest.warns(UserWarning, match="decoding without a CUDA graph, its capture failed"):
        first = decode_captured(model, request(labels, seed=1), graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = decode_captured(model, request(labels, seed=1), graphs)
    assert torch.equal(first, again)
    assert torch.equal(first, sample_tokens(model, labels, GUIDED, seed=1))


def test_a_step_that_cannot_be_captured_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(device=torch.device("cuda", 1))
    for reason in ("titok._C was built without nvcc", None):
        monkeypatch.setattr(captured, "why_no_captured_step", lambda device, reason=reason: reason)
        assert is_captured(on_gpu, request([1])) == (reason is None)  # type: ignore[arg-type]
    assert not is_captured(make(), request([1]))


def test_the_first_run_in_inference_mode() -> None:
    """Buffers that were made there are written in later runs."""
    model, graphs = make(), GraphCache()
    with torch.inference_mode():
        decode_captured(model, request([1, 2]), graphs, capture=False)
    got = decode_captured(model, request([3, 4], seed=1), graphs, capture=False)
    assert torch.equal(got, sample_tokens(model, [3, 4], GUIDED, seed=1))


def test_a_model_that_moves_drops_its_graphs() -> None:
    model = make()
    decode_captured(model, request([1]), model.graphs, capture=False)
    assert len(model.graphs) == 1
    assert len(model.to(torch.float64).graphs) == 0


def test_graphs_are_kept_few_and_die_with_their_owner() -> None:
    model = make()
    for size in BUCKETS[:10]:
        decode_captured(model, request(torch.arange(size) % 10), model.graphs, capture=False)
    assert len(model.graphs) == GraphCache.LIMIT
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None, "a graph that refers to its model would keep both until the garbage collector runs"
    finally:
        gc.enable()


def test_a_copied_or_unpickled_model_starts_without_graphs() -> None:
    model = make()
    decode_captured(model, request([1]), model.graphs, capture=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (len(model.graphs), len(other.graphs)) == (1, 0)
    assert not [name for name in model.state_dict() if "graph" in name or "float32" in name]


def test_threads_take_turns_at_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of a graph share its input buffers, so another thread must not write them during a run."""
    model, graphs = make(), GraphCache()
    compute = StaticDecode._compute

    def slow(self: StaticDecode, generator: MaskGIT) -> torch.Tensor:
        time.sleep(0.05)
        return compute(self, generator)

    monkeypatch.setattr(StaticDecode, "_compute", slow)
    results: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        with torch.no_grad():  # the setting of a thread
            results[seed] = decode_captured(model, request([1, 2, 3, 4], seed=seed), graphs, capture=False)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, tokens in results.items():
        assert torch.equal(tokens, sample_tokens(model, [1, 2, 3, 4], GUIDED, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_replay_equals_the_uncaptured_loop(count: int, dtype: torch.dtype) -> None:
    model = make("cuda").to(dtype)
    labels = torch.arange(count) % 10
    with torch.no_grad():
        for seed in (0, 1):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                replayed = decode_captured(model, request(labels, seed=seed), model.graphs)
            num_distinct = min(bucket(count), bucket(min(count, 10)))
            static = StaticDecode(model, request(labels), bucket(count), num_distinct)
            assert torch.equal(replayed, static.run(model, request(labels, seed=seed)))
