"""Reading and writing models: round trips, damaged files, pickles with code, interrupted writes."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden import recipe_state
from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, TiTok, TokenizerConfig, ViTConfig, VQGANConfig
from titok.checkpoints.files import atomic_path, read_weights, write_json, write_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = ViTConfig(16, 1, 2, 8)
TOKENIZER = TokenizerConfig(16, VIT, VIT, num_latent_tokens=3, code_dim=4, codebook_size=8, channels=1)
GENERATOR = GeneratorConfig(3, 8, num_classes=2, width=16, layers=2, heads=2, mlp_width=32)
VQGAN = VQGANConfig(hidden_channels=32, channel_multipliers=(1,), blocks_per_level=1, codebook_size=4, code_dim=4)
OFFICIAL_GENERATOR = {
    "model": {
        "vq_model": {"codebook_size": 256, "num_latent_tokens": 16},
        "generator": {
            "model_type": "ViT",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "image_seq_len": "${model.vq_model.num_latent_tokens}",
            "condition_num_classes": 20,
        },
    }
}


@pytest.mark.parametrize(
    ("kind", "config"), [(TiTok, TOKENIZER), (MaskGIT, GENERATOR), (MaskGITVQGAN, VQGAN)], ids=["T", "G", "V"]
)
def test_round_trip(kind: Any, config: Any, tmp_path: Path) -> None:
    model = kind(config)
    model.save_pretrained(tmp_path / "deep" / "folder")
    for where in (tmp_path / "deep" / "folder", tmp_path / "deep" / "folder" / "model.safetensors"):
        again = kind.from_pretrained(where)
        assert again.config == config
        assert not again.training
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["config.json", "model.safetensors"]


def test_official_pickle_with_position_ids(tmp_path: Path) -> None:
    """A pickled state dict with `position_ids`, a buffer that older releases of transformers saved."""
    state = recipe_state("generator_vit")
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_GENERATOR))
    torch.save({**state, "model.embeddings.position_ids": torch.arange(17)[None]}, tmp_path / "pytorch_model.bin")
    model = MaskGIT.from_pretrained(tmp_path)
    assert model.config.num_latent_tokens == 16
    qkv = model.state_dict()["trunk.blocks.0.attn.qkv.weight"]
    assert torch.equal(qkv[128:256], state["model.encoder.layer.0.attention.self.key.weight"])


class RunsAShellCommand:
    """Unpickling it runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MaskGIT(GENERATOR).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state, file = {"x": RunsAShellCommand()}, tmp_path / "pytorch_model.bin"
    for write in (lambda: torch.save(state, file), lambda: file.write_bytes(pickle.dumps(state))):
        write()
        with pytest.raises(ValueError, match=r"pytorch_model.bin: not a plain state dict"):
            MaskGIT.from_pretrained(tmp_path)
        assert not (tmp_path / "pwned").exists()
    torch.save({"x": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        MaskGIT.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    TiTok(TOKENIZER).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        TiTok.from_pretrained(tmp_path)
    broken = tmp_path / "w.bin"
    torch.save({"x": torch.zeros(1000)}, broken)
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w.bin: not a plain state dict"):
        read_weights(broken)


def test_contradictions_list_every_name(tmp_path: Path) -> None:
    TiTok(TOKENIZER).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["surprise"] = state.pop("decoder.embed.bias")
    state["encoder.latent_tokens"] = torch.zeros(2, 16)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        TiTok.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing: decoder.embed.bias" in message
    assert "unexpected: surprise" in message
    assert "misshapen: encoder.latent_tokens is (2, 16), expected (3, 16)" in message
    assert "\n" not in message


def test_wrong_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither of model.safetensors, pytorch_model.bin"):
        TiTok.from_pretrained(tmp_path)
    MaskGIT(GENERATOR).save_pretrained(tmp_path / "g")
    with pytest.raises(ValueError, match="expected a TiTok, got a 'MaskGIT'"):
        TiTok.from_pretrained(tmp_path / "g")
    (tmp_path / "g" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a readable JSON file"):
        MaskGIT.from_pretrained(tmp_path / "g")
    (tmp_path / "g" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json beside it"):
        MaskGIT.from_pretrained(tmp_path / "g")


def test_official_config_without_a_generator(tmp_path: Path) -> None:
    config = {"model": {"vq_model": OFFICIAL_GENERATOR["model"]["vq_model"]}}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config.json: model.generator is missing: this checkpoint holds a tokenizer"
    ):
        MaskGIT.from_pretrained(tmp_path)


def test_unknown_repository_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such-repository", "not a/repository id!"):
        with pytest.raises(FileNotFoundError, match="no such file or folder, and no such repository"):
            TiTok.from_pretrained(name)


def test_repository_is_read_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File names and revision are passed on to the hub's client, which is replaced by one that reads a folder."""
    from huggingface_hub.errors import EntryNotFoundError

    model = MaskGIT(GENERATOR)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    asked = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    again = MaskGIT.from_pretrained("someone/some-model", revision="v1")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert asked == [
        ("someone/some-model", n, "v1") for n in ("config.json", "model.safetensors", "pytorch_model.bin")
    ]


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]
    with atomic_path(target) as temporary:
        temporary.write_text("after")
    assert target.read_text() == "after"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_permissions_are_those_of_the_umask_or_of_the_replaced_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask belongs to the whole process: writing a file must not change it, not even for a moment."""
    (tmp_path / "touched").touch()
    by_umask = (tmp_path / "touched").stat().st_mode
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    target = tmp_path / "weights.safetensors"
    write_safetensors(target, {"x": torch.zeros(1)})
    assert target.stat().st_mode == by_umask
    target.chmod(0o640)
    write_safetensors(target, {"x": torch.ones(1)})
    assert target.stat().st_mode & 0o777 == 0o640
    assert read_weights(target)["x"].item() == 1


WRITERS: dict[str, Any] = {
    "safetensors": lambda path: write_safetensors(path, {"x": torch.rand(50_000)}),
    "json": lambda path: write_json(path, ["text" * 1000] * 100),
    "atomic_path": lambda path: _write_bytes(path),
}


def _write_bytes(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(bytes(200_000))


@pytest.mark.parametrize("writer", WRITERS)
def test_mode_bits_and_links_of_a_replaced_file_stay(writer: str, tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("before")
    target.chmod(0o600)
    link.symlink_to(Path("elsewhere", "target"))
    WRITERS[writer](link)
    assert link.is_symlink()
    assert target.stat().st_size > 1000
    assert target.stat().st_mode & 0o7777 == 0o600
    target.unlink()
    WRITERS[writer](link)  # the link leads nowhere
    assert link.is_symlink()
    assert target.stat().st_size > 1000
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_private_file_is_never_readable_by_others(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.touch(0o600)
    seen, chmod = [], os.chmod

    def watched(path: Path, mode: int) -> None:
        seen.append(path.parent.stat().st_mode & 0o077)  # of the temporary folder that it is written in
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", watched)
    WRITERS[writer](target)
    assert seen == [0]


@pytest.mark.parametrize("writer", WRITERS)
def test_the_longest_name_can_be_written(writer: str, tmp_path: Path) -> None:
    target = tmp_path / ("x" * 250 + ".json")
    WRITERS[writer](target)
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_with_the_path(writer: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk, which a test cannot have."""
    target = tmp_path / "target"
    target.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{target}'$") as caught:
            WRITERS[writer](target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.slow
def test_import_is_silent_and_needs_nothing_optional() -> None:
    """In a process that cannot import Triton, the extension or flash-attn, and in which warnings are errors."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "flash_attn", "sklearn", "matplotlib") or name == "titok._C":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import titok
assert "torch" not in sys.modules
import titok.ops, torch
from titok import TiTok, MaskGIT, Pipeline, sample_tokens
from titok.config import GeneratorConfig
tokens = sample_tokens(MaskGIT(GeneratorConfig(4, 8, width=8, layers=1, heads=1, mlp_width=8)), [0, 1])
assert tokens.shape == (2, 4)
assert "does not import here" in titok.ops.backends()["cpp"]
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.skipif("TITOK_OFFICIAL_WEIGHTS" not in os.environ, reason="TITOK_OFFICIAL_WEIGHTS names no folder")
def test_official_weights() -> None:
    """The tokens of the published L-32 for the official sample image (ILSVRC2012_val_00010240.png, 256x256)."""
    from titok.data.images import read_image

    folder = Path(os.environ["TITOK_OFFICIAL_WEIGHTS"])
    model = TiTok.from_pretrained(folder / "tokenizer_titok_l32_imagenet")
    (picture,) = folder.glob("ILSVRC2012_val_00010240.*")
    tokens = model.encode(read_image(picture, (256, 256))[None])
    assert tokens[0, :8].tolist() == [887, 3979, 349, 720, 2809, 2743, 2101, 603]
