"""Loading checkpoints: shards, files that are no weights, sizes, and memory that does not depend on the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from titok import GeneratorConfig, MaskGIT, SamplingConfig, TiTok, TokenizerConfig, ViTConfig, VQGANConfig
from titok.checkpoints.pretrained import _is_finite

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = GeneratorConfig(3, 8, num_classes=2, width=16, layers=2, heads=2, mlp_width=32)


@pytest.fixture
def model() -> MaskGIT:
    return MaskGIT(GENERATOR)


@pytest.fixture
def folder(model: MaskGIT, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def shard(folder: Path, model: MaskGIT, suffix: str) -> Path:
    """Replaces the weights of a checkpoint by two shards and their index."""
    (folder / "model.safetensors").unlink()
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[suffix]
    state = model.state_dict()
    weight_map = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        save({name: state[name].clone() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load(folder: Path, model: MaskGIT, suffix: str) -> None:
    index = shard(folder, model, suffix)
    for source in (folder, index):
        again = MaskGIT.from_pretrained(source)
        assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_damaged_shards_are_named(folder: Path, model: MaskGIT, suffix: str) -> None:
    index = shard(folder, model, suffix)
    good = index.read_text()
    first = sorted(folder.glob("*-00001-*"))[0]
    for content, message in (
        (None, "weight_map: expected a JSON object"),
        ({"weight_map": None}, "weight_map: expected a JSON object"),
        ({"weight_map": {"x": 3}}, "weight_map: expected a JSON object"),
        ({"weight_map": {"x": "../../secret.bin"}}, "weight_map: expected a .* of the same folder"),
        ({"weight_map": {"x": index.name}}, "weight_map: expected a .* of the same folder"),
        ({"weight_map": {"x": first.name}}, f"{first.name}: its tensors are not those"),
    ):
        index.write_text(json.dumps(content or {}))
        with pytest.raises(ValueError, match=message):
            MaskGIT.from_pretrained(folder)
    index.write_text(good)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"{index.name}: the shard {first.name} is missing"):
        MaskGIT.from_pretrained(folder)


def _lfs_pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 489\n")


def _json(path: Path) -> None:
    path.write_text('  {"format": "titok"}')


def _compressed_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))


def _saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("model.safetensors", _lfs_pointer, "a Git LFS pointer, not the weights themselves"),
        ("pytorch_model.bin", _lfs_pointer, "a Git LFS pointer, not the weights themselves"),
        ("model.safetensors", _json, "expected weights .*, got JSON"),
        ("pytorch_model.bin", _json, "expected weights .*, got JSON"),
        ("pytorch_model.bin", _compressed_zip, "not a plain state dict"),
        ("pytorch_model.bin", lambda path: path.write_text("hello"), "not a plain state dict"),
        ("pytorch_model.bin", _saved({3: torch.zeros(1)}), "expected a state dict of tensors"),
        ("pytorch_model.bin", _saved({"x": torch.eye(3).to_sparse()}), "'x': expected a dense tensor"),
        ("pytorch_model.bin", _saved({"x": torch.zeros(1, device="meta")}), "'x': expected a dense tensor"),
        ("pytorch_model.bin", _saved({"x": torch.zeros(1).expand(10**12)}), "'x': expected a dense tensor"),
    ],
)  # fmt: skip
def test_files_that_are_no_weights(name: str, write: Callable[[Path], Any], message: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write(folder / name)
    began = time.monotonic()
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=f"{name}: {message}") as caught:
            MaskGIT.from_pretrained(source)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert time.monotonic() - began < 10


def test_config_given_for_weights(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: expected weights .*, got JSON"):
        MaskGIT.from_pretrained(folder / "config.json")


def test_weights_of_another_kind_are_named(folder: Path, model: MaskGIT) -> None:
    state = {name: value.to(torch.int32) for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"not floating: embedding\.weight is int32"):
        MaskGIT.from_pretrained(folder)


def test_weights_that_are_not_finite_are_warned_of(folder: Path, model: MaskGIT) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"not finite in lm_head.weight"):
        MaskGIT.from_pretrained(folder)


@pytest.mark.slow
def test_weights_outlive_their_file(folder: Path, model: MaskGIT) -> None:
    """In a process of its own: reading a mapping of a truncated file ends the process."""
    code = f"""
