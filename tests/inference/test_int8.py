"""Models whose transformers compute on 8-bit integers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cli_runner import NAMES, SIZE, pixels, titok
from titok import MaskGIT, Pipeline, TiTok, engine
from titok.cli.info import collect_facts
from titok.data.images import read_image
from titok.generation.request import GenerationRequest
from titok.generation.sample_sets import _settings
from titok.inference import int8, prepared, prepared_weights
from titok.inference.dtypes import choose_dtype
from titok.inference.prepared_weights import PreparedError
from titok.models.layers import BlockLinear, Linear
from titok.ops.core.available import extension, why_no_cpp
from wide_models import wide_generator, wide_tokenizer

if reason := why_no_cpp():
    pytest.skip(reason, allow_module_level=True)

MODELS = (wide_tokenizer, wide_generator)


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CPU computes the same as those with the instructions, only slower."""
    monkeypatch.setattr(int8, "why_no_int8", lambda device: None)


def block_layers(model: torch.nn.Module) -> dict[str, BlockLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockLinear)}


def test_a_weight_in_8_bits() -> None:
    weight = torch.randn(70, 32)
    weight[3] = 0
    weight[4] *= 1e-30
    quantized = int8.quantize(weight)
    assert quantized.values.shape == (2, 8, 256)
    back = int8.dequantize(quantized)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((back - weight).abs() <= step * 0.5001).all()
    assert torch.equal(back[3], torch.zeros(32))
    assert torch.allclose(quantized.total[:70], back.sum(1), atol=1e-5)
    assert torch.equal(quantized.total[70:], torch.zeros(58))
    assert torch.equal(quantized.scale[70:], torch.zeros(58))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
@torch.no_grad()
def test_a_layer_is_near_the_exact_one(dtype: torch.dtype, gelu: bool) -> None:
    layer = BlockLinear(768, 512).to(dtype)
    x = torch.randn(2, 33, 768).to(dtype)
    want = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    want = torch.nn.functional.gelu(want) if gelu else want
    layer.quantize_weights()
    assert isinstance(prepared_weights.prepared_with(layer.weight), int8.Int8Weight)
    got = layer(x, gelu)
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < 0.015
    strided = torch.randn(33, 2, 768).to(dtype).transpose(0, 1)
    assert torch.equal(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("make", MODELS)
def test_the_layers_of_transformers_are_quantised(make: Any) -> None:
    model = make()
    assert (model.precision, model.quantized) == ("float32", False)
    assert model.prepare(int8=True) is model
    assert (model.precision, model.quantized, model.prepared) == ("int8", True, True)
    layers = block_layers(model)
    assert layers
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            form = prepared_weights.prepared_with(module.weight)
            assert isinstance(form, int8.Int8Weight) == (name in layers), name
    assert model.prepare() is model
    assert model.prepare(int8=True).quantized
    assert not any(p.requires_grad for p in model.parameters())


def test_a_pipeline_in_8_bits() -> None:
    coder, model = wide_tokenizer(), wide_generator()
    want = Pipeline(copy.deepcopy(coder), copy.deepcopy(model))
    pipe = Pipeline(coder, model, dtype="int8")
    tokens = torch.randint(0, coder.config.codebook_size, (4, coder.config.num_latent_tokens))
    with torch.no_grad():
        exact, got = want.tokenizer.decode(tokens), pipe.tokenizer.decode(tokens)
        assert 0 < float((got - exact).norm() / exact.norm()) < 0.1
        logits, rounded = want.generator(tokens, torch.arange(4)), pipe.generator(tokens, torch.arange(4))
        assert 0 < float((rounded - logits).norm() / logits.norm()) < 0.1
    pictures = pipe([1, 2], seed=3)
    assert torch.equal(pictures, pipe([1, 2], seed=3))
    assert pipe.stats()["dtype"] == "int8"
    assert want.stats()["dtype"] == "float32"
    one_by_one = torch.cat([pipe([label], seed=3, first_sample=i) for i, label in enumerate([1, 2])])
    assert (one_by_one.int() - pictures.int()).abs().max() <= 1


@pytest.mark.parametrize("make", MODELS)
def test_what_needs_the_weights_says_that_they_are_gone(make: Any, tmp_path: Path) -> None:
    model = make().prepare(int8=True)
    before = {name: value.clone() for name, value in prepared.stored_values(model)}
    inputs = inputs_of(model)
    with torch.no_grad():
        want = model(*inputs)
    attempts: list[Any] = [
        model.unprepare, model.train, model.state_dict, model.double, lambda: model.requires_grad_(True),
        lambda: model.load_state_dict({}), lambda: copy.deepcopy(model), lambda: pickle.dumps(model),
        lambda: model.save_pretrained(tmp_path / "saved"), lambda: block_layers(model).popitem()[1].weight.sum(),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(PreparedError):
            attempt()
    with (
        engine.plain(),
        torch.no_grad(),
        pytest.raises(PreparedError, match="quantized to 8 bits and its original"),
    ):
        model(*inputs)
    assert not (tmp_path / "saved").exists()
    after = dict(prepared.stored_values(model))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.quantized
    assert not model.training
    with torch.no_grad():
        assert all(map(torch.equal, outputs(model(*inputs)), outputs(want)))
    model.eval()


def inputs_of(model: Any) -> tuple[Tensor, ...]:
    if isinstance(model, TiTok):
        return (torch.rand(2, 3, 32, 32),)
    return torch.zeros(2, 8, dtype=torch.int64), torch.arange(2)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if isinstance(t, Tensor))


def test_weights_that_somebody_else_holds_are_refused() -> None:
    model = wide_generator()
    view = block_layers(model).popitem()[1].weight.data
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="expected weights whose memory nobody else holds"):
        model.prepare(int8=True)
    assert not model.quantized
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del view
    assert model.prepare().prepare(int8=True).quantized


