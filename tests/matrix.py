"""Runs the fast tests on several releases of Python, PyTorch and the other dependencies: `make test-matrix`.

Each environment is made anew in `build/matrix/`, gets an editable installation of this repository with the C++
kernels compiled for its Python, and is removed after its tests. A table of the results is printed at the end, and
written to `build/matrix/result.md`; CONTRIBUTING.md shows the last one. Packages are downloaded by pip: PyTorch with
CUDA takes 3 GB and, while its environment exists, 8 GB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
# "lowest" takes the lower bound of every dependency in pyproject.toml, "newest" the newest release that pip finds.
ENVIRONMENTS = ("3.10-lowest", "3.11-newest", "3.12-newest", "3.13-newest")
EXTRAS = ("quickstart", "examples")  # tests that need more packages are skipped
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "pytest-benchmark>=5", "rich>=13", "torchmetrics>=1.4")
SHOWN = ("torch", "triton", "numpy", "pillow", "safetensors", "huggingface_hub", "typer")
PRINT_VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}))
"""


def find_python(release: str) -> str:
    """An interpreter of this release, such as "3.12": on PATH, or one that pyenv installed."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [
        f"python{release}",
        *sorted(glob.glob(str(pyenv / "versions" / f"{release}.*" / "bin" / "python"))),
    ]
    for candidate in candidates:
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == release:
            return candidate
    raise SystemExit(f"Python {release} is neither on PATH nor in {pyenv}")


def requirements(versions: str) -> list[str]:
    """What is installed beside titok, whose bounds are those of pyproject.toml."""
    import tomllib  # of Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"]
    if versions == "lowest":
        needed = [requirement.replace(">=", "==") for requirement in needed]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return [*needed, *extras, *build, *TOOLS]


def run(name: str, pytest_options: list[str]) -> dict[str, Any]:
    """Makes one environment, runs the tests in it, and returns its versions and how many tests ended how."""
    release, _, versions = name.partition("-")
    venv, report = FOLDER / name, FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    subprocess.run([find_python(release), "-m", "venv", "--clear", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *requirements(versions)], check=True)
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"  # for ninja
    strict = {**os.environ, "PATH": path, "TITOK_BUILD": "strict"}
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "-e", "."], cwd=ROOT, env=strict, check=True)
    command = [python, "-m", "pytest", "-q", "-m", "not slow", f"--junit-xml={report}", *pytest_options]
    tests = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=ROOT, env=tests, check=False).returncode
    installed = json.loads(
        subprocess.run([python, "-c", PRINT_VERSIONS], capture_output=True, text=True, check=True).stdout
    )
    return {"name": name, "status": status, "versions": installed, "python": release, **counts(report)}


def counts(report: Path) -> dict[str, int]:
    """How many tests of a JUnit report passed, failed and were skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| Python | " + " | ".join(SHOWN) + " | passed | skipped | failed |"
    yield "| --- " * (len(SHOWN) + 4) + "|"
    for result in results:
        versions = [result["versions"].get(name, "none") for name in SHOWN]
        numbers = [str(result[key]) for key in ("passed", "skipped", "failed")]
        yield f"| {' | '.join([result['python'], *versions, *numbers])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", metavar="NAME", help=f"default: {' '.join(ENVIRONMENTS)}")
    parser.add_argument("--keep", action="store_true", help="do not remove the environments")
    parser.add_argument("--pytest", default="-n 2", metavar="OPTIONS", help="default: '-n 2'")
    options = parser.parse_args()
    names = options.environments or list(ENVIRONMENTS)
    if unknown := [name for name in names if not re.fullmatch(r"3\.\d+-(lowest|newest)", name)]:
        parser.error(f"expected names such as {ENVIRONMENTS[0]}, got {unknown[0]}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = []
    for name in names:
        print(f"== {name}", flush=True)
        results.append(run(name, options.pytest.split()))
        if not options.keep:
            shutil.rmtree(FOLDER / name)
        (FOLDER / f"{name}.json").write_text(json.dumps(results[-1]))
    lines = [f"{datetime.date.today()}", "", *table(results)]
    (FOLDER / "result.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(any(result["status"] for result in results))


if __name__ == "__main__":
    main()
