"""Who imports whom inside titok: wings in layers, no circle, nothing private of another wing."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# A wing is a folder or a file directly below titok/. It may import wings of lower layers, which come first here.
LAYERS = (
    ("config", "checks", "profiling"),
    ("kernels", "_C"),
    ("ops",),
    ("inference", "checkpoints"),
    ("models", "data"),
    ("generation", "training", "evaluation"),
    ("quickstart", "demo", "engine"),
    ("cli",),
)
LAYER_OF = {wing: number for number, layer in enumerate(LAYERS) for wing in layer}


class Import(NamedTuple):
    """`importer` (a module such as titok.cli.app) imports `name` (a module, or something in a module)."""

    importer: str
    name: str

    def __str__(self) -> str:
        return f"{self.importer} imports {self.name}"

    @property
    def wings(self) -> tuple[str, str]:
        return wing_of(self.importer), wing_of(self.name)


def wing_of(name: str) -> str:
    """ "ops" for titok.ops.philox; "titok" for titok itself and the names that it exports."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else "titok"


@functools.cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module of titok, by its name; kernels/ is installed as titok.kernels."""
    trees = {}
    for folder, package in (("titok", "titok"), ("kernels", "titok.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] == "kernels":  # a link to kernels/, with which titok runs without being installed
                continue
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            trees[name] = ast.parse(path.read_text())
    return trees


def imports_of(module: str, tree: ast.AST, *, inside_functions: bool) -> Iterator[Import]:
    """What a module imports of titok when it runs, which leaves out blocks `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "titok":
            for alias in node.names:
                yield Import(module, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "titok":
                    yield Import(module, alias.name)
        yield from imports_of(module, node, inside_functions=inside_functions)


def all_imports(*, inside_functions: bool) -> list[Import]:
    return [
        found
        for name, tree in sources().items()
        for found in imports_of(name, tree, inside_functions=inside_functions)
    ]


def test_every_wing_has_a_layer() -> None:
    wings = {name.split(".")[1] for name in sources() if "." in name}
    assert wings - {"__main__"} <= set(LAYER_OF)


def test_wings_import_lower_layers_only() -> None:
    wrong = []
    for found in all_imports(inside_functions=True):
        importer, imported = found.wings
        if "titok" in (importer, imported):  # the package itself: see the next test
            continue
        if importer != imported and LAYER_OF[importer] <= LAYER_OF[imported]:
            wrong.append(str(found))
    assert not wrong


def test_only_the_command_line_imports_the_public_names() -> None:
    """Elsewhere `from titok import TiTok` would hide which wing is imported."""
    users = {found.wings[0] for found in all_imports(inside_functions=True) if found.wings[1] == "titok"}
    assert users == {"cli"}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = set(sources())
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for found in all_imports(inside_functions=False):
        imported = found.name if found.name in modules else found.name.rpartition(".")[0]
        if imported in modules and imported != found.importer:
            graph[found.importer].add(imported)
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle


def test_nothing_private_is_imported_from_another_wing() -> None:
    wrong = []
    for found in all_imports(inside_functions=True):
        importer, imported = found.wings
        private = any(part.startswith("_") and part != "_C" for part in found.name.split(".")[1:])
        if importer != imported and private and not found.name.endswith("__version__"):
            wrong.append(str(found))
    assert not wrong
