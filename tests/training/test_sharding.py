"""Sharded training (FSDP2) by two processes: the results and files of DDP, and of a run in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from recipes import FIRST, config_of, perceptual, seeded, train, train_in_float64
from recipes import pictures as colour_pictures
from safetensors import safe_open
from safetensors.torch import load_file
from test_distributed import difference, train_and_stop

from titok import TiTok
from titok.training.folder import CHECKPOINT
from titok.training.metrics import SPEED, read_metrics
from titok.training.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGES: dict[str, Any] = {
    "micro_batch_size": 2, "steps": 6, "checkpoint_every": 3, "restart_every": 3, "log_every": 1, "shard": True,
}  # fmt: skip


def mean_error(model: TiTok, images: torch.Tensor) -> dict[str, float]:
    """A figure that each process computes by itself, on as many batches as it likes."""
    return {"error": float(perceptual(model.decode(model.encode(images)), images))}


def train_decoder(out: Path) -> TiTok:
    """Stage 2, with a discriminator, activations that are computed again, pictures and measurements."""
    changes = {**CHANGES, "picture_every": 3, "evaluate_every": 3, "checkpoint_activations": True}
    trained = train("decoder", out, changes, held_out=colour_pictures(2), measure=mean_error)
    assert isinstance(trained, TiTok)
    trained.decode(trained.encode(colour_pictures(2)))  # in any process, without the others
    return trained


def train_sharded_and_by_ddp(out: Path) -> None:
    """Trains two recipes in float64. One has a discriminator and code restarts, the other transformer blocks."""
    for kind in ("vqgan", "vit"):
        check_shares(train_in_float64(kind, out / f"{kind} in float64", CHANGES))
        train_in_float64(kind, out / f"{kind} by DDP", {**CHANGES, "shard": False})


def check_shares(run: Run[Any]) -> None:
    """Each process keeps about half of the weights, of the averages and of the optimizer's state."""
    assert run.ema is not None
    states = [state for state in run.parts[""].optimizer.state.values() if "exp_avg" in state]
    for sharded in (
        list(run.parts[""].names),
        list(run.ema.averages.values()),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
    ):
        kept = sum(tensor.to_local().numel() for tensor in sharded)  # type: ignore[attr-defined]
        assert 0.4 < kept / sum(tensor.numel() for tensor in sharded) < 0.6


def figures(out: Path) -> list[dict[str, Any]]:
    """The entries of a run without what says how fast it was. The norm of gradients that overflow is NaN."""
    return [
        {key: value if math.isfinite(value) else math.nan for key, value in entry.items() if key not in SPEED}
        for entry in read_metrics(out)
    ]


def check_equal_in_float64(a: Path, b: Path) -> None:
    """Averaged weights, raw weights, and all else in the checkpoints of two runs agree to 1e-10."""
    assert difference(a, b) < 1e-10
    assert difference(a / "raw", b / "raw") < 1e-10
    one, other = (load_file(folder / CHECKPOINT) for folder in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-10, msg=name)


def check_figures(a: Path, b: Path) -> None:
    """The figures of two runs are equal up to rounding."""
    assert len(figures(a)) == len(figures(b))
    for one, other in zip(figures(a), figures(b), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True), a.name


@pytest.mark.slow
def test_two_processes_share_the_state(tmp_path: Path) -> None:
    """One start of two processes for all cases, because starting them takes longer than the cases do."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_and_stop("vqgan", two / "begun by one process", CHANGES, 4)
    code = f"""
        import test_sharding as test
        two = Path({str(two)!r})
        test.train_sharded_and_by_ddp(two)
        test.train_decoder(two / "decoder")
        train("uvit", two / "float16", {{**test.CHANGES, "precision": "float16"}})
        train("vqgan", two / "begun by one process", test.CHANGES, resume=True)
        test.train_and_stop("vit", two / "begun by two processes", test.CHANGES, 4)
    """
    in_processes(2, code)
    train("vit", two / "begun by two processes", {**CHANGES, "shard": False}, resume=True)

    for kind in ("vqgan", "vit"):
        sharded = two / f"{kind} in float64"
        check_equal_in_float64(sharded, two / f"{kind} by DDP")
        train_in_float64(kind, one / sharded.name, CHANGES)
        check_equal_in_float64(sharded, one / sharded.name)
    trained = train_decoder(one / "decoder")
    train("uvit", one / "float16", {**CHANGES, "precision": "float16"})
    train("vqgan", one / "begun by one process", CHANGES)
    train("vit", one / "begun by two processes", CHANGES)

    for out in sorted(one.iterdir()):
        other = two / out.name
        check_figures(out, other)
        names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, other)]
        assert names[0] == names[1]
        checkpoints = [load_file(folder / CHECKPOINT) for folder in (out, other)]
        kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in checkpoints]
        assert kinds[0] == kinds[1]
    weights, encoder = TiTok.from_pretrained(two / "decoder").state_dict(), seeded(TiTok, FIRST).state_dict()
    for name in encoder:
        if name.startswith(("encoder.", "quantizer.")):
            assert torch.equal(weights[name], encoder[name]), f"{name} is frozen"
    assert not trained.training
    with safe_open(two / "decoder" / CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["training"])["config"]["shard"] is True


def test_one_process_shares_nothing(tmp_path: Path) -> None:
    for shard in (True, False):
        train("vit", tmp_path / str(shard), {"steps": 4, "shard": shard})
    assert difference(tmp_path / "True", tmp_path / "False") == 0


def test_compiled_networks_are_not_sharded() -> None:
    with pytest.raises(
        ValueError, match=r"shard: expected False where compile is True: use one of the two, got True"
    ):
        config_of("vit", shard=True, compile=True)
