"""The import graph of titok: no circle, one direction, few layers, nothing private across folders.

The graph is read from the source with `ast`, so that imports within functions count as well. So does the name of a
module that is passed to a function such as `importlib.import_module`. Imports under `if TYPE_CHECKING:` do not
count, because they never run. A wing is a folder of titok/ (`titok.models`) or a module beside the folders
(`titok.config`).
"""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"titok": ROOT / "titok", "titok.kernels": ROOT / "kernels"}  # kernels/ is installed as titok.kernels

# Who may import whom: a wing imports wings of its own level or of a level below.
LEVELS = {
    "__main__": 6,
    "cli": 5,
    "demo": 5,
    "quickstart": 5,
    "evaluation": 4,
    "generation": 4,
    "training": 4,
    "data": 3,
    "images": 3,
    "models": 3,
    "nn": 2,
    "checkpoints": 2,
    "inference": 2,
    "engine": 2,
    "ops": 1,
    "_C": 0,
    "kernels": 0,
}
# Modules that every wing may import; they import nothing but each other.
LEAVES = {"config", "checks", "processes", "profiling"}
MOST_LAYERS = 8


class Import(NamedTuple):
    """One imported name."""

    importer: str  # module
    target: str  # module
    name: str  # what is imported of the target; "" for the module itself
    where: str  # file:line

    def __str__(self) -> str:
        return f"{self.where}: {self.importer} imports {self.target}{'.' + self.name if self.name else ''}"


def modules() -> dict[str, Path]:
    """Every module of titok by its dotted name; a package stands for its __init__.py."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "titok" and parts[0] == "kernels":
                continue  # the link of a development install to kernels/
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name | ast.Attribute) and ast.unparse(part).endswith("TYPE_CHECKING")
        for part in ast.walk(node.test)
    )


def imports_beneath(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom | ast.Call]:
    """All import statements and calls beneath a node, except those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            yield child
        yield from imports_beneath(child)


