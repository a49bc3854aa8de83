"""Tokens and pictures on two streams: what waits for what, batches of two sizes, and the decoder's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titok import Pipeline, sample_tokens
from titok.generation.captured import PictureDecoder
from titok.generation.two_stages import TwoStages, pictures_captured
from titok.inference.cuda_graphs import GraphCache

Make = Callable[..., Any]
LABELS = [0, 1, 2, 2, 1, 0, 0, 3, 1, 2, 0]
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer: Make, tiny_generator: Make) -> Pipeline:
    return Pipeline(tiny_tokenizer(), tiny_generator())


class Stream:
    """A stream that notes which pieces of work are done before each of its own."""

    current: Stream

    def __init__(self, name: str) -> None:
        self.name, self.work, self.before = name, set[str](), dict[str, set[str]]()

    def wait_stream(self, other: Stream) -> None:
        self.work |= other.work

    def launch(self, work: str) -> None:
        self.before[work] = set(self.work)
        self.work.add(work)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stream]:
    names = iter(("tokens", "pictures"))
    made = {"default": Stream("default")}
    Stream.current = made["default"]

    def make(device: torch.device) -> Stream:
        name = next(names)
        return made.setdefault(name, Stream(name))

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    return made


def test_tokens_of_a_batch_do_not_wait_for_pictures_of_the_one_before(streams: dict[str, Stream]) -> None:
    used_on: list[str] = []

    def draw(request: Any) -> Any:
        Stream.current.launch(f"tokens of {request}")
        split = [f"{request}, half {i}" for i in (1, 2)]
        return SimpleNamespace(split=lambda size: split, record_stream=lambda stream: used_on.append(stream.name))

    def decode(some: Any) -> torch.Tensor:
        Stream.current.launch(f"pictures of {some}")
        return torch.zeros(3)

    streams["default"].work.add("weights")
    with TwoStages(draw, decode, GPU, 2) as stages:
        for request in ("A", "B"):
            assert len(stages(request)) == 6  # type: ignore[arg-type]
        assert stages.picture_stream is streams["pictures"]
        assert streams["default"].work == {"weights"}
    assert streams["tokens"].before == {"tokens of A": {"weights"}, "tokens of B": {"weights", "tokens of A"}}
    before = streams["pictures"].before
    assert before["pictures of A, half 1"] == {"weights", "tokens of A"}
    assert {"tokens of A", "tokens of B"} <= before["pictures of B, half 1"]
    assert used_on == ["pictures", "pictures"]
    assert len(streams["default"].work) == 7  # it waits for everything at the end


@pytest.mark.parametrize(("size", "at_once"), [(4, 2), (4, 3), (3, 8), ("auto", 2)])
def test_pictures_are_those_of_one_call(pipe: Pipeline, size: Any, at_once: int) -> None:
    in_one_batch = pipe(LABELS, seed=3, rounding="truncate")
    assert len(in_one_batch.unique(dim=0)) == len(LABELS), "with equal pictures the order could not be tested"
    many = pipe.generate_many(LABELS, batch_size=size, decode_batch_size=at_once, seed=3, rounding="truncate")
    assert (torch.stack(list(many)).int() - in_one_batch.int()).abs().max() <= 1
    assert {"generator", "pixel decoder"} <= set(pipe.stats()["seconds"])


def test_bad_sizes_are_refused_at_once(pipe: Pipeline) -> None:
    for value in (0, "auto", True):
        with pytest.raises(ValueError, match="decode_batch_size: expected an int >= 1, got "):
            pipe.generate_many([0], decode_batch_size=value)  # type: ignore[arg-type]


def test_the_decoder_over_a_buffer(pipe: Pipeline) -> None:
    """Buffers are filled up to a bucket and used again; more tokens than the largest bucket are cut."""
    decoder, graphs = PictureDecoder(pipe.tokenizer, "nearest"), GraphCache()
    tokens = sample_tokens(pipe.generator, LABELS, seed=1)
    with torch.no_grad():
        for count in (5, 6, 1, 11):
            pictures = pictures_captured(decoder, tokens[:count], graphs, capture=False)
            assert (pictures.int() - decoder(tokens[:count]).int()).abs().max() <= 1
        assert len(graphs) == 3
        many = tokens.repeat(50, 1)
        assert len(pictures_captured(decoder, many, graphs, capture=False)) == 550
        assert len(graphs) == 5  # 512 and 48


def test_a_capture_that_fails_is_told(pipe: Pipeline) -> None:
    """On this machine there is no GPU, so the capture raises."""
    if torch.cuda.is_available():
        pytest.skip("captures succeed here")
    decoder, graphs = PictureDecoder(pipe.tokenizer, "nearest"), GraphCache()
    tokens = sample_tokens(pipe.generator, LABELS[:2])
    with torch.no_grad():
        with pytest.warns(UserWarning, match="without a CUDA graph, its capture failed"):
            first = pictures_captured(decoder, tokens, graphs)
        assert torch.equal(pictures_captured(decoder, tokens, graphs), first)


@pytest.mark.gpu
def test_on_a_gpu(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    pipe = Pipeline(tiny_tokenizer().cuda(), tiny_generator().cuda())
    labels = torch.arange(300) % 3
    in_one_batch = pipe(labels, seed=1).cpu()
    for size, at_once in ((64, 16), (32, 64)):
        many = pipe.generate_many(labels, seed=1, batch_size=size, decode_batch_size=at_once)
        assert (torch.stack(list(many)).int() - in_one_batch.int()).abs().max() <= 1
