"""Uploading models to the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Saved(Protocol):
    """A model that is uploaded."""

    config: Any

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the model's files."""


def upload(models: Mapping[str, Saved], repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads models, each in its sub-folder of the repository, "" for the top, and README.md, the model card.

    Returns:
        the address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for subfolder, model in models.items():
            model.save_pretrained(Path(folder, subfolder))
        Path(folder, "README.md").write_text(model_card(models, repo), encoding="utf-8")
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload of titok")
    return str(commit.commit_url)


def model_card(models: Mapping[str, Saved], repo: str) -> str:
    """The text of the card: what the models are, how they are loaded, and their configurations."""
    lines = [
        "---",
        "library_name: titok",
        "pipeline_tag: unconditional-image-generation",
        "---",
        "",
        f"# {repo}",
        "",
    ]
    lines += ["Models of TiTok, an image tokenizer with a 1D sequence of tokens.", "", "```sh"]
    lines += ["pip install titok-kernels", "```", "", "```python", "import titok", ""]
    for subfolder, model in models.items():
        place = f', subfolder="{subfolder}"' if subfolder else ""
        lines.append(
            f'{type(model).__name__.lower()} = titok.{type(model).__name__}.from_pretrained("{repo}"{place})'
        )
    lines += ["```", ""]
    for model in models.values():
        lines += [f"## {type(model).__name__}", "", "| setting | value |", "| --- | --- |"]
        lines += [f"| {name} | `{value}` |" for name, value in model.config.to_dict().items()]
        lines.append("")
    return "\n".join(lines)
