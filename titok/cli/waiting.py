"""How the threads of a process that titok owns wait for each other.

PyTorch computes on OpenMP threads that meet after each operator. By default they wait in a loop that keeps their core
busy. As soon as another process wants that core, each meeting takes a time slice of the scheduler. OpenMP reads its
settings when it is loaded, which is why they must be made before PyTorch is imported. docs/performance.md has the
figures.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each of them decides how threads wait


def set_waiting_policy(environment: MutableMapping[str, str] | None = None) -> None:
    """Makes GNU OpenMP's threads yield their core soon when they wait, unless the environment says how they wait.

    PyTorch's packages for Linux carry GNU OpenMP; other OpenMP libraries ignore the setting.

    To be called by a program before it imports PyTorch. A library must not call it.

    Args:
        environment: to be changed; None takes that of the process.
    """
    environment = os.environ if environment is None else environment
    if not any(variable in environment for variable in VARIABLES):
        environment["GOMP_SPINCOUNT"] = "1000"  # turns of the loop; 300,000 by default


def describe_waiting() -> str:
    """The settings of this process that decide how threads wait, as `titok info` shows them."""
    return " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "not set"
