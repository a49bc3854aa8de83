"""The dtype that "auto" stands for, by device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titok import Pipeline
from titok.cli.info import collect_facts
from titok.cli.options import parse_dtype
from titok.inference.dtypes import choose_dtype

OLD, NEW = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which the second multiplies bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {OLD: (7, 5), NEW: (9, 0)}[device])


@pytest.mark.usefixtures("gpus")
def test_auto_is_bfloat16_on_a_gpu_that_has_it() -> None:
    assert [choose_dtype("auto", device) for device in ("cpu", OLD, NEW, "cuda:1", torch.device("meta"))] == [
        torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32,
    ]  # fmt: skip
    for device in ("cpu", OLD, NEW):
        assert choose_dtype(torch.float16, device) == torch.float16
    assert parse_dtype("auto", NEW) == torch.bfloat16
    assert parse_dtype("float32", NEW) == torch.float32


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected a torch.dtype, 'auto' or 'int8', got 'float32'"):
        choose_dtype("float32", "cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--dtype: expected auto, float32, bfloat16, float16 or int8, got 'int4'"):
        parse_dtype("int4", torch.device("cpu"))


def test_a_pipeline_is_loaded_in_it(models: Path) -> None:
    pipe = Pipeline.from_pretrained(models / "tokenizer", models / "generator")
    assert (pipe.tokenizer.dtype, pipe.generator.dtype) == (torch.float32, torch.float32)


def test_info_names_it() -> None:
    described = collect_facts()["devices"]["dtype auto"]
    assert described.startswith("float32 on cpu")
