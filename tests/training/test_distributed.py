"""Training by several processes: the same weights as by one, and resumption by another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from recipes import KINDS, train, train_in_float64
from safetensors.torch import load_file
from test_training import Stop, content, generator_training, stop_at

from titok import MaskGIT
from titok.training import train_generator
from titok.training.checkpoint import read_run_info
from titok.training.folder import CHECKPOINT
from titok.training.generator import GeneratorObjective
from titok.training.optim import decayed_parameters, learning_rate
from titok.training.order import seed_of, shuffled_batches

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

# Two micro-batches of two.
TWO: dict[str, Any] = {"micro_batch_size": 2, "steps": 20, "restart_every": 3}


def difference(a: Path, b: Path) -> float:
    """The largest difference of weights, relative to the largest weight of the tensor."""
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)


FOUR: dict[str, Any] = {**TWO, "micro_batch_size": 1}  # four micro-batches of one
IN_FLOAT64 = ("vqgan", "vit")  # a recipe with discriminator, code restarts and averages, and a transformer
STOPPED = ("decoder", "vit")  # recipes that two processes begin and one ends


def train_on_four_micro_batches(out: Path) -> None:
    """Trains in float32, and in float64."""
    train("vit", out / "float32", FOUR)
    for kind in IN_FLOAT64:
        # Steps of Adam enlarge rounding errors by as much as they change weights: smaller ones keep them below 1e-10.
        train_in_float64(kind, out / kind, {**FOUR, "learning_rate": 1e-3})


def train_and_stop(kind: str, out: Path, changes: dict[str, Any], call: int) -> None:
    """Trains until an exception when gradients are clipped for the time `call`, from 0."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, call)
        with pytest.raises(Stop):
            train(kind, out, changes)


def train_too_few_micro_batches(out: Path) -> None:
    """One micro-batch cannot be shared by two processes."""
    words = "^micro_batch_size: expected a number of micro-batches that 2 processes"
    with pytest.raises(ValueError, match=words):
        train("tokenizer", out)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have trained: one start for all tests, because a start takes longer than most of them."""
    out = tmp_path_factory.mktemp("two")
    code = f"""
        import test_distributed as test
        out = Path({str(out)!r})
        for kind in KINDS:
            train(kind, out / kind, test.TWO)
        for kind in test.STOPPED:
            test.train_and_stop(kind, out / "stopped" / kind, test.TWO, 15)
        test.train_on_four_micro_batches(out / "four micro-batches")
        test.train_too_few_micro_batches(out / "refused")
    """
    in_processes(2, code)
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes have trained."""
    out = tmp_path_factory.mktemp("four")
    code = f"""
        import test_distributed as test
        out = Path({str(out)!r})
        test.train_on_four_micro_batches(out / "four micro-batches")
    """
    in_processes(4, code)
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has trained by every recipe."""
    out = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in KINDS:
        train(kind, out / kind, TWO)
    torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_bit_for_bit(kind: str, one: Path, two: Path) -> None:
    assert content(one / kind) == content(two / kind)


def test_four_micro_batches_on_any_number_of_processes(tmp_path: Path, two: Path, four: Path) -> None:
    train_on_four_micro_batches(tmp_path)
    for folder in (two / "four micro-batches", four / "four micro-batches"):
        assert difference(tmp_path / "float32", folder / "float32") < 1e-4
        for kind in IN_FLOAT64:
            assert difference(tmp_path / kind, folder / kind) < 1e-10


@pytest.mark.parametrize("kind", STOPPED)
def test_a_run_goes_on_by_another_number_of_processes(kind: str, one: Path, two: Path) -> None:
    assert 0 < read_run_info(two / "stopped" / kind / CHECKPOINT)["step"] < 20
    train(kind, two / "stopped" / kind, TWO, resume=True)
    assert content(one / kind) == content(two / "stopped" / kind)


def test_processes_that_cannot_share_are_refused(two: Path) -> None:
    assert not (two / "refused" / CHECKPOINT).exists()


def test_a_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """The mean loss of the micro-batches, minimised by AdamW after a warm-up, with clipped gradients."""
    config = generator_training(batch_size=6, micro_batch_size=2, steps=4, clip_norm=0.5, class_dropout=0.0)
    tokens, labels = torch.arange(32).reshape(8, 4) % 16, torch.arange(8) % 3
    trained = train_generator(tokens, labels, config, tmp_path, progress=False)
    torch.manual_seed(seed_of(config.seed))
    model = MaskGIT(config.model)
    decays = decayed_parameters(model)
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if (n in decays) == decay],
            "weight_decay": decay * 0.03,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.96), foreach=False)
    order = shuffled_batches(8, 6, config.seed)
    for step in range(4):
        losses = []
        for number, indices in enumerate(next(order).split(2)):
            torch.manual_seed(seed_of(config.seed, 0, step, number))
            losses.append(GeneratorObjective(model, config, tokens, labels)(indices, step).loss)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, base=3e-3, final=1e-5, warmup=2, total=4)
        optimizer.step()
    for one, other in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
