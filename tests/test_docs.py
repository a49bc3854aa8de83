"""README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ are true.

Python blocks run, commands are parsed by the programs that they name, links and files exist, and the API reference
names everything that is public. Commands are parsed without being run; other tests run them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from PIL import Image

from benchmarks.harness.figures import figures
from benchmarks.harness.results import FOLDER, read
from cli_runner import app
from titok import MaskGIT, TiTok
from titok.config import TOKENIZER_PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Modules whose `__all__` is public.
PUBLIC_MODULES = (
    "titok",
    "titok.data",
    "titok.engine",
    "titok.images",
    "titok.ops",
    "titok.profiling",
    "titok.training",
)


class Block(NamedTuple):
    """A fenced block of a page: its language, the mark behind it ("" or "no-run"), its text and its line."""

    page: Path
    language: str
    mark: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```(\w*)(?: ([\w-]+))?\n(.*?)^```$", text, flags=re.M | re.S):
            language, mark, body = found.groups()
            if language in languages:
                yield Block(page, language, mark or "", body, text[: found.start()].count("\n") + 1)


def test_blocks_have_languages_that_are_tested() -> None:
    languages = {
        found
        for page in PAGES
        for i, found in enumerate(re.findall(r"^```(.*)$", page.read_text(), flags=re.M))
        if i % 2 == 0
    }
    assert {language.partition(" ")[0] for language in languages} == {"python", "sh", "text"}


# ---------------------------------------------------------------------------------------------------------------
# Python


@pytest.fixture
def files_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and pictures that the pages name. The models are those of the quickstart, untrained."""
    from titok.quickstart.run import GENERATOR, TOKENIZER

    monkeypatch.chdir(tmp_path)
    TiTok(TOKENIZER).save_pretrained("runs/quickstart/tokenizer")
    MaskGIT(GENERATOR).save_pretrained("runs/quickstart/generator")
    for folder in ("photos", "held-out"):
        for number in range(4):
            path = Path(folder, "ab"[number % 2], f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (60 * number, 9, 9)).save(path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("files_of_the_pages", "one_thread")
@pytest.mark.parametrize("block", [b for b in blocks("python") if b.mark != "no-run"], ids=str)
def test_python_runs(block: Block) -> None:
    names: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec"), names)
    if "images" in names:  # the block of getting-started.md
        images, tokens = names["images"], names["tokens"]
        assert isinstance(images, torch.Tensor)
        assert isinstance(tokens, torch.Tensor)
        assert images.shape == (10, 32, 32, 1)
        assert tokens.shape == (10, 8)


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.mark == "no-run"], ids=str)
def test_names_of_python_that_does_not_run_exist(block: Block) -> None:
    """Attributes of imported modules and classes, and keywords of what is called by such a name."""
    tree = ast.parse(block.text)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}

    def resolve(node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute):
            parent = resolve(node.value)
            return None if parent is None else getattr(parent, node.attr)
        return known.get(node.id) if isinstance(node, ast.Name) else None

    assert known
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node)
        elif isinstance(node, ast.Call) and (function := resolve(node.func)) is not None:
            parameters = inspect.signature(function).parameters
            assert {keyword.arg for keyword in node.keywords} <= set(parameters), ast.unparse(node)


# ---------------------------------------------------------------------------------------------------------------
# Commands


def commands(block: Block) -> Iterator[list[str]]:
    """The simple commands of a shell block, with its variables replaced and comments and environment left out."""
    variables: dict[str, str] = {}
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"[A-Z_]+=", command[0]):
                name, _, value = command.pop(0).partition("=")
                variables[name] = value
            for name, value in variables.items():
                command = [word.replace(f"${name}", value) for word in command]
            if command:
                yield command


COMMANDS = [(block, command) for block in blocks("sh") for command in commands(block)]


def check_command(words: list[str]) -> None:
    """Raises where a program that a page names would refuse its arguments."""
    program, *arguments = words
    if program == "titok":
        parse_with_click(typer.main.get_command(app), arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in arguments if "=" not in word]
        assert set(targets) <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.M)), words
        assert all(f"$({word.partition('=')[0]})" in makefile for word in arguments if "=" in word), words
    elif program == "pip":
        check_pip(arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(arguments)
        assert launched.module, words
        check_command([launched.training_script, *launched.training_script_args])
    elif program in ("nsys", "ncu"):  # which tests/benchmarks compare with what benchmarks.profile prints
        check_command(words[words.index("python") :])
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if not word.startswith("-")), words
    elif program == "python" and arguments[0] == "-m":
        check_module(*arguments[1:])
    elif program == "python":
        assert arguments == ["server.py"] or (ROOT / arguments[0]).exists(), words
    else:
        raise AssertionError(f"a program that this test does not know: {words}")


def parse_with_click(command: Any, arguments: list[str]) -> None:
    """Lets a command and its sub-commands parse their arguments, without calling any.

    Some releases of typer carry a copy of click, so that neither classes nor exceptions of click can be named here.
    """
    try:
        context = command.make_context(command.name or "titok", list(arguments))
        found = None
        if hasattr(command, "resolve_command"):
            _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    except Exception as error:
        raise AssertionError(f"{arguments}: {error}") from error
    if found is not None:
        parse_with_click(found, rest)


def check_module(module: str, *arguments: str) -> None:
    """The module exists, and its source names every option. tests/benchmarks/ lets the benchmarks parse theirs."""
    if module in ("pip", "titok"):
        check_command([module, *arguments])
    elif module == "pytest":
        check_command(["pytest", *arguments])
    elif module == "http.server":
        pass
    else:
        path = ROOT / (module.replace("titok.kernels", "kernels").replace(".", "/") + ".py")
        assert path.exists(), module


