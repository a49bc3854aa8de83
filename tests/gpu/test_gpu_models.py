"""Whole models on a GPU: against plain mode, across streams, threads and devices, and after things that go wrong.

The tests that need no property of a GPU run on the CPU as well, so that what they do is known to be right.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from titok import (
    GeneratorConfig,
    MaskGIT,
    Pipeline,
    TiTok,
    TokenizerConfig,
    ViTConfig,
    VQGANConfig,
    engine,
    sample_tokens,
)
from titok.generation.captured import BUCKETS

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
VIT = ViTConfig(width=64, layers=2, heads=2, patch_size=8)
PROXY = VQGANConfig(hidden_channels=32, channel_multipliers=(1, 2, 2), codebook_size=16, code_dim=8)
TOKENIZER = TokenizerConfig(32, VIT, VIT, 16, 12, 64, head="proxy", proxy=PROXY, pixel_decoder=True)
GENERATOR = GeneratorConfig(16, 64, num_classes=10, width=64, layers=2, heads=2, mlp_width=128)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN computes float32 convolutions in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    """One CPU thread: the models are tiny."""


def seeded(make: Callable[[], Any]) -> Any:
    """A model in eval mode, with the same weights in every call. They are large, so that results depend on inputs."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


def tokenizer_on(device: str, dtype: torch.dtype = torch.float32) -> TiTok:
    model: TiTok = seeded(lambda: TiTok(TOKENIZER))
    with torch.no_grad():
        latents = model.encode_latents(torch.rand(TOKENIZER.codebook_size, 3, 32, 32))
        assert model.quantizer is not None
        model.quantizer.codebook.copy_(latents[:, 0])  # so that different pictures have different tokens
    return model.to(device, dtype)


def pipeline_on(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> Pipeline:
    generator: MaskGIT = seeded(lambda: MaskGIT(GENERATOR))
    return Pipeline(tokenizer_on(device, dtype), generator.to(device, dtype), **options)


def labels(count: int) -> Tensor:
    return torch.arange(count) % GENERATOR.num_classes


def same_levels(a: Tensor, b: Tensor) -> bool:
    """Whether 8-bit pictures differ by one level at most."""
    return bool((a.cpu().int() - b.cpu().int()).abs().max() <= 1)


def share_of_equal_rows(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() == b.cpu()).flatten(1).all(1).double().mean())


# ---------------------------------------------------------------------------------------------------------------
# Fast against plain


@DEVICES
@pytest.mark.slow
def test_tokens_and_pictures_of_the_fast_engine(device: str) -> None:
    """Samples in which no two codes are equal within rounding have the tokens, and so the pictures, of plain mode."""
    fast, plain = pipeline_on(device), pipeline_on(device, engine="plain")
    pictures = {}
    for name, pipe in (("fast", fast), ("plain", plain)):
        pictures[name] = pipe(labels(24), seed=3)
        assert pictures[name].shape == (24, 32, 32, 3)
        assert str(pictures[name].device).startswith(device)
    tokens = sample_tokens(fast.generator, labels(24), seed=3)
    with engine.plain():
        others = sample_tokens(plain.generator, labels(24), seed=3)
    assert share_of_equal_rows(tokens, others) >= 0.9
    same = (tokens == others).all(1)
    assert same_levels(pictures["fast"][same], pictures["plain"][same])
    assert len(tokens.unique(dim=0)) > 12  # the models do depend on class and seed


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_of_given_tokens(dtype: torch.dtype, device: str) -> None:
    """Prepared weights and fused ops are about as close to float64 as plain mode is."""
    tokens = torch.randint(TOKENIZER.codebook_size, (6, 16))
    with torch.no_grad():
        exact = tokenizer_on("cpu", torch.float64).decode(tokens)
        fast = tokenizer_on(device, dtype).prepare().decode(tokens.to(device))
        with engine.plain():
            plain = tokenizer_on(device, dtype).decode(tokens.to(device))

    def error(images: Tensor) -> float:
        return float((images.cpu().double() - exact).norm() / exact.norm())

    assert error(plain) < (1e-4 if dtype == torch.float32 else 0.1)
    assert error(fast) <= 2 * error(plain) + 1e-5


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoding(dtype: torch.dtype, device: str) -> None:
    """Latents are about as close to float64 as plain mode's. In float32 the tokens agree."""
    images = torch.rand(12, 3, 32, 32)
    with torch.no_grad():
        exact_model = tokenizer_on("cpu", torch.float64)
        exact, exact_tokens = exact_model.encode_latents(images.double()), exact_model.encode(images.double())
        fast = tokenizer_on(device, dtype).prepare()
        given = images.to(device, dtype)
        latents, tokens = fast.encode_latents(given), fast.encode(given)
        with engine.plain():
            plain = tokenizer_on(device, dtype).encode_latents(given)

    def error(found: Tensor) -> float:
        return float((found.cpu().double() - exact).norm() / exact.norm())

    assert error(plain) < (1e-4 if dtype == torch.float32 else 0.1)
    assert error(latents) <= 2 * error(plain) + 1e-5
    assert tokens.shape == (12, 16)
    assert str(tokens.device).startswith(device)
    agreeing = (tokens.cpu() == exact_tokens).double().mean()
    assert agreeing >= (0.98 if dtype == torch.float32 else 0.5)
    assert len(exact_tokens.unique(dim=0)) > 6  # different pictures have different tokens


# ---------------------------------------------------------------------------------------------------------------
# Many pictures, several models, streams, threads and devices


