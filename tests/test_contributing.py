"""What CONTRIBUTING.md, CHANGELOG.md and pyproject.toml say of the sources is true, and complete."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import titok

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
SOURCES = ("setup.py", "titok", "kernels", "csrc", "benchmarks", "tests")


def section(title: str) -> str:
    return CONTRIBUTING.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(table: str) -> list[str]:
    """The first `name` of every row."""
    return re.findall(r"^\| `([^`]+)`", table, flags=re.M)


def files(*suffixes: str) -> Iterator[Path]:
    for name in SOURCES:
        paths = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
        yield from (path for path in paths if path.suffix in suffixes)


# ---------------------------------------------------------------------------------------------------------------
# Environment variables

READS = (
    r'environ\.get\(\s*"([A-Z_]+)"',
    r'environ\.setdefault\(\s*"([A-Z_]+)"',
    r'environ\["([A-Z_]+)"\]',
    r'"([A-Z_]+)" (?:not )?in os\.environ',
    r'getenv\(\s*"([A-Z_]+)"',
)


def test_every_environment_variable_that_is_read_is_in_the_table() -> None:
    text = "\n".join(path.read_text() for path in files(".py", ".h", ".cpp", ".cu", ".cuh"))
    read = {name for pattern in READS for name in re.findall(pattern, text)}
    for listed in re.findall(r"^VARIABLES = \((.*)\)", text, flags=re.M):
        read |= set(re.findall(r'"([A-Z_]+)"', listed))
    assert len(read) > 8
    assert sorted(read) == sorted(first_column((ROOT / "docs" / "environment.md").read_text()))


# ---------------------------------------------------------------------------------------------------------------
# Module-level state

MUTABLE = {
    "ContextVar", "Library", "Lock", "OrderedDict", "RLock", "WeakKeyDictionary", "_LastBackends", "defaultdict",
    "deque", "local",
}  # fmt: skip


def last_name(node: ast.expr | None) -> str:
    """The last part of a dotted name: "Lock" for `threading.Lock`."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_cached(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(d) for d in node.decorator_list)


def state_of(tree: ast.Module) -> Iterator[str]:
    """Names of a module's caches and of its variables that a call can change."""
    thread_local = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(last_name(base) == "local" for base in node.bases)
    }

    def is_mutable(value: ast.expr | None) -> bool:
        if isinstance(value, ast.Call):
            return last_name(value.func) in MUTABLE | thread_local
        return (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)

    for node in tree.body:
        if is_cached(node):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and is_mutable(node.value):
            yield ast.unparse(node.target)
        elif isinstance(node, ast.Assign) and is_mutable(node.value):
            yield from (ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else []
            yield from (
                ast.unparse(n) for n, value in zip(names, node.value.elts, strict=False) if is_mutable(value)
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names


def test_all_module_level_state_is_in_the_table() -> None:
    found = set()
    for folder in ("titok", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (
                "kernels" in path.relative_to(ROOT).parts[1:]
            ):  # a link to kernels/, with which titok runs without being installed
                continue
            for name in state_of(ast.parse(path.read_text())):
                found.add(f"{path.relative_to(ROOT).as_posix()}: {name}")
    assert len(found) > 8
    listed = set()
    for row in re.findall(r"^\| `(?:titok|kernels)/.*", section("Module-level state"), flags=re.M):
        path, *names = re.findall(r"`([^`]+)`", row.rsplit("|", 2)[0])
        listed |= {f"{path}: {name}" for name in names}
    assert sorted(listed) == sorted(found)


# ---------------------------------------------------------------------------------------------------------------
# Files, version, source distribution


def test_named_files_exist() -> None:
    named = set(re.findall(r"`((?:titok|kernels|csrc|docs|benchmarks|tests)/[\w/.]*)`", CONTRIBUTING))
    named |= set(re.findall(r"\]\(([\w/.]+)\)", CONTRIBUTING))
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]


def test_one_version() -> None:
    """The version is written in titok/__init__.py alone, and an installed titok has the same one."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", titok.__version__)
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert f"\n## {titok.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("titok-kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == titok.__version__


@pytest.mark.slow
def test_source_distribution(tmp_path: Path) -> None:
    """It has the version of the sources, and every file that building and installing needs."""
    pytest.importorskip("setuptools")
    code = "import os, sys; os.chdir(sys.argv[1]); import setuptools.build_meta as b; print(b.build_sdist(sys.argv[2]))"
    run = [sys.executable, "-c", code, str(copy_of_tracked_files(tmp_path / "copy")), str(tmp_path)]
    subprocess.run(run, check=True, capture_output=True, text=True)
    with tarfile.open(tmp_path / f"titok_kernels-{titok.__version__}.tar.gz") as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    needed = {name for name in needed if re.match(r"(titok|kernels|csrc)/.*\.|[^/]*\.(py|md|txt|toml)$", name)}
    assert len(needed) > 100
    assert needed | {"LICENSE"} <= packed
    assert not [name for name in packed if name.startswith(("tests", "benchmarks", "docs"))]


def copy_of_tracked_files(folder: Path) -> Path:
    """A copy of the working tree without what git ignores: building writes into the folder that it builds."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder
