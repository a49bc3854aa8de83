"""`titok generate --labels` by ImageNet's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_runner import titok
from titok.data.class_names import parse_labels, read_imagenet_names


def test_the_list_is_complete() -> None:
    names = read_imagenet_names()
    assert len(names) == 1000
    assert all(name == name.strip() and name for own in names for name in own)
    # Numbers that the literature quotes.
    for number, name in (
        (0, "tench"),
        (207, "golden retriever"),
        (360, "otter"),
        (388, "giant panda"),
        (999, "toilet tissue"),
    ):
        assert name in names[number]


@pytest.mark.parametrize("number", range(0, 1000, 37))
def test_every_name_that_one_class_has_is_understood(number: int) -> None:
    names = read_imagenet_names()
    for name in names[number]:
        others = [own for own in names if any(name.lower() == other.lower() for other in own)]
        if len(others) == 1:
            assert parse_labels(name, 1000) == [number]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("golden retriever", [207]),
        ("Golden_Retriever, otter", [207, 360]),
        ("golden ret", [207]),  # the beginning of one name
        ("207,golden ret , 3", [207, 207, 3]),
        ("black and tan coonhound", [165]),  # written with hyphens
        ("ice cream", [928]),
        ("1000", [1000]),
    ],
)  # fmt: skip
def test_names_beginnings_and_numbers(text: str, numbers: list[int]) -> None:
    assert parse_labels(text, 1000) == numbers


@pytest.mark.parametrize(
    ("text", "num_classes", "message"),
    [
        ("crane", 1000, r"one class, got 'crane', which fits 134 \(crane\), 517 \(crane\)"),
        ("gol", 1000, r"one class, got 'gol', which fits 1 \(goldfish\)"),
        ("golden retreiver", 1000, "got 'golden retreiver'; similar names are golden retriever"),
        ("xyzzy", 1000, "expected a class of ImageNet, got 'xyzzy'$"),
        ("golden retriever,", 1000, "expected integers or names of ImageNet's 1,000 classes with commas between"),
        ("", 1000, "expected integers or names"),
        ("tench", 10, "--labels: expected integers with commas between, got 'tench'"),
    ],
)
def test_what_is_refused(text: str, num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_labels(text, num_classes)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_command_generates_named_classes(
    models: Path, tiny_generator: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_generator(num_classes=1000).save_pretrained(tmp_path / "generator")
    output = tmp_path / "dogs.npz"
    names = ("--labels", "golden ret, otter", "--per-class", 2)
    titok("generate", "-t", models / "tokenizer", "-g", tmp_path / "generator", *names, "-o", output)
    assert np.load(output)["arr_1"].tolist() == [207, 207, 360, 360]
