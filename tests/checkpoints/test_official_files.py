"""Official files as people have them: weights alone, the YAML of the official code, tied output layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden import recipe_weight
from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN
from titok.cli import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GeneratorConfig(4, 8, num_classes=2, width=16, layers=1, heads=2, mlp_width=32)
TOKENS = 8 + 2 + 2  # codes, classes, mask and "no class"
YAML = """
model:
  vq_model: {codebook_size: 8, num_latent_tokens: 4}
  generator:
    model_type: ViT
    hidden_size: 16
    num_hidden_layers: 1
    num_attention_heads: 2
    intermediate_size: 32
    image_seq_len: ${model.vq_model.num_latent_tokens}
    condition_num_classes: 2
"""


def official_state() -> dict[str, Tensor]:
    """Random weights of a small generator of the official layout, written down from the names of BERT."""
    layer, table = "model.encoder.layer.0", "model.embeddings"
    shapes: dict[str, tuple[int, ...]] = {
        f"{table}.word_embeddings.weight": (TOKENS, 16),
        f"{table}.position_embeddings.weight": (5, 16),
        f"{table}.token_type_embeddings.weight": (2, 16),
        f"{layer}.intermediate.dense.weight": (32, 16),
        f"{layer}.intermediate.dense.bias": (32,),
        f"{layer}.output.dense.weight": (16, 32),
        f"{layer}.output.dense.bias": (16,),
        "model.lm_head.weight": (8, 16),
        "model.lm_head.bias": (8,),
    }
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= {f"{layer}.attention.{part}.weight": (16, 16), f"{layer}.attention.{part}.bias": (16,)}
    for norm in (f"{table}.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"):
        shapes |= {f"{norm}.weight": (16,), f"{norm}.bias": (16,)}
    return {name: torch.from_numpy(recipe_weight(name, shape)) for name, shape in shapes.items()}


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a preset that is as small as the weights of these tests."""
    monkeypatch.setattr(MaskGIT, "preset_config", {"small": CONFIG}.__getitem__)
    return "small"


def logits(model: MaskGIT) -> Tensor:
    return model(torch.tensor([[0, 7, 8, 8]]), torch.tensor([1]))


def test_weights_alone_with_a_preset_or_yaml(tmp_path: Path, preset: str) -> None:
    file = tmp_path / "generator.bin"
    torch.save(official_state(), file)
    with pytest.raises(ValueError, match=r"no config.json beside it .*`preset` may name it"):
        MaskGIT.from_pretrained(file)
    expected = logits(MaskGIT.from_pretrained(file, preset=preset))
    assert torch.equal(logits(inputs.load_generator(f"preset:{preset}:{file}", "cpu", "float32")), expected)
    (tmp_path / "official.yaml").write_text(YAML)
    assert torch.equal(logits(MaskGIT.from_pretrained(file, config=tmp_path / "official.yaml")), expected)
    (tmp_path / "config.yaml").write_text(YAML)
    assert torch.equal(logits(MaskGIT.from_pretrained(file)), expected)
    with pytest.raises(ValueError, match=r"preset: expected None beside config="):
        MaskGIT.from_pretrained(file, preset=preset, config="official.yaml")
    # Weights under our own names take a preset, too.
    torch.save(MaskGIT.from_pretrained(file).state_dict(), tmp_path / "ours.bin")
    assert torch.equal(logits(MaskGIT.from_pretrained(tmp_path / "ours.bin", preset=preset)), expected)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_tied_output_layer(tmp_path: Path, preset: str, suffix: str) -> None:
    """Of a file without the weight of the output layer, it is the codes' rows of the embeddings."""
    from safetensors.torch import save_file

    state = official_state()
    wide = torch.from_numpy(recipe_weight("model.lm_head.wide.bias", (TOKENS,)))
    state["model.lm_head.weight"] = state["model.embeddings.word_embeddings.weight"][:8].clone()
    state["model.lm_head.bias"] = wide[:8].clone()
    torch.save(state, tmp_path / "untied.bin")
    del state["model.lm_head.weight"]
    state["model.lm_head.bias"] = wide
    file = tmp_path / f"tied.{suffix}"
    torch.save(state, file) if suffix == "bin" else save_file(state, file)
    tied = MaskGIT.from_pretrained(file, preset=preset)
    assert torch.equal(logits(tied), logits(MaskGIT.from_pretrained(tmp_path / "untied.bin", preset=preset)))
    assert tied.lm_head.weight.untyped_storage().data_ptr() != tied.embedding.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not a readable YAML file"), ("- 1", "expected a YAML mapping, got list")]
)
def test_damaged_yaml(tmp_path: Path, text: str, message: str) -> None:
    torch.save(official_state(), tmp_path / "generator.bin")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        MaskGIT.from_pretrained(tmp_path / "generator.bin")


def test_unknown_presets(tmp_path: Path) -> None:
    torch.save(official_state(), tmp_path / "generator.bin")
    with pytest.raises(ValueError, match="titok-l-32"):
        MaskGIT.from_pretrained(tmp_path / "generator.bin", preset="titok-l-33")
    with pytest.raises(ValueError, match="MaskGITVQGAN has no presets"):
        MaskGITVQGAN.from_pretrained(tmp_path / "generator.bin", preset="titok-l-32")
