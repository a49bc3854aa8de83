"""Tests of ops ask for Triton as they would on a machine with a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from titok.ops.core import available
from titok.ops.core.op import Op


@pytest.fixture(autouse=True)
def _triton_is_asked_for_on_gpu_tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that asks for Triton by name on CPU tensors, which only Triton's interpreter takes.

    On a machine with a GPU there is no interpreter, and such a test fails. It must make its tensors within
    `triton_device` or `device_of_backend`, or on the `DEVICE` of its module. A call that is refused for the same
    reason on both machines is allowed.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    of_backend = "device_of_backend" in request.fixturenames and parameters.get("backend") == "triton"
    if torch.cuda.is_available() or of_backend or "triton_device" in request.fixturenames:
        return
    if hasattr(request.module, "DEVICE"):
        return
    choose = Op.choose

    def choose_as_with_a_gpu(self: Op, requested: str | None, arguments: Any) -> Any:
        if requested == "triton":
            with monkeypatch.context() as without_interpreter:
                without_interpreter.setattr(available, "interpreting", lambda: False)
                reason = self.backends["triton"].why_not(arguments)
            assert "Triton kernels take CUDA tensors" not in str(reason), (
                f"{self.name}: this test asks for Triton on CPU tensors, which fails on a machine with a GPU"
            )
        return choose(self, requested, arguments)

    monkeypatch.setattr(Op, "choose", choose_as_with_a_gpu)
