"""`generate_set`: the layout of the file, continuing a stopped run, several processes.

This file is longer than 400 lines because all of its tests share the models and the ways to stop a run.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titok import Pipeline, SamplingConfig, TiTok
from titok.checkpoints import writing
from titok.generation import sample_sets
from titok.generation.sample_sets import generate_set

Make = Callable[..., Any]
LABELS = [0, 1, 2, 2, 1, 0, 0, 3, 1, 2, 0]


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer: Make, tiny_generator: Make) -> Pipeline:
    return Pipeline(tiny_tokenizer(), tiny_generator())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread for models so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list of what would be flushed, in place of flushing: waiting for the disk would take most of the time."""
    paths: list[Path] = []
    monkeypatch.setattr(writing, "flush", paths.append)
    return paths


@pytest.mark.parametrize("size", [1, 4, 100, "auto"])
def test_layout_of_adm(pipe: Pipeline, size: Any, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "samples.npz"
    config = SamplingConfig(steps=3)
    generate_set(pipe, path, LABELS, batch_size=size, seed=2, first_sample=3, sampling=config, rounding="truncate")
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_1"].dtype) == (np.uint8, np.int64)
        pictures, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == LABELS
    want = pipe(LABELS, seed=2, first_sample=3, sampling=config, rounding="truncate").numpy()
    assert pictures.shape == want.shape == (11, 16, 24, 3)
    assert np.abs(pictures.astype(int) - want).max() <= 1
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_set(pipe: Pipeline, tmp_path: Path) -> None:
    generate_set(pipe, tmp_path / "a.npz", [])
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (0, 16, 24, 3)
        assert file["arr_1"].shape == (0,)


def test_a_set_is_replaced(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    generate_set(pipe, path, LABELS, batch_size=4)
    before = path.read_bytes()
    generate_set(pipe, path, LABELS, batch_size=4)
    assert path.read_bytes() == before, "equal settings, equal files"
    generate_set(pipe, path, LABELS, batch_size=4, seed=1)
    assert path.read_bytes() != before


# ---------------------------------------------------------------------------------------------------------------
# Runs that are stopped


class Killed(BaseException):
    """Ends `generate_set` in place of the end of the process."""


def stopped(step: int, pipe: Pipeline, path: Path) -> bool:
    """Calls `generate_set` and kills it at step `step`; False where it ends before.

    A step is every change of a name on the disk.
    """
    count = itertools.count()

    def until_step(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any, **options: Any) -> None:
            if next(count) >= step:
                raise Killed
            change(*args, **options)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", until_step(os.replace))
        patch.setattr(Path, "unlink", until_step(Path.unlink))
        patch.setattr(Path, "rmdir", until_step(Path.rmdir))
        try:
            generate_set(pipe, path, LABELS, batch_size=4)
        except Killed:
            return True
    return False


@pytest.mark.slow
def test_a_run_that_dies_at_any_step_goes_on(pipe: Pipeline, tmp_path: Path) -> None:
    generate_set(pipe, tmp_path / "reference.npz", LABELS, batch_size=4)
    want = (tmp_path / "reference.npz").read_bytes()
    path = tmp_path / "run" / "a.npz"
    # Steps: settings, three parts and output are renamed; settings, three parts, lock and folder are removed.
    for step in range(11):
        assert stopped(step, pipe, path)
        assert path.exists() == (step > 4)
        generate_set(pipe, path, LABELS, batch_size=4)
        assert path.read_bytes() == want
        assert list(path.parent.iterdir()) == [path]
        path.unlink()
    assert not stopped(11, pipe, path), "a run has 11 steps"


def test_files_are_flushed_before_they_are_renamed(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[Path]
) -> None:
    replace, named = os.replace, []

    def checked(source: Path, target: Path) -> None:
        assert flushed[-1] == source
        named.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    generate_set(pipe, tmp_path / "a.npz", LABELS, batch_size=6)
    assert named == ["settings.json", "000000000000-000000000006.u8", "000000000006-000000000011.u8", "a.npz"]
    assert flushed[-1] == tmp_path, "the folder of the output, before the parts are removed"


def test_only_what_is_missing_is_made(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    generate_set(pipe, tmp_path / "reference.npz", LABELS, batch_size=4)
    stopped(2, pipe, path)
    assert [p.name for p in sorted((tmp_path / "a.npz.parts").glob("*.u8"))] == ["000000000000-000000000004.u8"]
    made: list[int] = []
    decode = TiTok.decode_head
    monkeypatch.setattr(
        TiTok, "decode_head", lambda self, tokens: made.append(len(tokens)) or decode(self, tokens)
    )
    generate_set(pipe, path, LABELS, batch_size=3)  # with another batch size
    assert sum(made) == 7
    reference, pictures = (np.load(p)["arr_0"].astype(int) for p in (tmp_path / "reference.npz", path))
    assert np.abs(pictures - reference).max() <= 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed 0, as in the run that was stopped here, got 1"),
        ({"first_sample": 1}, "first_sample 0"),
        ({"labels": LABELS[:-1]}, "pictures 11, as in the run that was stopped here, got 10"),
        ({"labels": LABELS[::-1]}, "labels "),
        ({"rounding": "truncate"}, "rounding nearest"),
        ({"sampling": SamplingConfig(temperature=3.0)}, "sampling.temperature 9.5"),
    ],
)
def test_other_settings_are_refused(pipe: Pipeline, change: dict[str, Any], name: str, tmp_path: Path) -> None:
    path, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    stopped(3, pipe, path)
    before = {p: p.read_bytes() for p in parts.iterdir()}
    with pytest.raises(ValueError, match=f"parts: expected {name}"):
        generate_set(pipe, path, **{"labels": LABELS, "batch_size": 4, **change})
    assert {p: p.read_bytes() for p in parts.iterdir()} == before
    generate_set(pipe, path, LABELS, batch_size=4)


def test_other_weights_are_refused(
    pipe: Pipeline, tiny_tokenizer: Make, tiny_generator: Make, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    stopped(3, pipe, path)
    for name, tokenizer, generator in (
        ("tokenizer", tiny_tokenizer(seed=1), tiny_generator()),
        ("generator", tiny_tokenizer(), tiny_generator(seed=1)),
        ("dtype", tiny_tokenizer().bfloat16(), tiny_generator().bfloat16()),
    ):
        with pytest.raises(ValueError, match=f"parts: expected {name} "):
            generate_set(Pipeline(tokenizer, generator), path, LABELS, batch_size=4)
    generate_set(Pipeline(tiny_tokenizer(), tiny_generator()), path, LABELS, batch_size=4)


def test_settings_without_pictures_may_change(pipe: Pipeline, tmp_path: Path) -> None:
    stopped(1, pipe, tmp_path / "a.npz")
    generate_set(pipe, tmp_path / "a.npz", LABELS, seed=1)


def test_two_runs_at_once_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    decode = TiTok.decode_head

    def meanwhile(self: TiTok, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) and not refused:
            refused.append("")
            with pytest.raises(ValueError, match="another process is at work here") as caught:
                generate_set(pipe, tmp_path / "a.npz", LABELS)
            refused[0] = str(caught.value)
        return decode(self, tokens)

    refused: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiTok, "decode_head", meanwhile)
        generate_set(pipe, tmp_path / "a.npz", LABELS)
    assert refused[0] == f"{tmp_path / 'a.npz.parts'}: another process is at work here"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda part: part.write_bytes(part.read_bytes()[:-40]),
        lambda part: part.write_bytes(part.read_bytes() + b"x"),
        lambda part: part.write_bytes(b""),
        lambda part: part.rename(part.with_name("000000000004-000000000008.u8")),
    ],
)
def test_a_damaged_part_is_made_again(damage: Callable[[Path], Any], pipe: Pipeline, tmp_path: Path) -> None:
    path, first = tmp_path / "a.npz", tmp_path / "a.npz.parts" / "000000000000-000000000004.u8"
    generate_set(pipe, tmp_path / "reference.npz", LABELS, batch_size=4)
    stopped(3, pipe, path)
    damage(first)
    generate_set(pipe, path, LABELS, batch_size=4)
    assert path.read_bytes() == (tmp_path / "reference.npz").read_bytes()