def test_weights_that_are_prepared_or_quantised_in_part() -> None:
    model = wide_generator().prepare()
    first = next(iter(block_layers(model).values()))
    prepared_weights.give_back(first.weight)
    first.quantize_weights()
    forms = [
        prepared_weights.prepared_with(layer.weight) for layer in block_layers(model.prepare(int8=True)).values()
    ]
    assert all(isinstance(form, int8.Int8Weight) for form in forms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = wide_generator().to(dtype)
    with pytest.raises(ValueError, match="prepare: expected layers in float32 or bfloat16"):
        model.prepare(int8=True)
    assert not model.prepared


def test_every_layer_of_a_pickled_checkpoint_is_quantised(tmp_path: Path) -> None:
    """Its weights are mapped into memory until somebody needs them."""
    model = wide_generator()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = MaskGIT.from_pretrained(tmp_path, int8=True)
    forms = [prepared_weights.prepared_with(layer.weight) for layer in block_layers(loaded).values()]
    assert forms
    assert all(isinstance(form, int8.Int8Weight) for form in forms)


def test_loading(models: Path) -> None:
    pipe = Pipeline.from_pretrained(models / "tokenizer", models / "generator", dtype="int8")
    assert pipe.stats()["dtype"] == "int8"
    assert pipe.tokenizer.quantized
    assert pipe.generator.quantized
    loaded = Pipeline.from_pretrained(models / "tokenizer", models / "generator", dtype=pipe.generator.dtype)
    want = Pipeline(loaded.tokenizer, loaded.generator, dtype="int8")
    assert torch.equal(pipe([1, 2]), want([1, 2]))
    for kind, folder in ((TiTok, "tokenizer"), (MaskGIT, "generator")):
        assert kind.from_pretrained(models / folder, int8=True).precision == "int8"


@pytest.mark.usefixtures("one_thread")
def test_the_command_line(models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    titok("tokenize", photos, "-t", models / "tokenizer", "--dtype", "int8", "-o", "int8.npz")
    model = TiTok.from_pretrained(models / "tokenizer", dtype=choose_dtype("int8", "cpu"), int8=True)
    tokens = torch.from_numpy(np.load("int8.npz")["tokens"]).long()
    images = [read_image(photos / name, SIZE)[None].to(model.dtype) for name in NAMES]
    assert torch.equal(tokens, torch.cat([model.encode(image) for image in images]))
    pair = ("-t", models / "tokenizer", "-g", models / "generator")
    titok("generate", *pair, "--labels", "1", "--dtype", "int8", "-o", "made.png")
    assert pixels("made.png").shape[-1] == 3


def test_a_run_knows_its_precision() -> None:
    """A set of samples is not continued with weights of another precision."""
    coder, model = wide_tokenizer(), wide_generator()
    request = GenerationRequest.checked(model.config, [1, 2], seed=0, first_sample=0, sampling=None)
    exact = _settings(Pipeline(copy.deepcopy(coder), copy.deepcopy(model)), request)
    pipe = Pipeline(coder, model, dtype="int8")
    assert _settings(pipe, request) == _settings(pipe, request)
    differ = {name for name, value in _settings(pipe, request).items() if value != exact[name]}
    assert differ == {"dtype", "tokenizer", "generator"}


def test_what_does_not_go_together() -> None:
    coder, model = wide_tokenizer(), wide_generator()
    for options in ({"engine": "plain"}, {"prepare": False}):
        with pytest.raises(ValueError, match="dtype: expected 'int8' with engine='fast' and prepare=True"):
            Pipeline(coder, model, dtype="int8", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype: expected None or 'int8', got 'bfloat16'"):
        Pipeline(coder, model, dtype="bfloat16")  # type: ignore[arg-type]
    model.train()
    with pytest.raises(RuntimeError, match="expected a model in eval mode"):
        Pipeline(coder, model, dtype="int8")
    assert not model.quantized


def test_a_dtype_of_integers_is_refused(models: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected a floating dtype, got torch\.int8"):
        Pipeline.from_pretrained(models / "tokenizer", models / "generator", dtype=torch.int8)


def test_info_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert collect_facts()["devices"]["dtype int8"] == "on cpu"
    monkeypatch.undo()
    monkeypatch.setattr(extension(), "multiplies_int8", lambda: False)
    assert collect_facts()["devices"]["dtype int8"] == "not here: this CPU has no AVX-512 VNNI"


def test_a_machine_without_the_instructions(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.undo()
    assert int8.why_no_int8("cuda") == "8-bit layers are computed on CPUs alone"
    monkeypatch.setattr(extension(), "multiplies_int8", lambda: False)
    message = "dtype: expected another one than int8, because this CPU has no AVX-512 VNNI"
    model = wide_generator()
    for attempt in (
        lambda: model.prepare(int8=True),
        lambda: MaskGIT.from_pretrained(models / "generator", int8=True),
        lambda: Pipeline.from_pretrained(models / "tokenizer", models / "generator", dtype="int8"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert not model.prepared
