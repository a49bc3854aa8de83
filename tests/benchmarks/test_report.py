"""docs/performance.md: written from the results files, and up to date."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.harness import figures, measures
from benchmarks.harness.results import FOLDER, Results, read
from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, ViTConfig, VQGANConfig, profiling


def test_document_is_what_the_command_writes() -> None:
    assert report.document() == report.DOCUMENT.read_text()
    assert report.main(["--check"]) == 0


@pytest.mark.slow
def test_check_finds_an_edited_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "performance.md"
    monkeypatch.setattr(report, "DOCUMENT", copy)
    assert report.main([]) == 0
    once = copy.read_text()
    assert report.main([]) == 0
    assert copy.read_text() == once
    copy.write_text(once.replace("TiTok-L-64", "TiTok-L-65", 1))
    assert report.main(["--check"]) == 1


def test_template_uses_exactly_the_figures_that_exist() -> None:
    assert report.fill("a {{one}} b", {"one": "1"}) == "a 1 b"
    with pytest.raises(ValueError, match="no figure is named two"):
        report.fill("{{one}} {{two}}", {"one": "1"})
    with pytest.raises(ValueError, match="does not use the figures two"):
        report.fill("{{one}}", {"one": "1", "two": "2"})


def test_uncommitted_changes_show() -> None:
    rows = read(FOLDER.glob("*.jsonl"))
    changed = [{**row, "environment": {**row["environment"], "changed": True}} for row in rows]
    for some, shows in ((changed, True), (rows, False)):
        lines = [line for line in figures.ops(some)["op_table"].splitlines() if "| `nearest_codebook` | M" in line]
        assert lines
        assert all(("with uncommitted changes" in line) == shows for line in lines)


def test_newest_run_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    case = {"op": "a", "calls": 1}
    for time in ("2026-01-02", "2026-01-03", "2026-01-01"):
        with path.open("a") as file:
            file.write(f'{{"kind": "environment", "time": "{time}"}}\n')
        results = Results(None)
        results.path = path
        results.row("dispatch", case, {"eager": [1.0]})
        results.note(f"measured on {time}")
    rows = read([path])
    assert len(rows) == 3
    assert measures.latest(rows, "dispatch")["environment"]["time"] == "2026-01-03"
    assert measures.latest(rows, "dispatch", op="a")["environment"]["notes"] == ["measured on 2026-01-03"]
    with pytest.raises(LookupError, match="dispatch"):
        measures.latest(rows, "dispatch", op="b")


class Counted:
    """A profiling sink that counts ranges by name."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()

    def push(self, name: str) -> None:
        self.names[name] += 1

    def pop(self) -> None:
        pass


def test_calls_of_ops_in_one_image() -> None:
    vit = ViTConfig(width=32, layers=2, heads=2, patch_size=8)
    proxy = VQGANConfig(hidden_channels=32, channel_multipliers=(1, 2, 2), codebook_size=16, code_dim=8)
    decoding: dict[str, Any] = {"head": "proxy", "proxy": proxy, "pixel_decoder": True}
    tokenizer = TokenizerConfig(32, vit, vit, 32, 6, 20, **decoding)
    generator = GeneratorConfig(32, 20, num_classes=3, width=32, layers=3, heads=2, mlp_width=48)
    pipe, sink = Pipeline(TiTok(tokenizer), MaskGIT(generator)), Counted()
    with profiling.enabled(sink):
        pipe([1])
    expected = figures.calls_per_image(tokenizer, generator)
    assert {op: sink.names[op] for op in expected} == expected
