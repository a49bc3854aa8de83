"""docs/ops-limits.md is true: its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "ops-limits.md").read_text()


def test_python_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["out"].shape == (2, 33, 64)
    assert names["result"].indices.shape == (2, 16, 16)
