"""Which back ends take the tensors of a machine, on machines that this one is not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from titok.ops import backends
from titok.ops.core import available
from titok.ops.maskgit_decode_step import why_no_captured_step

OLD, NEW = (7, 5), (8, 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """A list of the compute capabilities of the GPUs that this machine seems to have; it has nvcc and Triton."""
    capabilities: list[tuple[int, int]] = []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(available, "_load", lambda name: SimpleNamespace(with_cuda=True))
    available.why_too_old.cache_clear()
    yield capabilities
    available.why_too_old.cache_clear()


def on_gpu(index: int) -> torch.Tensor:
    """Stands for a tensor on a GPU."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))  # type: ignore[return-value]


def test_kernels_do_not_run_on_gpus_that_are_too_old(machine: list[tuple[int, int]]) -> None:
    machine += [NEW, OLD]
    for why_not in (available.why_no_triton, available.why_no_cuda, available.why_no_flash_attn):
        assert why_not(on_gpu(0)) is None
        reason = "the kernels take GPUs of compute capability 8.0 or above, and cuda:1 has 7.5"
        assert why_not(None, on_gpu(1)) == reason
    assert why_no_captured_step(torch.device("cuda", 0)) is None
    assert why_no_captured_step(torch.device("cuda", 1)) is not None


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ([], "no CUDA device"),
        ([OLD], "the kernels take GPUs of compute capability 8.0 or above, and cuda:0 has 7.5"),
        ([OLD, NEW], "available"),
    ],
    ids=["none", "old", "old and new"],
)
def test_what_a_machine_offers(machine: list[tuple[int, int]], gpus: list[tuple[int, int]], reason: str) -> None:
    machine += gpus
    offered = backends()
    assert {offered[name] for name in ("cuda", "triton", "flash-attn")} == {reason}


@pytest.mark.parametrize("with_triton", [True, False])
def test_without_nvcc_a_step_is_captured_if_there_is_triton(
    machine: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, with_triton: bool
) -> None:
    machine += [NEW]
    there: dict[str, object] = {"titok._C": SimpleNamespace(with_cuda=False)}
    there["triton"] = SimpleNamespace() if with_triton else "triton does not import here"
    monkeypatch.setattr(available, "_load", there.__getitem__)
    reason = why_no_captured_step(torch.device("cuda", 0))
    both = "titok._C was built without nvcc; triton does not import here"
    assert reason == (None if with_triton else both)
