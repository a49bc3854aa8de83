"""`GenerationRequest`: bad input and parts of a request; every public entry checks its arguments once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from titok import GeneratorConfig, Pipeline, SamplingConfig, checks, sample_tokens
from titok.generation.request import GenerationRequest
from titok.generation.sample_sets import generate_set

Make = Callable[..., Any]
CONFIG = GeneratorConfig(4, 16, num_classes=3, sampling=SamplingConfig(steps=5))
DEFAULTS: dict[str, Any] = {
    "labels": [0, 1],
    "seed": 0,
    "first_sample": 0,
    "sampling": None,
    "rounding": "nearest",
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [4]}, ValueError, r"labels: expected classes in \[0, 3\], got 4"),
        ({"labels": [0.5]}, TypeError, "labels: expected dtype int64, got float32"),
        ({"labels": [[0]]}, ValueError, r"labels: expected shape \(B\), got \(1, 1\)"),
        ({"labels": "01"}, TypeError, "labels: expected a tensor or a sequence of ints, got '01'"),
        ({"labels": None}, TypeError, "labels: expected a tensor or a sequence of ints, got None"),
        ({"labels": [0.0, 1.0]}, TypeError, "labels: expected dtype int64, got float32"),
        ({"labels": [True, False]}, TypeError, "labels: expected dtype int64, got bool"),
        ({"labels": [0, True]}, TypeError, "labels: expected dtype int64, got bool"),
        (
            {"labels": [0, np.True_]},
            TypeError,
            "labels: expected (a tensor or a sequence of ints|dtype int64), got",
        ),
        ({"labels": np.array([True])}, TypeError, "labels: expected dtype int64, got bool"),
        ({"labels": torch.tensor([True])}, TypeError, "labels: expected dtype int64, got bool"),
        ({"labels": [1j]}, TypeError, "labels: expected dtype int64, got complex64"),
        ({"seed": True}, ValueError, "seed: expected an int"),
        ({"seed": np.float64(1)}, ValueError, "seed: expected an int"),
        ({"first_sample": torch.tensor(True)}, ValueError, "first_sample: expected an int"),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^64\), got -1"),
        ({"seed": 1.0}, ValueError, "seed: expected an int"),
        ({"first_sample": 1 << 63}, ValueError, r"first_sample: expected an int in \[0, 2\^63\)"),
        ({"sampling": {"steps": 3}}, TypeError, "sampling: expected a SamplingConfig or None, got dict"),
        ({"rounding": "up"}, ValueError, "rounding: expected 'nearest' or 'truncate', got 'up'"),
    ],
)
@pytest.mark.filterwarnings("ignore:In future, it will be an error for 'np.bool_' scalars")  # NumPy below 2
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GenerationRequest.checked(CONFIG, **{**DEFAULTS, **change})


INTEGERS = [np.int64, np.int32, np.uint8, torch.tensor]


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers_of_numpy_and_pytorch_are_integers(
    integer: Callable[[int], Any], tiny_tokenizer: Make, tiny_generator: Make, tmp_path: Any
) -> None:
    pipe = Pipeline(tiny_tokenizer(), tiny_generator())
    want = pipe([2, 0], seed=3, first_sample=5, sampling=SamplingConfig(steps=4))
    given: dict[str, Any] = {
        "labels": [integer(2), integer(0)],
        "seed": integer(3),
        "first_sample": integer(5),
        "sampling": SamplingConfig(steps=integer(4)),  # type: ignore[arg-type]
    }
    assert torch.equal(pipe(**given), want)
    assert torch.equal(torch.stack(list(pipe.generate_many(**given, batch_size=integer(2)))), want)
    generate_set(pipe, tmp_path / "a.npz", **given, batch_size=integer(2))
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], want.numpy())


@pytest.mark.parametrize("dtype", checks.INTEGER_DTYPES)
def test_tensors_of_every_integer_dtype_are_ids(
    dtype: torch.dtype, tiny_tokenizer: Make, tiny_generator: Make
) -> None:
    tokenizer, generator = tiny_tokenizer(), tiny_generator()
    tokens, labels = torch.tensor([[1, 16, 3, 16], [0, 0, 2, 9]]), torch.tensor([2, 0])
    as_ids = tokens.to(dtype), labels.to(dtype)
    assert torch.equal(generator(*as_ids), generator(tokens, labels))
    want = sample_tokens(generator, labels, init_tokens=tokens)
    assert torch.equal(sample_tokens(generator, as_ids[1], init_tokens=as_ids[0]), want)
    assert torch.equal(tokenizer.decode(as_ids[0][1:]), tokenizer.decode(tokens[1:]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.complex64])
def test_tensors_of_other_dtypes_are_named(dtype: torch.dtype, tiny_tokenizer: Make, tiny_generator: Make) -> None:
    tokenizer, generator = tiny_tokenizer(), tiny_generator()
    tokens, labels = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 0])
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("labels", lambda: generator(tokens, labels.to(dtype))),
        ("tokens", lambda: generator(tokens.to(dtype), labels)),
        ("tokens", lambda: tokenizer.decode(tokens.to(dtype))),
        ("init_tokens", lambda: sample_tokens(generator, labels, init_tokens=tokens.to(dtype))),
        ("labels", lambda: sample_tokens(generator, labels.to(dtype))),
        ("labels", lambda: sample_tokens(generator, labels.to(dtype).numpy())),
        ("labels", lambda: sample_tokens(generator, labels.to(dtype).tolist())),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name}: expected dtype int64, got "):
            call()


def test_swapped_models_are_named(tiny_tokenizer: Make, tiny_generator: Make) -> None:
    with pytest.raises(TypeError, match="tokenizer: expected a TiTok, got MaskGIT"):
        Pipeline(tiny_generator(), tiny_tokenizer())
    with pytest.raises(TypeError, match="generator: expected a MaskGIT, got TiTok"):
        Pipeline(tiny_tokenizer(), tiny_tokenizer())


def test_defaults_and_parts() -> None:
    request = GenerationRequest.checked(CONFIG, **{**DEFAULTS, "labels": range(4), "seed": 7, "first_sample": 10})
    assert request.sampling == SamplingConfig(steps=5)
    part = request.part(1, 3)
    assert (part.labels.tolist(), part.first_sample, part.seed, len(part)) == ([1, 2], 11, 7, 2)
    assert len(request.part(3, 9)) == 1
    assert len(request.part(4, 4)) == 0


def test_labels_are_a_copy() -> None:
    labels = torch.tensor([0, 1])
    request = GenerationRequest.checked(CONFIG, **{**DEFAULTS, "labels": labels})
    labels[0] = 1_000_000
    assert request.labels.tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------
# Arguments are checked once


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often the values of each argument are checked."""
    names: Counter[str] = Counter()
    check = checks._check_values

    def counted(name: str, *rest: Any) -> None:
        names[name] += 1
        check(name, *rest)

    monkeypatch.setattr(checks, "_check_values", counted)
    return names


