"""Training by several processes: the same weights as by one, and resumption by another number of processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import KINDS, train
from safetensors.torch import load_file
from test_training import content, generator_training, pictures, tokenizer_training

from titok import MaskGIT, TiTok
from titok.training import train_generator
from titok.training.checkpoint import read_run_info
from titok.training.folder import CHECKPOINT, RunFolder
from titok.training.generator import GeneratorObjective
from titok.training.optim import decayed_parameters, learning_rate
from titok.training.order import seed_of, shuffled_batches
from titok.training.run import Run
from titok.training.tokenizer import TokenizerObjective

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

# Two micro-batches of two.
TWO: dict[str, Any] = {"micro_batch_size": 2, "steps": 20, "restart_every": 3}


def start_processes(count: int, code: str) -> list[subprocess.Popen[str]]:
    """Starts code in `count` processes that form a group; it may use `train`, `KINDS` and `Path`."""
    script = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from pathlib import Path
        import torch
        from recipes import KINDS, train
        from titok.processes import process_group
        torch.set_num_threads(1)
        with process_group():
        """
    ) + textwrap.indent(textwrap.dedent(code), "    ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]


def in_processes(count: int, code: str) -> None:
    """Runs code in `count` processes, as `start_processes` takes it, to its end."""
    processes = start_processes(count, code)
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)


def difference(a: Path, b: Path) -> float:
    """The largest difference of weights, relative to the largest weight of the tensor."""
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)


def test_two_processes_train_as_one_bit_for_bit(tmp_path: Path) -> None:
    for kind in KINDS:
        train(kind, tmp_path / "one" / kind, TWO)
    in_processes(2, f"for kind in KINDS: train(kind, Path({str(tmp_path / 'two')!r}) / kind, {TWO!r})")
    for kind in KINDS:
        assert content(tmp_path / "one" / kind) == content(tmp_path / "two" / kind), kind


def test_four_micro_batches_on_any_number_of_processes(tmp_path: Path) -> None:
    changes = {**TWO, "micro_batch_size": 1}
    train("vit", tmp_path / "1", changes)
    for count in (2, 4):
        in_processes(count, f"train('vit', Path({str(tmp_path / str(count))!r}), {changes!r})")
        assert difference(tmp_path / "1", tmp_path / str(count)) < 1e-4


def train_in_float64(out: Path) -> None:
    """Trains a tokenizer in float64 on four micro-batches a step."""
    config = tokenizer_training(batch_size=12, micro_batch_size=3, steps=20, ema_decay=0.9)
    torch.manual_seed(0)
    model = TiTok(config.model).double()
    images = pictures().double()
    with RunFolder(out, resume=False) as folder:
        run = Run(TokenizerObjective(model, config), config, folder, data={})
        run.train((images[indices] for indices in run.batches(len(images))), name="", progress=False)


def test_four_micro_batches_in_float64(tmp_path: Path) -> None:
    train_in_float64(tmp_path / "1")
    for count in (2, 4):
        code = f"import test_distributed; test_distributed.train_in_float64(Path({str(tmp_path / str(count))!r}))"
        in_processes(count, code)
        assert difference(tmp_path / "1", tmp_path / str(count)) < 1e-10


def test_a_run_goes_on_by_another_number_of_processes(tmp_path: Path) -> None:
    kinds = ("decoder", "vit")
    code = f"""
        import test_training, pytest
        for kind in {kinds!r}:
            with pytest.MonkeyPatch.context() as patch:
                test_training.stop_at(patch, 15)
                try:
                    train(kind, Path({str(tmp_path / "cut")!r}) / kind, {TWO!r})
                except test_training.Stop:
                    pass
    """
    in_processes(2, code)
    for kind in kinds:
        train(kind, tmp_path / "whole" / kind, TWO)
        assert read_run_info(tmp_path / "cut" / kind / CHECKPOINT)["step"] < 20
        train(kind, tmp_path / "cut" / kind, TWO, resume=True)
        assert content(tmp_path / "whole" / kind) == content(tmp_path / "cut" / kind), kind


def test_processes_that_cannot_share_are_refused(tmp_path: Path) -> None:
    code = f"""
        try:
            train("tokenizer", Path({str(tmp_path / "a")!r}))
        except ValueError as error:
            assert str(error).startswith("micro_batch_size: expected a number of micro-batches that 2 processes")
        else:
            raise AssertionError("not refused")
    """
    in_processes(2, code)
    assert not (tmp_path / "a" / CHECKPOINT).exists()


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
