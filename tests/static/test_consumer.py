"""Type checkers accept a program that uses titok, so that titok's annotations serve its users."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSUMER = Path(__file__).with_name("consumer.py")


@pytest.mark.slow
def test_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    options = ["--strict", "--config-file", os.devnull, "--ignore-missing-imports", "--follow-imports", "silent"]
    # A cache of its own: that of the project is for other options.
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path), str(CONSUMER)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_pyright(tmp_path: Path) -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    # Where the checker looks for packages: those of this interpreter, and titok in this working tree.
    folders = ", ".join(f'"{folder}"' for folder in (ROOT, *sys.path[1:]) if Path(folder).is_dir())
    config = tmp_path / "pyrightconfig.json"
    config.write_text(f'{{"include": ["{CONSUMER}"], "extraPaths": [{folders}], "typeCheckingMode": "standard"}}')
    run = subprocess.run([pyright, "-p", str(config)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_public_names_have_types(tmp_path: Path) -> None:
    """`pyright --verifytypes`: the share of public names whose type a checker knows without inference."""
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    # pyright asks the `python` of PATH where packages are.
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = [pyright, "--verifytypes", "titok", "--ignoreexternal", "--outputjson"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert json.loads(run.stdout)["typeCompleteness"]["completenessScore"] >= 0.95
