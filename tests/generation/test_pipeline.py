"""`Pipeline`: models that do not fit together, 8-bit pictures, what a picture depends on, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titok import Pipeline, SamplingConfig, VQGANConfig, sample_tokens
from titok.ops import is_plain

Make = Callable[..., Any]
PROXY = VQGANConfig(
    hidden_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, codebook_size=24, code_dim=8
)


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer: Make, tiny_generator: Make) -> Pipeline:
    return Pipeline(tiny_tokenizer(), tiny_generator())


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"num_latent_tokens": 5}, "tokenizer: expected 4 tokens of 16 codes, as the generator, got 5 of 16"),
        ({"codebook_size": 17}, "tokenizer: expected 4 tokens of 16 codes, as the generator, got 4 of 17"),
        ({"bottleneck": "vae"}, "tokenizer: expected a vector-quantised one, got a VAE"),
        ({"head": "proxy", "proxy": PROXY}, "tokenizer: expected one that decodes to pictures"),
    ],
)
def test_a_pair_that_does_not_fit(
    tokenizer: dict[str, Any], message: str, tiny_tokenizer: Make, tiny_generator: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline(tiny_tokenizer(**tokenizer), tiny_generator())


def test_devices_must_agree(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    with pytest.raises(ValueError, match="tokenizer: expected on meta, as the generator, got cpu"):
        Pipeline(tiny_tokenizer(), tiny_generator().to("meta"))


def test_pictures_are_the_decoded_tokens_in_8_bits(pipe: Pipeline) -> None:
    labels = torch.tensor([0, 2, 1])
    pictures = pipe(labels, seed=5)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (3, 16, 24, 3)
    decoded = pipe.tokenizer.decode(sample_tokens(pipe.generator, labels, seed=5)).detach().permute(0, 2, 3, 1)
    exact = decoded.clamp(0, 1).double() * 255
    assert (pictures - exact).abs().max() <= 0.5 + 1e-4
    assert pictures.float().std() > 1, "pictures without contrast would prove nothing"
    truncated = pipe(labels, seed=5, rounding="truncate")
    below = exact - truncated
    assert below.min() > -1e-4
    assert below.max() < 1 + 1e-4
    assert not torch.equal(truncated, pictures)
    assert not pictures.requires_grad


def test_a_picture_depends_on_seed_and_number_alone(pipe: Pipeline) -> None:
    labels = [0, 1, 2, 2, 1, 0, 0]
    in_one_batch = pipe(labels, seed=3)
    cut = [pipe(labels[i : i + 3], seed=3, first_sample=i) for i in range(0, 7, 3)]
    # Tokens are equal. A pixel may differ by one level, because another batch size rounds differently.
    assert (torch.cat(cut).int() - in_one_batch.int()).abs().max() <= 1
    assert not torch.equal(pipe(labels, seed=4), in_one_batch)
    assert not torch.equal(pipe(labels, seed=3, first_sample=1), in_one_batch)
    assert not torch.equal(pipe([1] * 7, seed=3), in_one_batch)


def test_sampling_defaults_to_the_generators(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    one_step = SamplingConfig(steps=1)
    pipe = Pipeline(tiny_tokenizer(), tiny_generator(sampling=one_step))
    labels = [0, 1, 2]
    assert torch.equal(pipe(labels), pipe(labels, sampling=one_step))
    assert not torch.equal(pipe(labels), pipe(labels, sampling=SamplingConfig(steps=4)))


def test_no_labels_no_pictures(pipe: Pipeline) -> None:
    for none in ([], torch.empty(0, dtype=torch.int64)):
        pictures = pipe(none)
        assert pictures.shape == (0, 16, 24, 3)
        assert pictures.dtype == torch.uint8


def test_class_dropped(pipe: Pipeline) -> None:
    none = pipe.generator.no_class
    assert not torch.equal(pipe([none] * 3), pipe([0] * 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"labels": [4]}, ValueError, r"labels: expected classes in \[0, 3\], got 4"),
        ({"labels": [-1]}, ValueError, r"labels: expected classes in \[0, 3\], got -1"),
        ({"labels": torch.tensor([0.5])}, TypeError, "labels: expected dtype int64, got float32"),
        ({"labels": torch.tensor([[0]])}, ValueError, r"labels: expected shape \(B\), got \(1, 1\)"),
        ({"labels": [0], "seed": -1}, ValueError, "seed: expected an int"),
        ({"labels": [0], "rounding": "up"}, ValueError, "rounding: expected 'nearest' or 'truncate', got 'up'"),
    ],
)
def test_bad_input(pipe: Pipeline, call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(**call)


def test_from_pretrained(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipe.generator.save_pretrained(tmp_path / "generator")
    loaded = Pipeline.from_pretrained(tmp_path / "tokenizer", tmp_path / "generator")
    assert torch.equal(loaded([0, 1, 2], seed=9), pipe([0, 1, 2], seed=9))
    bfloat16 = Pipeline.from_pretrained(tmp_path / "tokenizer", tmp_path / "generator", dtype=torch.bfloat16)
    assert bfloat16([0, 1]).shape == (2, 16, 24, 3)
    with pytest.raises(ValueError, match="expected a TiTok, got a 'MaskGIT'"):
        Pipeline.from_pretrained(tmp_path / "generator", tmp_path / "tokenizer")


def test_models_keep_their_mode(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    """A generator in training mode stays in it, and generates what it generates in eval mode."""
    tokenizer, generator = tiny_tokenizer(), tiny_generator(dropout=0.5)
    want = Pipeline(tokenizer, generator)([0, 1], seed=2)
    generator.train()
    assert torch.equal(Pipeline(tokenizer, generator)([0, 1], seed=2), want)
    assert generator.training
    assert not tokenizer.training


# ---------------------------------------------------------------------------------------------------------------
# Threads


def paused(pipe: Pipeline, on_entry: Callable[[], None]) -> list[bool]:
    """Calls `on_entry` within each call of `pipe`; the list collects whether the call runs in plain mode."""
    modes: list[bool] = []
    decode = pipe.tokenizer.decode_head

    def decode_head(tokens: Tensor) -> Tensor:
        on_entry()
        modes.append(is_plain())
        return decode(tokens)

    pipe.tokenizer.decode_head = decode_head  # type: ignore[method-assign]
    return modes


def test_plain_pipelines_in_two_threads_leave_the_process_as_it_was(
    tiny_tokenizer: Make, tiny_generator: Make
) -> None:
    """Both are in plain mode at the same time, and the one that was first leaves it first."""
    both, first_is_done = threading.Barrier(2, timeout=60), threading.Event()
    pipes = [Pipeline(tiny_tokenizer(), tiny_generator(), engine="plain") for _ in range(2)]

    def second_enters() -> None:
        both.wait()
        assert first_is_done.wait(60)

    modes = [paused(pipes[0], both.wait), paused(pipes[1], second_enters)]  # type: ignore[arg-type]
    results: list[Tensor] = []

    def run(index: int) -> None:
        results.append(pipes[index]([0, 1]))
        assert not is_plain()
        if index == 0:
            first_is_done.set()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert modes == [[True], [True]]
    assert torch.equal(*results)
    assert not is_plain()


def test_a_fast_pipeline_beside_a_plain_one_stays_fast(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    entered, fast_is_done = threading.Event(), threading.Event()
    plain = Pipeline(tiny_tokenizer(), tiny_generator(), engine="plain")
    fast = Pipeline(tiny_tokenizer(), tiny_generator())

    def pause() -> None:
        entered.set()
        assert fast_is_done.wait(60)

    plain_modes, fast_modes = paused(plain, pause), paused(fast, lambda: None)
    thread = threading.Thread(target=plain, args=([0, 1],))
    thread.start()
    assert entered.wait(60)
    fast([0, 1])
    fast_is_done.set()
    thread.join()
    assert (plain_modes, fast_modes) == ([True], [False])


@pytest.mark.slow
def test_compiled_models_make_a_pipeline(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    tokenizer, generator = (
        torch.compile(model, backend="eager") for model in (tiny_tokenizer(), tiny_generator())
    )
    pictures = Pipeline(tokenizer, generator)([0, 1], seed=3)
    assert torch.equal(pictures, Pipeline(tiny_tokenizer(), tiny_generator())([0, 1], seed=3))
