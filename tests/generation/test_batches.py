"""`Pipeline.generate_many`: order, batch sizes, continuing a stopped run, and how "auto" finds its batch size."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_cuda import fake_gpus
from titok import Pipeline, SamplingConfig, TiTok, sample_tokens
from titok.generation import batches as streaming
from titok.generation.batches import BatchSizeSearch

Make = Callable[..., Any]
LABELS = [0, 1, 2, 2, 1, 0, 0, 3, 1, 2, 0]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer: Make, tiny_generator: Make) -> Pipeline:
    return Pipeline(tiny_tokenizer(), tiny_generator())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that collects the tokens of every batch that is decoded."""
    batches: list[Tensor] = []
    decode = TiTok.decode_head

    def recorded(self: TiTok, tokens: Tensor) -> Tensor:
        if len(tokens):
            batches.append(tokens)
        return decode(self, tokens)

    monkeypatch.setattr(TiTok, "decode_head", recorded)
    return batches


@pytest.mark.parametrize("size", [1, 3, 4, 11, 50, "auto"])
def test_pictures_are_those_of_one_call(pipe: Pipeline, size: Any, decoded: list[Tensor]) -> None:
    config = SamplingConfig(steps=3, temperature=4.0)
    in_one_batch = pipe(LABELS, seed=3, first_sample=5, sampling=config, rounding="truncate")
    decoded.clear()
    many = pipe.generate_many(
        LABELS, batch_size=size, seed=3, first_sample=5, sampling=config, rounding="truncate"
    )
    pictures = torch.stack(list(many))
    assert pictures.dtype == torch.uint8
    # Tokens are equal. A pixel may differ by one level, because another batch size rounds differently.
    assert torch.equal(torch.cat(decoded), sample_tokens(pipe.generator, LABELS, config, seed=3, first_sample=5))
    assert (pictures.int() - in_one_batch.int()).abs().max() <= 1
    assert len(in_one_batch.unique(dim=0)) == len(LABELS), "with equal pictures the order could not be tested"
    if size != "auto":
        assert [len(tokens) for tokens in decoded[:-1]] == [size] * ((len(LABELS) - 1) // size)


def test_a_stopped_run_goes_on(pipe: Pipeline) -> None:
    in_one_batch = torch.stack(list(pipe.generate_many(LABELS, batch_size=4)))
    first = list(itertools.islice(pipe.generate_many(LABELS, batch_size=4), 6))
    rest = list(pipe.generate_many(LABELS[6:], first_sample=6, batch_size=4))
    assert (torch.stack(first + rest).int() - in_one_batch.int()).abs().max() <= 1


def test_labels_as_tensor_and_none_at_all(pipe: Pipeline) -> None:
    given = [list(pipe.generate_many(labels)) for labels in (torch.tensor([2, 0]), [2, 0])]
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
    assert list(pipe.generate_many([])) == []


def test_no_more_is_computed_than_asked_for(pipe: Pipeline, decoded: list[Tensor]) -> None:
    pictures = pipe.generate_many(LABELS, batch_size=4)
    assert decoded == []
    next(pictures)
    assert len(decoded) == 1
    pictures.close()  # type: ignore[attr-defined]
    assert list(pictures) == []
    assert len(decoded) == 1


def test_a_picture_does_not_keep_its_batch(pipe: Pipeline) -> None:
    for picture in pipe.generate_many(LABELS, batch_size=4):
        assert picture.untyped_storage().nbytes() == picture.numel() == 16 * 24 * 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [4]}, ValueError, r"labels: expected classes in \[0, 3\], got 4"),
        ({"labels": torch.tensor([0.5])}, TypeError, "labels: expected dtype int64, got float32"),
        ({"batch_size": 0}, ValueError, "batch_size: expected 'auto' or an int >= 1, got 0"),
        ({"batch_size": True}, ValueError, "batch_size: expected 'auto' or an int >= 1, got True"),
        ({"batch_size": "all"}, ValueError, "batch_size: expected 'auto' or an int >= 1, got 'all'"),
        ({"seed": -1}, ValueError, "seed: expected an int"),
        ({"first_sample": -1}, ValueError, "first_sample: expected an int"),
        ({"rounding": "up"}, ValueError, "rounding: expected 'nearest' or 'truncate', got 'up'"),
    ],
)
def test_bad_input_is_refused_at_once(
    pipe: Pipeline, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe.generate_many(**{"labels": [0], **change})


def test_progress(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    for progress, shown in ((True, True), (False, False), (None, False)):  # stderr is not a terminal in tests
        list(pipe.generate_many(LABELS, batch_size=4, progress=progress))
        assert ("/11" in capsys.readouterr().err) == shown


# ---------------------------------------------------------------------------------------------------------------
# The search for the batch size


def sizes(search: BatchSizeSearch, seconds: Callable[[int], float]) -> Iterator[int]:
    """The batch sizes that `search` tries.

    A batch takes `seconds(size)`, and the first batch of each size takes ten times as long.
    """
    tried = set()
    while True:
        size = search.size
        yield size
        search.record(size, seconds(size) * (1 if size in tried else 10))
        tried.add(size)


def run_length(values: Iterator[int], count: int) -> list[int]:
    return [value for value, _ in itertools.groupby(itertools.islice(values, count))]


def test_auto_grows_while_it_pays() -> None:
    assert run_length(sizes(BatchSizeSearch("auto", CPU), lambda n: 1 + 0.25 * n), 50) == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        32,
    ]
    assert run_length(sizes(BatchSizeSearch("auto", CPU), lambda n: float(n)), 50) == [1, 2, 1], "no faster: back"
    assert run_length(sizes(BatchSizeSearch("auto", CPU), lambda n: 1.0), 50) == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
        256,
        512,
    ]
    assert run_length(sizes(BatchSizeSearch("auto", torch.device("cuda")), lambda n: 1.0), 4) == [16, 32]
    assert run_length(sizes(BatchSizeSearch(3, CPU), lambda n: 1.0), 9) == [3]