def lazy_names() -> dict[str, str]:
    """The names that titok/__init__.py imports on first use, with the module that each comes from."""
    for node in ast.parse((ROOT / "titok" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    raise AssertionError("titok/__init__.py has no table _HOME of names that are imported on first use")


def imported_by(node: ast.Import | ast.ImportFrom | ast.Call, package: str) -> list[tuple[str, str]]:
    """Pairs (module, name); `package` is what a relative import starts from."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names]
    if isinstance(node, ast.Call):
        texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        return [(text, "") for text in texts if text in MODULES and text != "titok"]
    parents = package.split(".")
    base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
    module = ".".join(part for part in (base, node.module) if part)
    return [(module, alias.name) for alias in node.names]


def imports() -> list[Import]:
    lazy = lazy_names()
    found = []
    for importer, path in MODULES.items():
        if importer == EXTENSION:
            continue
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node in imports_beneath(ast.parse(path.read_text())):
            for target, name in imported_by(node, package):
                if target.split(".")[0] != "titok":
                    continue
                if f"{target}.{name}" in MODULES:
                    target, name = f"{target}.{name}", ""
                elif target == "titok" and name in lazy:
                    target = lazy[name]
                found.append(Import(importer, target, name, f"{path.relative_to(ROOT)}:{node.lineno}"))
    return found


EXTENSION = "titok._C"  # compiled, so it has no source here
MODULES = {**modules(), EXTENSION: ROOT / "titok" / "_C.so"}
IMPORTS = imports()


def wing(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "titok"


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, its first node repeated at the end; empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(edges.get(node, ())):
            if found := visit(target):
                return found
        path.pop()
        done.add(node)
        return []

    for start in sorted(edges):
        if found := visit(start):
            return found
    return []


def explain(path: list[str], node_of: Callable[[str], str]) -> str:
    """One import statement for each edge of a path; `node_of` maps modules to the nodes of the path."""
    lines = []
    for importer, target in itertools.pairwise(path):
        edges = [str(i) for i in IMPORTS if (node_of(i.importer), node_of(i.target)) == (importer, target)]
        lines.append(edges[0])
    return "\n".join(lines)


def test_the_graph_is_seen() -> None:
    """Every kind of import that titok uses is found: of modules, of names, within functions, by first use."""
    edges = {(i.importer, i.target) for i in IMPORTS}
    assert ("titok.generation.pipeline", "titok.models.tokenizer") in edges
    assert ("titok.ops.masked_attention", "titok.kernels.masked_attention") in edges
    assert ("titok.ops.core.available", "titok._C") in edges
    assert any(i.importer.startswith("titok.cli.") and i.target == "titok.generation.pipeline" for i in IMPORTS)
    assert not {i.target for i in IMPORTS} - set(MODULES), "an import of a module that does not exist"


def test_no_circle_between_modules() -> None:
    edges: dict[str, set[str]] = {}
    for i in IMPORTS:
        edges.setdefault(i.importer, set()).add(i.target)
    found = circle(edges)
    assert not found, f"modules import each other in a circle:\n{explain(found, str)}"


def wing_edges() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for i in IMPORTS:
        if wing(i.importer) != wing(i.target):
            edges.setdefault(wing(i.importer), set()).add(wing(i.target))
    edges.pop("titok", None)  # titok/__init__.py imports on first use only
    return edges


def test_no_circle_between_wings() -> None:
    found = circle(wing_edges())
    assert not found, f"wings import each other in a circle:\n{explain(found, wing)}"


def test_imports_go_one_way() -> None:
    wrong = []
    for i in IMPORTS:
        importer, target = wing(i.importer), wing(i.target)
        if importer in LEAVES:
            allowed = target in LEAVES
        else:
            assert importer in LEVELS or importer == "titok", f"{importer}: give this wing a level in {__file__}"
            allowed = target in LEAVES | {"titok"} or LEVELS[target] <= LEVELS[importer]
        if not allowed:
            wrong.append(str(i))
    assert not wrong, "imports that go upwards:\n" + "\n".join(wrong)


def test_at_most_eight_layers() -> None:
    edges = wing_edges()
    assert not circle(edges), "a graph with a circle has no longest chain"

    def longest(node: str) -> list[str]:
        chains = [longest(target) for target in edges.get(node, ()) if target not in LEAVES | {"titok", "_C"}]
        return [node, *max(chains, key=len, default=[])]

    chain = max((longest(node) for node in edges if node not in LEAVES | {"__main__"}), key=len)
    assert len(chain) <= MOST_LAYERS, f"{len(chain)} layers: {' -> '.join(chain)}\n{explain(chain, wing)}"


def test_ops_know_nothing_of_models() -> None:
    allowed = {"ops", "kernels", "_C", *LEAVES}
    wrong = [str(i) for i in IMPORTS if wing(i.importer) in ("ops", "kernels") and wing(i.target) not in allowed]
    assert not wrong, "ops import what is above them:\n" + "\n".join(wrong)


def test_nothing_private_is_imported_across_folders() -> None:
    wrong = []
    for i in IMPORTS:
        last = i.target.rpartition(".")[2]
        private = (i.name.startswith("_") and not i.name.startswith("__")) or (
            last.startswith("_") and i.target != EXTENSION
        )
        if private and MODULES[i.importer].parent != MODULES[i.target].parent:
            wrong.append(str(i))
    assert not wrong, "private names imported from another folder:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}}, []),
        ({"a": {"b"}, "b": {"a"}}, ["a", "b", "a"]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}, []),
        ({"a": {"a"}}, ["a", "a"]),
        ({"x": {"a"}, "a": {"b"}, "b": {"c"}, "c": {"a"}}, ["a", "b", "c", "a"]),
    ],
)
def test_circles_are_found(edges: dict[str, set[str]], expected: list[str]) -> None:
    assert circle(edges) == expected


def test_short_public_names_load_no_pytorch_before_they_are_used() -> None:
    code = (
        "import sys, titok.cli, titok.data; assert 'torch' not in sys.modules\n"
        "from titok.cli import app; import typer; assert isinstance(app, typer.Typer)\n"
        "assert 'torch' not in sys.modules\n"
        "from titok.data import ImageFolder; from titok.images import find_images, read_image\n"
        "import titok.data.folders, titok.data.images as images; assert ImageFolder is titok.data.folders.ImageFolder\n"
        "assert (find_images, read_image) == (images.find_images, images.read_image)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