@DEVICES
@pytest.mark.slow
def test_more_pictures_than_the_largest_bucket(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = BUCKETS[-1]
    if device == "cpu":  # the same with fewer pictures
        largest = 4
        monkeypatch.setattr("titok.generation.captured.BUCKETS", (1, 2, 3, 4))
    pipe, count = pipeline_on(device), largest + 5
    together = pipe(labels(count), seed=1)
    parts = [pipe(part, seed=1, first_sample=start) for start, part in _cut(labels(count), largest)]
    assert same_levels(together, torch.cat(parts))
    assert same_levels(
        together, torch.stack(list(pipe.generate_many(labels(count), seed=1, batch_size=largest + 2)))
    )


def _cut(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


@DEVICES
@pytest.mark.slow
def test_a_model_after_others_have_died(device: str) -> None:
    """The memory of captured graphs is gone with the last of them; the next model must not read it, nor fail."""
    expected = None
    for size in (4, 4, 7, 4):
        pipe = pipeline_on(device)
        pictures = pipe(labels(size), seed=2).cpu()
        if size == 4:
            expected = pictures if expected is None else expected
            assert torch.equal(pictures, expected)
        again = pipe(labels(size), seed=2).cpu()
        assert torch.equal(pictures, again)
        del pipe
        gc.collect()
        rubbish = [
            torch.full((1 << 18,), float("nan"), device=device) for _ in range(32)
        ]  # into the memory that is free
        del rubbish


@DEVICES
@pytest.mark.slow
def test_released_graphs_are_captured_again(device: str) -> None:
    pipe = pipeline_on(device)
    before = pipe(labels(4), seed=5)
    pipe.release()
    assert torch.equal(pipe(labels(4), seed=5), before)


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """On a GPU, a context with this stream; None for a CPU."""
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        yield


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one pipeline", "two pipelines"])
def test_two_streams(shared: bool, device: str) -> None:
    """Calls on two streams, which nothing waits between, give what they give one after the other."""
    first = pipeline_on(device)
    pipes = [first, first if shared else pipeline_on(device)]
    expected = [pipes[i](labels(6), seed=i).cpu() for i in (0, 1)]
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in pipes]
    if device == "cuda":
        torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(8):
        for i, stream in enumerate(streams):
            with on_stream(stream):
                found[i].append(pipes[i](labels(6), seed=i))
    if device == "cuda":
        torch.cuda.synchronize()
    for i in (0, 1):
        assert all(torch.equal(pictures.cpu(), expected[i]) for pictures in found[i])


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one pipeline", "a pipeline each"])
def test_threads(shared: bool, device: str) -> None:
    """Also while another thread captures, each thread gets its own pictures."""
    one = pipeline_on(device)
    pipes = [one if shared else pipeline_on(device) for _ in range(3)]
    expected = [one(labels(5), seed=i).cpu() for i in range(3)]
    if shared:
        one.release()  # the threads capture again
    wrong: list[str] = []

    def work(i: int) -> None:
        try:
            with on_stream(torch.cuda.Stream() if device == "cuda" else None):
                for count in (5, 2, 5, 9, 5):
                    pictures = pipes[i](labels(count), seed=i).cpu()
                    if count == 5 and not torch.equal(pictures, expected[i]):
                        wrong.append(f"thread {i}: other pictures")
        except Exception as error:  # of a thread, which pytest does not see
            wrong.append(f"thread {i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_the_second_gpu() -> None:
    """Models there compute there, while the first one is the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first, second = pipeline_on("cuda:0"), pipeline_on("cuda:1")
    with torch.cuda.device(0):
        pictures = second(labels(6), seed=1)
        assert str(pictures.device) == "cuda:1"
        assert torch.cuda.current_device() == 0
        assert same_levels(pictures, first(labels(6), seed=1))
        assert torch.equal(second(labels(6), seed=1), pictures)
        images = torch.rand(3, 3, 32, 32)
        tokens = second.tokenizer.encode(images.to("cuda:1"))
        assert str(tokens.device) == "cuda:1"
        assert torch.equal(tokens.cpu(), first.tokenizer.encode(images.to("cuda:0")).cpu())


# ---------------------------------------------------------------------------------------------------------------
# Out of memory


def exhaust(device: torch.device) -> None:
    """Asks for more memory than there is."""
    if device.type == "cuda":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("out of memory")


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("when", ["first call", "capture"])
def test_out_of_memory(when: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error reaches the caller, smaller batches work as before, and "auto" goes on with a smaller batch."""
    pipe = pipeline_on(device)
    expected, many = pipe(labels(4), seed=1), pipe(labels(40), seed=1)
    pipe.release()
    decode_head = TiTok.decode_head

    def decode_few(self: TiTok, tokens: Tensor) -> Tensor:
        capturing = device == "cpu" or torch.cuda.is_current_stream_capturing()
        if len(tokens) > 8 and (capturing or when == "first call"):
            exhaust(tokens.device)
        return decode_head(self, tokens)

    with monkeypatch.context() as patch:  # whose end leaves `exact_convolutions` as it is
        patch.setattr(TiTok, "decode_head", decode_few)
        with pytest.raises(torch.OutOfMemoryError):
            pipe(labels(12), seed=1)
        assert torch.equal(pipe(labels(4), seed=1), expected)
        with pytest.raises(torch.OutOfMemoryError):
            pipe(labels(12), seed=1)
        assert same_levels(torch.stack(list(pipe.generate_many(labels(40), seed=1, batch_size="auto"))), many)
    assert same_levels(pipe(labels(40), seed=1), many)
    if device == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
