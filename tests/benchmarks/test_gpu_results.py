"""What is made of measurements on a GPU: the report, whether a peer is compiled, times of kernels, and tiles."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import choices, gpu_report, kernel_times, tune
from benchmarks.harness import gpu_tables
from benchmarks.harness.compiled import compiled_parts
from benchmarks.harness.results import Results, read
from titok import Pipeline

# ---------------------------------------------------------------------------------------------------------------
# Report


def on_a_gpu(path: Path, time: str) -> Results:
    """A results file whose environment is that of a GPU."""
    results = Results(None)
    results.path = path
    about = {
        "time": time,
        "gpu": "NVIDIA H200",
        "torch": "2.11.0",
        "commit": "0123456789ab",
        "command": "python -m x",
    }
    results.write({"kind": "environment", **about})
    return results


def comparison_row(results: Results, bench: str, name: str, family: str, batch: int, seconds: float) -> None:
    case = {
        "name": name, "family": family, "resolution": 512, "dtype": "bf16", "device": "cuda", "batch": batch,
        "tokens": 64, "steps": 250 if family == "dit" else 8, "parameters": 10**6, "note": "", "paper": None,
    }  # fmt: skip
    one = {"all": 1}
    results.row(
        bench, case, {"all": [seconds] * 3}, calls=one, calls_without_pixels=one, flops=1e12, flops_without_pixels=1e12,
        flops_counted=1e12, peak_bytes=2e9,
    )  # fmt: skip


def test_report_of_a_run_that_was_cut_off(tmp_path: Path) -> None:
    """The comparison has no row of "speedup" yet: the fastest batch size that was tried stands in the table."""
    path = tmp_path / "r.jsonl"
    results = on_a_gpu(path, "2026-01-01T00:00:00Z")
    for batch, seconds in ((1, 0.01), (64, 0.16), (128, 0.4)):
        comparison_row(results, "sweep", "titok-l-64-512", "titok-l-64-512", batch, seconds)
    comparison_row(results, "sweep", "DiT-XL/2 bf16, compiled", "dit", 32, 32.0)
    with path.open("a") as file:
        file.write('{"kind": "row", "bench": "swe')
    text = gpu_report.report([path])
    assert "### TiTok against DiT-XL/2, 512 pixels" in text
    assert "| img/s | 400 | 1 |" in text
    assert "| x bf16, compiled (250) | 400 | 1 |" in text
    assert "| titok-l-64-512 | 128 | 320 |" in text
    assert "NVIDIA H200" in text


def test_report_of_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results = on_a_gpu(path, "2026-01-01T00:00:00Z")
    work = {"copy": 4e9, "product": 1e12}
    results.row("ceilings", {"dtype": "bfloat16"}, {"copy": [1e-3], "product": [2e-3]}, work=work)
    samples = {"eager": [4e-3], "titok": [2e-3], "compiled": [3e-3]}
    case = {"B": 64, "C": 128, "px": 256, "residual": "no", "dtype": "bfloat16"}
    results.row("group_norm_silu", case, samples, num_bytes=4e9, flops=1e11)
    other = {"preset": "titok-l-32", "dtype": "bf16", "device": "cuda", "batch": 1}
    of_stages = {"mm": 1e12, "copy": 1e9}
    stages = {"generator": {"flops": 1e12, "bytes": 1e6}}
    timed = {name: [seconds] * 7 for name, seconds in (("mm", 0.5), ("copy", 0.1), ("generator", 1.0))}
    results.row("roofline", other, timed, work=of_stages, stages=stages)
    results.row("engine", other, {"mm": [0.5], "copy": [0.1], "titok": [0.008]}, work={**of_stages, "titok": 1e11})
    comparison_row(results, "rung", "bf16", "titok-l-32", 32, 1.0)
    kernels = {"a_kernel": {"calls": 2.0, "seconds": 3e-3}, "another": {"calls": 1.0, "seconds": 1e-3}}
    results.row("kernel_times", other, {}, kernels=kernels, ours=kernels)
    tiles = {tune.CURRENT: [2e-3], "(64, 64, 8, 2)": [1e-3]}
    results.row("tuning", {"kernel": "a_kernel", "constant": "A", "shape": "B=1"}, tiles)
    text = gpu_report.report([path])
    assert "| B=64 C=128 px=256 residual=no | bfloat16 | 2 | 2,000 | 50% | 50 | 10% | 2.00x | 1.50x |" in text
    assert "| generator | 1,000 | 1 | 500 | arithmetic | 1,000 | 2 | 500 |" in text
    assert "| titok | 125 |" in text
    assert "### Ladder of titok-l-32" in text
    assert "| a_kernel | 2 | 3 | 75% |" in text
    assert "| a_kernel | B=1 | (64, 64, 8, 2) | 1 | 2.00x |" in text
    assert gpu_tables.measured([]) == gpu_tables.NOTHING


# ---------------------------------------------------------------------------------------------------------------
# Compiled peers, kernels and tiles


@pytest.mark.slow
def test_whether_a_call_is_compiled() -> None:
    module = torch.nn.Linear(4, 4)
    compiled, x = torch.compile(module, backend="aot_eager"), torch.randn(2, 4)
    compiled(x)
    assert compiled_parts(lambda: compiled(x)) >= 1
    assert compiled_parts(lambda: module(x)) == 0
    with torch.compiler.set_stance("force_eager"):
        assert compiled_parts(lambda: compiled(x)) == 0


def test_times_of_kernels() -> None:
    class Span:
        def __init__(self, microseconds: float) -> None:
            self.microseconds = microseconds

        def elapsed_us(self) -> float:
            return self.microseconds

    def event(name: str, microseconds: float, device: Any) -> Any:
        return argparse.Namespace(name=name, time_range=Span(microseconds), device_type=device)

    kinds = torch.autograd.DeviceType
    events = [event("group_norm_silu_sums", 30.0, kinds.CUDA)] * 4 + [event("aten::mm", 9.0, kinds.CPU)]
    times = kernel_times.kernel_times([*events, event("cutlass_gemm", 10.0, kinds.CUDA)], calls=2)
    assert times["group_norm_silu_sums"] == {"calls": 2.0, "seconds": pytest.approx(60e-6)}
    assert set(times) == {"group_norm_silu_sums", "cutlass_gemm"}
    assert set(kernel_times.ours(times)) == {"group_norm_silu_sums"}


SMALL = {
    "masked_attention_forward_tiled": lambda: tune.attention(((1, 180, 1, 64),), "cpu"),
    "masked_attention_forward_whole": lambda: tune.attention(((1, 33, 1, 48),), "cpu"),
    "group_norm_silu_sums": lambda: tune.group_norm(((1, 32, 40),), "cpu"),
    "group_norm_silu_normalise": lambda: tune.group_norm(((1, 32, 40),), "cpu"),
    "place_windows": lambda: tune.windows(((1, 32, 5),), "cpu"),
    "linear_gelu": lambda: tune.gelu(3, "cpu"),
    "group_norm_silu_one_pass": lambda: tune.group_norm(((1, 64, 32),), "cpu"),
    "code_mixture_forward": lambda: tune.mixture(5, "cpu"),
    "add_layer_norm_forward": lambda: tune.add_norm(3, 512, "cpu"),
}


@pytest.fixture
def _with_triton() -> None:
    pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize("kernel", list(tune.TUNABLES))
def test_tiles_take_the_place_of_those_of_the_table(kernel: str) -> None:
    """In Triton's interpreter: the launch changes, the result does not, and the table is as before afterwards."""
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    from titok.kernels._launch import record

    tunable = tune.TUNABLES[kernel]
    (call,) = SMALL[kernel]().values()
    with torch.no_grad():
        reference = call()
        current = getattr(tune.holders(tunable.constant)[0], tunable.constant)
        with record() as before:
            call()
        assert kernel in {launch.kernel.__name__ for launch in before}
        values = [tune.with_entry(current, tunable.key, candidate) for candidate in tunable.candidates]
        changed = []
        for value in values:
            with tune.in_place(tunable.constant, value), record() as after:
                call()
            changed.append(after != before)
        assert any(changed)
        with tune.in_place(tunable.constant, values[changed.index(True)]):
            assert tune.is_close(call(), reference)
    assert getattr(tune.holders(tunable.constant)[0], tunable.constant) is current


