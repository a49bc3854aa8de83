"""Builds `titok._C` beside the sources, with the compilers of this machine: `python -m benchmarks.harness.build`.

It needs setuptools of any release, pybind11 and a C++ compiler, and neither pip nor a network. ninja, where it is
installed, compiles in parallel and only what has changed. The script setup.py says what it leaves out, and why.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    from setuptools import Distribution, Extension

    os.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("titok_setup", ROOT / "setup.py")
    if spec is None or spec.loader is None:
        raise SystemExit("benchmarks.harness.build: setup.py is missing")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    # Without pyproject.toml, which older releases of setuptools refuse.
    extension = Extension("titok._C", sources=[], optional=True)
    distribution = Distribution({"name": "titok", "package_dir": {"titok": "titok"}, "ext_modules": [extension]})
    command = script.BuildExtension(distribution)
    command.inplace = True
    command.ensure_finalized()
    for library in Path(command.build_lib, "titok").glob("_C*.so"):
        library.unlink()  # of an earlier build, which is not to be taken for that of this one
    command.run()


if __name__ == "__main__":
    main()
