"""How threads of titok's own processes wait: set before PyTorch is loaded, never over a user's setting."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from titok.cli.waiting import VARIABLES, set_waiting_policy


def test_a_setting_of_the_user_stays() -> None:
    for name in VARIABLES:
        environment = {name: "7"}
        set_waiting_policy(environment)
        assert environment == {name: "7"}
    empty: dict[str, str] = {}
    set_waiting_policy(empty)
    assert empty == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["-m", "titok", "--version"], ["-m", "benchmarks.waiting", "--help"]], ids=str
)
def test_programs_set_it_before_they_load_pytorch(command: list[str]) -> None:
    hook = (
        "import sys, os, runpy\n"
        "class Hook:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print('policy', os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)\n"
        "sys.meta_path.insert(0, Hook())\n"
        f"sys.argv = {['program', *command[2:]]!r}\n"
        f"runpy.run_module({command[1]!r}, run_name='__main__')\n"
        "import torch\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    program = hook.replace("runpy.run_module", "try: runpy.run_module").replace(
        "import torch\n", "finally: import torch\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "policy 1000" in done.stderr, done.stderr
    assert "policy None" not in done.stderr


@pytest.mark.slow
def test_the_library_sets_nothing() -> None:
    program = (
        "import os; before = dict(os.environ); import torch, titok, titok.ops, titok.engine; titok.Pipeline;"
        "titok.TiTok(titok.TokenizerConfig(image_size=16, num_latent_tokens=4, code_dim=4, codebook_size=16,"
        "encoder=titok.ViTConfig(32, 1, 2, 8), decoder=titok.ViTConfig(32, 1, 2, 8))).eval().prepare();"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