import os, torch
from titok import MaskGIT
model = MaskGIT.from_pretrained({str(folder)!r})
os.truncate({str(folder / "model.safetensors")!r}, 100)
print(sum(value.double().sum().item() for value in model.state_dict().values()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    want = sum(value.double().sum().item() for value in model.state_dict().values())
    assert float(run.stdout) == pytest.approx(want)


ABSURD = 10**9
VIT: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "patch_size": 8}
TOKENIZER: dict[str, Any] = {
    "image_size": 16, "encoder": ViTConfig(**VIT), "decoder": ViTConfig(**VIT), "num_latent_tokens": 3, "code_dim": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "base", "name", "value"),
    [
        *[(ViTConfig, VIT, name, ABSURD) for name in ("width", "layers", "patch_size", "mlp_ratio")],
        *[(TokenizerConfig, TOKENIZER, name, 1 << 30) for name in ("image_size", "codebook_size", "channels")],
        *[(TokenizerConfig, TOKENIZER, name, ABSURD) for name in ("num_latent_tokens", "code_dim")],
        *[(GeneratorConfig, GENERATOR.to_dict(), name, ABSURD) for name in ("width", "layers", "num_classes")],
        *[(VQGANConfig, {}, name, 1 << 30) for name in ("hidden_channels", "blocks_per_level", "code_dim")],
        (VQGANConfig, {}, "channel_multipliers", (1,) * 100),
        (SamplingConfig, {}, "steps", 10**8),
        (SamplingConfig, {}, "temperature", 10**400),
    ],
)
def test_absurd_sizes_are_refused(kind: Any, base: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}: expected"):
        kind(**{**base, name: value})


def test_more_parameters_than_any_model_has(folder: Path) -> None:
    wide = {**GENERATOR.to_dict(), "width": 1 << 19, "mlp_width": 1 << 20, "layers": 2}
    config = {"format": "titok", "model": "MaskGIT", "config": wide}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: expected a model of at most 100000000000 parameters"):
        MaskGIT.from_pretrained(folder)


def test_json_that_is_too_deep_or_too_large(folder: Path) -> None:
    config = folder / "config.json"
    for content in ("[" * 100_000, '{"a":' * 100_000, " " * (17 << 20), "\xff", '{"config": 1' + "0" * 5000 + "}"):
        config.write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config.json: not a readable JSON file"):
            MaskGIT.from_pretrained(folder)


@pytest.mark.parametrize("value", [None, 3, [], "text", True])
@pytest.mark.parametrize(
    "path", ["model.generator", "dataset", "dataset.preprocessing", "model.vq_model.is_legacy"]
)
def test_official_sections_of_another_type(path: str, value: Any, folder: Path) -> None:
    sizes = {"vit_enc_model_size": "small", "vit_dec_model_size": "small", "num_latent_tokens": 3, "token_size": 4}
    config: dict[str, Any] = {
        "model": {"vq_model": {**sizes, "codebook_size": 8}, "generator": {"image_seq_len": 3}},
        "dataset": {"preprocessing": {"crop_size": 16}},
    }
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="safetensors: the weights contradict" if value is True and key == "is_legacy" else key
    ):
        (MaskGIT if key == "generator" else TiTok).from_pretrained(folder)


def test_a_repository_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of the hub is replaced by one that has the configuration in its cache and may not ask the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    MaskGIT(GENERATOR).save_pretrained(tmp_path)

    def download(repo: str, name: str, revision: str | None = None) -> str:
        if name != "config.json":
            raise LocalEntryNotFoundError("outgoing traffic is disabled, set local_files_only")
        return os.fspath(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        FileNotFoundError, match="its weights are not in the local cache, and the hub is switched off"
    ):
        MaskGIT.from_pretrained("someone/some-model")


def test_loading_does_not_import_the_compiler(models: Path) -> None:
    """PyTorch's compiler takes 0.9 s and 80 MB, and loading needs none of it."""
    code = (
        "import sys, torch; from titok import Pipeline; before = 'torch._dynamo' in sys.modules;"
        "pipe = Pipeline.from_pretrained(sys.argv[1] + '/tokenizer', sys.argv[1] + '/generator');"
        "pipe([1]); sys.exit(not before and 'torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(models)], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_whether_all_values_are_finite(dtype: torch.dtype) -> None:
    for length in (1, 40, 1003):
        values = torch.randn(length).to(dtype)
        assert _is_finite(values)
        for at in {0, length // 2, length - 1}:
            for wrong in (float("nan"), float("inf"), float("-inf")):
                changed = values.clone()
                changed[at] = wrong
                assert not _is_finite(changed)
    assert _is_finite(torch.empty(0, 3, dtype=dtype))
