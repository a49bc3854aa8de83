"""Whole models and pipelines with prepared weights, and the memory of their feature maps."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from titok import Pipeline, TiTok
from titok.checkpoints.pretrained import Pretrained
from titok.inference import onednn, prepared, prepared_weights
from titok.inference.prepared_weights import PreparedParameter
from titok.inference.workspace import Buffers, Workspace
from titok.models.layers import Linear
from wide_models import wide_generator, wide_tokenizer


def held(model: nn.Module) -> set[str]:
    """The names of the prepared weights."""
    return {name for name, p in model.named_parameters() if isinstance(p, PreparedParameter)}


@pytest.mark.slow
def test_a_pipeline_prepares_its_models() -> None:
    coder, model = wide_tokenizer(), wide_generator()
    want = Pipeline(coder, model, engine="plain")([1, 2])
    assert not coder.prepared
    assert not model.prepared
    pipe = Pipeline(coder, model)
    assert coder.prepared
    assert model.prepared
    assert (pipe([1, 2]).int() - want.int()).abs().max() <= 1
    model.train()
    assert not model.prepared
    assert (pipe([1, 2]).int() - want.int()).abs().max() <= 1
    assert not model.prepared, "it is in training mode"
    coder.unprepare().pixel_decoder.conv_out.bias.data += 0.2
    changed = Pipeline(copy.deepcopy(coder), copy.deepcopy(model), engine="plain")([1, 2])
    assert (pipe([1, 2]).int() - changed.int()).abs().max() <= 1
    assert coder.prepared
    assert (changed.int() - want.int()).abs().max() > 1


@pytest.mark.slow
def test_inference_mode_first_and_gradients_later() -> None:
    coder, model = wide_tokenizer(), wide_generator()
    with torch.inference_mode():
        pipe = Pipeline(coder, model)
        want = pipe([1, 2], seed=5)
    with torch.no_grad():
        assert torch.equal(pipe([1, 2], seed=5), want)
    with torch.inference_mode():
        coder.unprepare()
    coder(torch.rand(2, 3, 32, 32))[0].square().mean().backward()
    assert all(p.grad is not None for p in coder.decoder.parameters())
    model(torch.zeros(2, 8, dtype=torch.int64)).mean().backward()  # forward with gradients gives the weights back
    assert model.lm_head.weight.grad is not None
    assert not model.prepared
    assert torch.equal(pipe([1, 2], seed=5), want)


@pytest.mark.slow
def test_threads_share_pipelines_and_models() -> None:
    """One pipeline in several threads, others with the same models, and models that are given their weights back."""
    coder, model = wide_tokenizer(), wide_generator()
    learner = wide_generator().train()
    fast = Pipeline(coder, model)
    pipes = [fast, fast, Pipeline(coder, model), Pipeline(coder, model, engine="plain"), Pipeline(coder, learner)]
    want = [pipe([1, 2], seed=5) for pipe in pipes]
    wrong: list[object] = []

    def run(i: int) -> None:
        try:
            for _ in range(10):
                got = pipes[i]([1, 2], seed=5)
                if (got.int() - want[i].int()).abs().max() > 1:  # unprepared weights round differently
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    def release() -> None:
        for _ in range(10):
            fast.release()
            coder.unprepare()  # the next calls prepare them again
            model.unprepare()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(pipes))] + [
        threading.Thread(target=release)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert learner.training


@pytest.mark.slow
def test_release() -> None:
    pipe = Pipeline(wide_tokenizer(), wide_generator())
    want = pipe([1, 2])
    assert pipe._workspace._unused
    pipe.release()
    assert not pipe._workspace._unused
    assert torch.equal(pipe([1, 2]), want)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_models_are_prepared_while_they_are_loaded(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than one layer is in memory twice."""
    model = wide_tokenizer()
    model.save_pretrained(tmp_path)
    if suffix == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ordinary: list[set[str]] = []  # large weights of linear layers that hold values, after each preparation
    replace = prepared_weights.replace_weights

    def counted(*args: Any) -> None:
        replace(*args)
        large = [(name, p) for name, p in loading[0].named_parameters() if p.numel() >= 1 << 17 and p.ndim == 2]
        ordinary.append({name for name, p in large if type(p) is nn.Parameter and not p.is_meta})

    loading: list[Pretrained] = []
    make = TiTok.__init__
    monkeypatch.setattr(TiTok, "__init__", lambda self, config: (loading.append(self), make(self, config))[1])
    monkeypatch.setattr("titok.models.layers.replace_weights", counted)
    loaded = TiTok.from_pretrained(tmp_path, prepare=True)
    assert loaded.prepared
    assert held(loaded) == held(model.prepare())
    assert len(ordinary) > 20
    assert all(names == set() for names in ordinary)
    with torch.no_grad():
        tokens = torch.arange(16).view(2, 8)
        assert torch.equal(loaded.decode(tokens), model.decode(tokens))
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_save_pretrained_leaves_a_model_prepared(tmp_path: Path) -> None:
    model = wide_tokenizer()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare().save_pretrained(tmp_path)
    assert model.prepared
    loaded = TiTok.from_pretrained(tmp_path)
    assert not loaded.prepared
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------
# bfloat16 on a CPU without instructions for it


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_no_less_exact_where_it_is_emulated(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and not onednn._packs_bfloat16():
        pytest.skip("this CPU has no instructions for bfloat16")
    monkeypatch.setattr(onednn, "_packs_bfloat16", lambda: native)
    model, tokens = wide_tokenizer().bfloat16(), torch.arange(24).view(3, 8)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        want, plain = exact.decode(tokens), model.decode(tokens)
        got = model.prepare().decode(tokens)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 1.1 * (plain - want).norm()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------
# Memory of feature maps


def test_buffers_keep_the_largest_block() -> None:
    buffers = Buffers()
    large = buffers.map("a", (1, 8, 5, 4), torch.float32)
    assert large.is_contiguous(memory_format=torch.channels_last)
    assert large.shape == (1, 8, 5, 4)
    assert large.data_ptr() % 64 == 0
    small = buffers.map("a", (2, 2, 3, 3), torch.bfloat16)
    assert small.data_ptr() == large.data_ptr()
    other = buffers.map("b", (1, 1, 1, 1), torch.float32)
    buffers.exchange("a", "b")
    assert buffers.map("b", (1, 1, 2, 2), torch.float32).data_ptr() == large.data_ptr()
    assert buffers.map("a", (1, 1, 1, 1), torch.float32).data_ptr() == other.data_ptr()
    buffers.exchange("a", "c")
    assert buffers.map("c", (1, 1, 1, 1), torch.float32).data_ptr() == other.data_ptr()


def test_a_workspace_lends_each_caller_buffers_of_its_own() -> None:
    workspace = Workspace()
    with workspace.borrow() as one, workspace.borrow() as two:
        assert one is not two
    with workspace.borrow() as again:
        assert again in (one, two)
    assert copy.deepcopy(workspace)._unused == pickle.loads(pickle.dumps(workspace))._unused == []
    workspace.release()
    with workspace.borrow() as new:
        assert new not in (one, two)


@pytest.mark.skipif(not onednn.packs(torch.ones(1)), reason="this PyTorch lacks oneDNN's ops")
def test_inference_reads_no_original_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline(wide_tokenizer(), wide_generator())
    read: list[str] = []
    for model in (pipe.tokenizer, pipe.generator):
        for name, p in model.named_parameters():
            if isinstance(p, PreparedParameter):
                p.preparation = p.preparation._replace(original=lambda name=name: read.append(name))
    pipe([1, 2])
    assert len(held(pipe.tokenizer)) > 20
    assert read == []


def test_a_model_without_a_part_gets_its_other_weights_back() -> None:
    model = wide_tokenizer()
    weights = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    model.prepare()
    del model.encoder
    model.unprepare()
    assert all(torch.equal(value, weights[name]) for name, value in model.decoder.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_preparing_again_looks_at_no_layer_and_misses_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_generator()
    view = model.trunk.blocks[0].mlp.fc1.weight.view(-1)  # somebody else holds this weight
    looked: list[nn.Module] = []
    prepare_weights = Linear.prepare_weights

    def counted(self: Linear) -> None:
        looked.append(self)
        prepare_weights(self)

    monkeypatch.setattr(Linear, "prepare_weights", counted)
    everything = {name for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name}

    def prepare() -> tuple[set[str], bool]:
        looked.clear()
        model.prepare()
        return held(model), bool(looked)

    most, has_looked = prepare()
    assert has_looked
    assert "trunk.blocks.0.mlp.fc1.weight" not in most
    assert prepare() == (most, True), "a weight is left that may be free now"
    del view
    whole, has_looked = prepare()
    assert whole == most | {"trunk.blocks.0.mlp.fc1.weight"}
    assert whole <= everything
    assert has_looked
    assert prepare() == (whole, False)
    blocks = model.trunk.blocks
    blocks[1].attn.proj.weight = nn.Parameter(torch.randn(tuple(blocks[1].attn.proj.weight.shape)))
    assert prepare() == (whole, True), "another parameter"
    blocks[1].norm1.weight.requires_grad_(True)
    assert prepare() == (whole, True), "a gradient was switched on"
    assert not blocks[1].norm1.weight.requires_grad
    blocks[0].mlp.fc2 = Linear(*reversed(blocks[0].mlp.fc2.weight.shape))
    assert prepare() == (whole, True), "another layer"
    assert prepare() == (whole, False)
    prepared_weights.give_back(blocks[0].mlp.fc2.weight)
    assert prepare() == (whole, True), "a weight that was given back"
    model.unprepare()
    assert held(model) == set()
    assert prepare() == (whole, True)
    assert prepared.weights_of(copy.deepcopy(model))[0] is not prepared.weights_of(model)[0]


def test_weights_of_a_model_follow_it() -> None:
    """Also the lists that callers change."""
    model = wide_generator()
    first = prepared.weights_of(model)
    assert all(a is b for a, b in zip(first, model.parameters(), strict=True))
    first.clear()
    again = prepared.weights_of(model)
    assert all(a is b for a, b in zip(again, model.parameters(), strict=True))
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert any(t is model.lm_head.weight for t in prepared.weights_of(model))
    reference = weakref.ref(model)
    del model, again, first
    assert reference() is None, "nothing that was kept about a model keeps the model"
