"""Hooks of MkDocs: pages from files at the top of the repository, and links that work on the site too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Files at the top of the repository, by the page that shows them.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `PAGES`."""
    for page, name in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page, with links as the site needs them.

    In the repository `README.md` links to `docs/ops.md`, and `docs/ops.md` to `../README.md`. On the site both are
    pages of one folder.
    """
    if page.file.src_uri in PAGES:
        markdown = markdown.replace("](docs/", "](")
    for target, name in PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}(?=[)#])", f"]({target}", markdown)
    # A code block may be marked for the tests behind its language, as in "python no-run".
    return re.sub(r"^```(\w+) [\w-]+$", r"```\1", markdown, flags=re.M)