def test_a_part_that_is_damaged_before_the_end_stops_the_run(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = tmp_path / "a.npz", tmp_path / "a.npz.parts" / "000000000000-000000000004.u8"
    join = sample_sets._Parts.join
    with monkeypatch.context() as patch:
        patch.setattr(sample_sets._Parts, "join", lambda self, labels: (_flip(first), join(self, labels)))
        with pytest.raises(ValueError, match=f"{first.name}: damaged since it was written"):
            generate_set(pipe, path, LABELS, batch_size=4)
    assert not path.exists()
    assert len(list(first.parent.glob("*.u8"))) == 3
    generate_set(pipe, path, LABELS, batch_size=4)
    assert np.load(path)["arr_0"].shape == (11, 16, 24, 3)


def test_overlapping_parts(pipe: Pipeline, tmp_path: Path) -> None:
    """As a process leaves them that outlived its launcher beside a resumed run with another batch size."""
    path, other, parts = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "a.npz.parts"
    generate_set(pipe, tmp_path / "reference.npz", LABELS, batch_size=4)
    stopped(3, pipe, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_sets._Parts, "join", lambda self, labels: None)
        generate_set(pipe, other, LABELS, batch_size=3)
    for part in (tmp_path / "b.npz.parts").glob("*.u8"):
        part.rename(parts / part.name)
    generate_set(pipe, path, LABELS, batch_size=4)
    reference, pictures = (np.load(p)["arr_0"].astype(int) for p in (tmp_path / "reference.npz", path))
    assert np.abs(pictures - reference).max() <= 1
    assert not parts.exists()


def test_damaged_settings_are_named(pipe: Pipeline, tmp_path: Path) -> None:
    stopped(3, pipe, tmp_path / "a.npz")
    (tmp_path / "a.npz.parts" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: not a readable JSON file"):
        generate_set(pipe, tmp_path / "a.npz", LABELS, batch_size=4)


def test_mode_bits_and_link_of_the_output_stay(pipe: Pipeline, tmp_path: Path) -> None:
    target, link = tmp_path / "target.npz", tmp_path / "a.npz"
    target.touch()
    target.chmod(0o600)
    link.symlink_to("target.npz")
    generate_set(pipe, link, LABELS)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert np.load(target)["arr_0"].shape == (11, 16, 24, 3)


def test_files_of_others_stay(pipe: Pipeline, tmp_path: Path) -> None:
    parts = tmp_path / "a.npz.parts"
    parts.mkdir()
    (parts / "notes.u8").write_text("mine")
    generate_set(pipe, tmp_path / "a.npz", LABELS)
    assert [p.name for p in parts.iterdir()] == ["notes.u8"]


def test_bad_input_leaves_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    for change in ({"labels": [4]}, {"seed": -1}, {"batch_size": 0}, {"rounding": "up"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            generate_set(pipe, tmp_path / "a.npz", **{"labels": [0], **change})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fails", "named"), [(1, "settings.json"), (3, "000000000004-000000000008.u8"), (5, "a.npz")]
)
def test_a_full_disk_stops_the_run_with_the_name_of_the_file(
    fails: int, named: str, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Path] = []

    def full(path: Path) -> None:
        files.extend([path] if path.is_file() else [])
        if len(files) == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    generate_set(pipe, tmp_path / "reference.npz", LABELS, batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "flush", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
            generate_set(pipe, tmp_path / "a.npz", LABELS, batch_size=4)
    assert Path(caught.value.filename).name == named
    assert not (tmp_path / "a.npz").exists()
    assert not list(tmp_path.rglob(".titok-*"))
    generate_set(pipe, tmp_path / "a.npz", LABELS, batch_size=4)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "reference.npz").read_bytes()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
@pytest.mark.parametrize("linked", ["a.npz", "a.npz.parts"])
def test_output_and_parts_on_two_disks(linked: str, pipe: Pipeline, tmp_path: Path) -> None:
    generate_set(pipe, tmp_path / "reference.npz", LABELS, batch_size=4)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != tmp_path.stat().st_dev
        target, link = Path(other, "target"), tmp_path / linked
        if linked == "a.npz.parts":
            target.mkdir()
        link.symlink_to(target)
        assert stopped(3, pipe, tmp_path / "a.npz")
        generate_set(pipe, tmp_path / "a.npz", LABELS, batch_size=4)
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "reference.npz").read_bytes()
        assert link.is_symlink(), "a link of the user stays"
        assert os.listdir(other) == ["target"]


def test_a_process_that_outlives_its_run_is_waited_for(pipe: Pipeline, tmp_path: Path) -> None:
    path, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    assert stopped(3, pipe, path)
    survivor = sample_sets._Parts(path, (16, 24, 3), len(LABELS))
    survivor.share()
    second = sample_sets._Parts(path, (16, 24, 3), len(LABELS))
    second.share()
    second.close()
    with pytest.raises(ValueError, match=f"{parts}: another process is at work here"):
        generate_set(pipe, path, LABELS, batch_size=4)
    survivor.close()
    generate_set(pipe, path, LABELS, batch_size=4)


def test_what_killed_runs_left_is_removed(pipe: Pipeline, tmp_path: Path) -> None:
    """The temporary files of a run that still works stay."""
    path, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    assert stopped(3, pipe, path)
    for folder in (tmp_path, parts):
        (folder / ".titok-0123456789abcdef").mkdir()
        (folder / ".titok-0123456789abcdef" / "file.u8").touch()
    with writing.atomic_path(tmp_path / "other.npz") as in_use:
        in_use.write_text("content")
        generate_set(pipe, path, LABELS, batch_size=4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "other.npz"]


@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_shares_are_disjoint_and_complete(world: int, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    for missing in (np.arange(30), np.arange(0), np.array([29]), np.flatnonzero(rng.random(30) < 0.6)):
        ranges = [r for rank in range(world) for r in sample_sets._share(missing, rank, world, batch_size)]
        assert [i for start, stop in ranges for i in range(start, stop)] == missing.tolist()
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop < start or stop % batch_size == 0, "shares are cut at the start of a batch"


# ---------------------------------------------------------------------------------------------------------------
# Several processes


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def command(models: Path, output: Path, count: int, *, world: int) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"] if world > 1 else []
    arguments = ["-t", models / "tokenizer", "-g", models / "generator", "-n", count, "--batch-size", 4]
    return [sys.executable, "-m", *launcher, "titok", "generate", *map(str, arguments), "-o", str(output)]


def descendants(pid: int) -> list[int]:
    """The process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def kill(run: subprocess.Popen[str]) -> None:
    """Kills launcher and workers at the same time, so that none can clean up."""
    members = descendants(run.pid)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    run.communicate(timeout=60)


def start(models: Path, output: Path, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(models, output, count, world=2),
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_killed_in_the_middle(models: Path, tmp_path: Path) -> None:
    count = 600
    reference, path, parts = tmp_path / "reference.npz", tmp_path / "a.npz", tmp_path / "a.npz.parts"
    subprocess.run(command(models, reference, count, world=1), env=ONE_THREAD, check=True, capture_output=True)
    run = start(models, path, count)
    try:
        deadline = time.monotonic() + 120
        done = [0, 0]
        while min(done) < 10:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
            starts = [int(part.name[:12]) for part in parts.glob("*.u8")]
            done = [sum(start < count // 2 for start in starts), sum(start >= count // 2 for start in starts)]
    finally:
        kill(run)
    assert not path.exists()
    assert 20 <= len(list(parts.glob("*.u8"))) < count // 4
    continued = start(models, path, count)
    output, _ = continued.communicate(timeout=200)
    assert continued.returncode == 0, output
    assert path.read_bytes() == reference.read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, reference]
    assert output.count("600 pictures of 3 classes") == 1, "only one process reports"