def test_every_entry_checks_each_argument_once(
    tiny_tokenizer: Make, tiny_generator: Make, checked: Counter[str], tmp_path: Any
) -> None:
    pipe = Pipeline(tiny_tokenizer(), tiny_generator())
    labels = torch.tensor([0, 1, 2])
    tokens, images = torch.zeros(3, 4, dtype=torch.int64), torch.rand(3, 3, 16, 24)
    entries: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
        "pipeline": (lambda: pipe(labels), {"labels": 1}),
        "generate_many": (lambda: list(pipe.generate_many(labels, batch_size=1)), {"labels": 1}),
        "generate_set": (lambda: generate_set(pipe, tmp_path / "a.npz", labels, batch_size=1), {"labels": 1}),
        "sample_tokens": (lambda: sample_tokens(pipe.generator, labels), {"labels": 1}),
        "sample_tokens, init": (
            lambda: sample_tokens(pipe.generator, labels, init_tokens=tokens),
            {"labels": 1, "init_tokens": 1},
        ),
        "generator": (lambda: pipe.generator(tokens, labels), {"tokens": 1, "labels": 1}),
        "encode": (lambda: pipe.tokenizer.encode(images), {"images": 1}),
        "encode_latents": (lambda: pipe.tokenizer.encode_latents(images), {"images": 1}),
        "forward": (lambda: pipe.tokenizer(images), {"images": 1}),
        "decode": (lambda: pipe.tokenizer.decode(tokens), {"tokens": 1}),
    }
    for name, (call, expected) in entries.items():
        checked.clear()
        call()
        assert checked == expected, name