def test_auto_heeds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"VmRSS": 1000, "VmHWM": 1000, "MemAvailable": 10_000}

    def figure(file: str, field: str) -> int:
        return figures[field]

    monkeypatch.setattr(streaming, "_memory_figure", figure)
    search, tried = BatchSizeSearch("auto", CPU), []
    for _ in range(20):
        tried.append(search.size)
        figures["VmHWM"] = 1000 + 100 * search.size
        figures["MemAvailable"] = 10_000 - 100 * search.size
        search.record(search.size, 1.0)
    # 32 pictures have taken 3,200 and left 6,800, which holds twice as much. 64 leave too little for 128.
    assert tried[-1] == max(tried) == 64


def test_auto_goes_back_where_memory_ran_out(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_batch = torch.stack(list(pipe.generate_many(LABELS, batch_size=4)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    decode, batches = TiTok.decode_head, []

    def decode_two_at_most(self: TiTok, tokens: Tensor) -> Tensor:
        batches.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, tokens)

    monkeypatch.setattr(TiTok, "decode_head", decode_two_at_most)
    monkeypatch.setattr(streaming.time, "perf_counter", itertools.count().__next__)  # every batch takes a second
    pictures = torch.stack(list(pipe.generate_many(LABELS, batch_size="auto")))
    assert batches == [1, 1, 2, 2, 4, 2, 2, 1]
    assert (pictures.int() - in_one_batch.int()).abs().max() <= 1
    with pytest.raises(torch.OutOfMemoryError):
        list(pipe.generate_many(LABELS, batch_size=4))


class CountedStream:
    """A stream of which the host waits for events."""

    calls: list[str]

    def __init__(self, device: torch.device) -> None:
        self.events = 0

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> Any:
        self.events += 1
        number = self.events
        return SimpleNamespace(synchronize=lambda: CountedStream.calls.append(f"wait for {number}"))


class Batches:
    """Stands for a request, of which `generate_batches` asks for parts."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def part(self, start: int, end: int) -> Batches:
        return Batches(min(end, self.size) - start)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_between_two_batches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch is launched before the host waits for the last one, which is copied to pinned memory meanwhile."""
    CountedStream.calls = calls = []
    monkeypatch.setattr(torch.cuda, "Stream", CountedStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)

    def generate(part: Any) -> Tensor:
        calls.append(f"launch of {len(part)}")
        return torch.empty(len(part), 8, 8, 3, dtype=torch.uint8, device=device)

    options: Any = {"device": torch.device(device), "batch_size": 4, "progress": False}
    with fake_gpus() as recorder:
        batches = streaming.generate_batches(generate, Batches(10), **options)  # type: ignore[arg-type]
        assert [len(pictures) for pictures in batches] == [4, 4, 2]
    assert calls == ["launch of 4", "launch of 4", "wait for 1", "launch of 2", "wait for 2", "wait for 3"]
    assert len(recorder.findings) == 3
    assert not any("the host waits" in finding for finding in recorder.findings)


@pytest.mark.gpu
def test_on_a_gpu(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    pipe = Pipeline(tiny_tokenizer().cuda(), tiny_generator().cuda())
    labels = torch.arange(300) % 3
    in_one_batch = pipe(labels, seed=1).cpu()
    for size in (7, 64, "auto"):
        pictures = torch.stack(list(pipe.generate_many(labels, seed=1, batch_size=size)))  # type: ignore[arg-type]
        assert pictures.device.type == "cpu"
        assert (pictures.int() - in_one_batch.int()).abs().max() <= 1
