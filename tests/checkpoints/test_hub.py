"""Repositories of the Hugging Face hub. A folder takes the place of the hub, so that no test needs a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, ViTConfig
from titok.cli import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = ViTConfig(16, 1, 2, 8)
TOKENIZER = TokenizerConfig(16, VIT, VIT, num_latent_tokens=3, code_dim=4, codebook_size=8, channels=1)
GENERATOR = GeneratorConfig(3, 8, num_classes=2, width=16, layers=2, heads=2, mlp_width=32)
REPO = "someone/some-model"


class Hub:
    """The client of the hub, with `root` as the only repository; records what it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.created: list[tuple[str, dict[str, Any]]] = []

    def download(self, repo: str, name: str, *, subfolder: str | None = None, **options: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        assert repo == REPO
        self.asked.append((name, options))
        path = self.root / (subfolder or "") / name
        if not path.exists():
            raise EntryNotFoundError(name)
        return str(path)

    def create_repo(self, repo: str, **options: Any) -> None:
        self.created.append((repo, options))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        shutil.copytree(folder_path, self.root, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: hub)
    return hub


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(TiTok(TOKENIZER).eval(), MaskGIT(GENERATOR).eval())


def test_options_reach_the_client(hub: Hub) -> None:
    MaskGIT(GENERATOR).save_pretrained(hub.root / "deep" / "model")
    options = {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True}
    MaskGIT.from_pretrained(REPO, subfolder="deep/model", **options)
    assert hub.asked == [(name, options) for name in ("config.json", "model.safetensors")]
    MaskGIT.from_pretrained(hub.root, subfolder="deep/model")  # of a folder, too


def test_no_option_is_passed_that_was_not_given(hub: Hub) -> None:
    MaskGIT(GENERATOR).save_pretrained(hub.root)
    MaskGIT.from_pretrained(REPO, token=False)
    assert hub.asked[0] == ("config.json", {"token": False})


def test_a_pushed_pipeline_loads_again(hub: Hub, pipe: Pipeline) -> None:
    pictures = pipe([0, 1])
    assert pipe.push_to_hub(REPO, private=True) == f"hub/{REPO}/commit/1"
    assert hub.created == [(REPO, {"private": True, "exist_ok": True})]
    again = Pipeline.from_pretrained(REPO, dtype=torch.float32, revision="v1")
    assert torch.equal(again([0, 1]), pictures)
    assert {options["revision"] for _, options in hub.asked} == {"v1"}
    card = (hub.root / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: titok\n")
    assert f'titok.TiTok.from_pretrained("{REPO}", subfolder="tokenizer")' in card
    assert "| num_latent_tokens | `3` |" in card


def test_a_pushed_model_loads_again(hub: Hub) -> None:
    model = MaskGIT(GENERATOR)
    model.push_to_hub(REPO)
    assert torch.equal(MaskGIT.from_pretrained(REPO).lm_head.weight, model.lm_head.weight)


def test_a_pipeline_is_saved_and_moved(tmp_path: Path, pipe: Pipeline) -> None:
    pictures = pipe([0, 1])
    pipe.save_pretrained(tmp_path)
    assert torch.equal(Pipeline.from_pretrained(tmp_path, dtype=torch.float32)([0, 1]), pictures)
    assert pipe.to("cpu") is pipe
    assert torch.equal(pipe([0, 1]), pictures)


def test_saved_files_name_their_format(tmp_path: Path) -> None:
    """transformers and others refuse a safetensors file that does not."""
    MaskGIT(GENERATOR).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


class Mine(MaskGIT):
    """A user's class."""


def test_subclasses_load(tmp_path: Path) -> None:
    MaskGIT(GENERATOR).save_pretrained(tmp_path / "a")
    mine = Mine.from_pretrained(tmp_path / "a")
    assert type(mine) is Mine
    mine.save_pretrained(tmp_path / "b")
    assert type(Mine.from_pretrained(tmp_path / "b")) is Mine
    assert type(MaskGIT.from_pretrained(tmp_path / "b")) is MaskGIT
    with pytest.raises(ValueError, match="expected a TiTok, got a 'MaskGIT'"):
        TiTok.from_pretrained(tmp_path / "b")


def test_the_command_line_takes_a_revision(hub: Hub) -> None:
    MaskGIT(GENERATOR).save_pretrained(hub.root)
    inputs.load_generator(f"{REPO}@v2", "cpu", "float32")
    assert hub.asked[0] == ("config.json", {"revision": "v2"})