def check_pip(arguments: list[str]) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install", arguments
    for word in arguments:
        for extras in re.findall(r"\[([\w,-]+)\]", word):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), word
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).exists()


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_are_accepted(block: Block, command: list[str]) -> None:
    check_command(command)


def test_pages_show_the_main_commands() -> None:
    shown = {" ".join(command[:2]) for _, command in COMMANDS}
    assert shown >= {
        "make quickstart",
        "make test",
        "make docs",
        "make bench",
        "titok generate",
        "titok train",
    } - {
        "make docs",
        "make bench",  # in sentences
    }
    first = (ROOT / "README.md").read_text().split("\n## I want pictures")[0]
    assert re.findall(r"^make ([a-z]+)", first, flags=re.M) == ["quickstart", "test"]


def test_a_wrong_command_is_noticed() -> None:
    for command in ("titok generate -t a", "titok nothing", "titok info --colour", "make nothing", "rm x"):
        with pytest.raises(AssertionError):
            check_command(command.split())


# ---------------------------------------------------------------------------------------------------------------
# Links and files


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    named = re.findall(r"`((?:titok|kernels|csrc|docs|benchmarks|tests)/[\w/.-]*)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\nplugins:\n")[0]
    listed = set(re.findall(r": ([\w/-]+\.md)$", navigation, flags=re.M))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == written | {"index.md", "contributing.md", "changelog.md"}


# ---------------------------------------------------------------------------------------------------------------
# What the pages say


def test_table_of_published_models_is_that_of_the_presets() -> None:
    rows = re.findall(r"^\| `(titok-\S+)` \| (\d+) \| `([\w/-]+)`", (ROOT / "README.md").read_text(), flags=re.M)
    assert {name for name, _, _ in rows} == {name for name in TOKENIZER_PRESETS if not name.endswith("-512")}
    for name, tokens, repository in rows:
        assert int(tokens) == TOKENIZER_PRESETS[name].num_latent_tokens
        short = re.sub(r"titok-(\w+)-(\d+)", r"titok_\1\2", name).replace("-", "_")
        assert repository == f"yucornetto/tokenizer_{short}_imagenet"


def test_measured_figures_of_the_first_page_are_those_of_the_report() -> None:
    report = (ROOT / "docs" / "performance.md").read_text()
    readme = (ROOT / "README.md").read_text()
    table = readme.split("\n## I measure")[1].split("\n## ")[0]
    rows = re.findall(r"^\| TiTok[^|]*\|[^|]*\|([^|]*)\|([^|]*)\|[^|]*\|$", table, flags=re.M)
    ratios = [cell.strip() for row in rows for cell in row if cell.strip()]
    assert len(ratios) == 7
    found = figures(read(sorted(FOLDER.glob("*.jsonl"))))
    published = re.search(r"\b([\d.]+)x", found["published_table_fp32_1"])[1]
    by_model = [found[f"speedup_{name}_{dtype}"] for name in ("l64", "l32") for dtype in ("fp32", "bf16")]
    assert ratios == [*by_model, published, found["published_ratio"], found["int8_ratio_1"]]
    assert re.search(r"commit \w{10}\b", table)
    for commit in re.findall(r"\b[0-9a-f]{10}\b", readme):
        assert commit in report


def test_raw_signatures_are_those_that_are_registered() -> None:
    importlib.import_module("titok.ops")
    names = [n.removeprefix("titok::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("titok::")]
    names = [name for name in names if not name.startswith("test_")]  # tests/ops/test_op.py registers such ops
    registered = {
        str(getattr(torch.ops.titok, name.partition(".")[0]).default._schema).removeprefix("titok::")
        for name in names
    }
    (block,) = (b for b in blocks("text") if b.page.name == "ops.md")
    assert set(re.sub(r"\n    ", " ", block.text).splitlines()) == registered


# ---------------------------------------------------------------------------------------------------------------
# The API reference and the site


def reference() -> list[str]:
    """The names in the API reference."""
    return [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.M)
    ]


def resolve(name: str) -> Any:
    """The module, or the member of a module or class, of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(resolve(parent), attribute)


def documented_members(name: str) -> Iterator[tuple[str, Any]]:
    """What an entry of the reference shows: the object, and the public members that a class or module defines."""
    value = resolve(name)
    yield name, value
    if inspect.ismodule(value):
        public = getattr(value, "__all__", None)
        for key in public or [k for k, v in vars(value).items() if getattr(v, "__module__", "") == name]:
            if key[0] != "_" and (inspect.isclass(vars(value)[key]) or inspect.isroutine(vars(value)[key])):
                yield from documented_members(f"{name}.{key}")
    elif inspect.isclass(value):
        for key, member in vars(value).items():
            is_member = inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
            if not key.startswith("_") and is_member:
                yield f"{name}.{key}", getattr(value, key)


def test_api_reference_names_everything_that_is_public() -> None:
    names = reference()
    assert len(set(names)) == len(names)
    shown = {id(resolve(name)) for name in names}
    missing = [
        f"{module}.{name}"
        for module in PUBLIC_MODULES
        for name in importlib.import_module(module).__all__
        if module not in names and id(getattr(importlib.import_module(module), name)) not in shown
    ]
    assert not missing


def test_api_reference_documents_everything_that_it_shows() -> None:
    undocumented = [
        name for entry in reference() for name, value in documented_members(entry) if not inspect.getdoc(value)
    ]
    assert not undocumented


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"', text)
        assert not [address for pair in loaded for address in pair if re.match(r"(https?:)?//", address)], page