@pytest.mark.slow
@pytest.mark.usefixtures("_with_triton")
def test_tuning_writes_a_row_for_each_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tunable = tune.TUNABLES["add_layer_norm_forward"]
    monkeypatch.setitem(
        tune.TUNABLES,
        "small",
        tunable._replace(calls=lambda device: tune.add_norm(3, 512, device), candidates=(128,)),
    )
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    tune.tune("small", Results(tmp_path / "r.jsonl"), "cpu", end=time.monotonic() + 60)
    tune.tune("small", Results(tmp_path / "r.jsonl"), "cpu", end=0.0)
    (row,) = read([tmp_path / "r.jsonl"])
    assert list(row["samples_s"]) == [tune.CURRENT, "128"]
    shown = capsys.readouterr().out
    assert "M=3 D=512" in shown
    assert "no time left" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("_with_triton")
def test_choices_that_are_off_give_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, tiny_generator: Any
) -> None:
    """In the interpreter, at small sizes: each choice computes what the default computes."""
    monkeypatch.setattr(choices, "GELU_LAYERS", ((64, 64),))
    monkeypatch.setattr(choices, "ADD_NORM_LAYERS", ((64, 128),))
    monkeypatch.setattr(choices, "ROWS", (3,))
    with torch.no_grad():
        for shape, runs in (*choices.gelu_layers("cpu"), *choices.add_norm_layers("cpu")):
            results = [run() for run in runs.values()]
            results = [result[1] if isinstance(result, tuple) else result for result in results]
            assert len(results) == 2, shape
            assert tune.is_close(*reversed(results))
    pipe = Pipeline(tiny_tokenizer(), tiny_generator())
    monkeypatch.setattr(Pipeline, "generate_many", lambda self, labels, **options: [calls.append(options)])
    calls: list[dict[str, Any]] = []
    for run in choices.stages(pipe, choices.FEW_STAGES, 2).values():
        run()
    assert calls == [{"batch_size": 1, "decode_batch_size": None}, {"batch_size": 1, "decode_batch_size": 1}]
