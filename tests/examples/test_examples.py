"""Every example runs as its help says, at a small size, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for annotations that are looked up by the name of the module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["vqvae", "text_encoder", "inpainting", "token_swap", "server"])
def test_help_shows_how_to_run_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "server":
        pytest.importorskip("fastapi")
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--help"])
    assert ended.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# VQ-VAE


def test_vqvae_learns(capsys: pytest.CaptureFixture[str]) -> None:
    load("vqvae").main(["--steps", "12", "--batch-size", "4", "--size", "16", "--codes", "32"])
    errors = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.slow
def test_vqvae_compiled_in_mixed_precision_by_two_processes(tmp_path: Path) -> None:
    """Both processes end with the same weights and codes, which are finite."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "vqvae.py"), "--amp", "--compile", "aot_eager", "--save", str(tmp_path / "weights")]
    command += ["--steps", "3", "--batch-size", "2", "--size", "16", "--codes", "32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step ") == 3
    first, second = (torch.load(tmp_path / f"weights.{rank}", weights_only=True) for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.isfinite(value).all()


def test_vqvae_has_the_indices_of_vector_quantize_pytorch() -> None:
    other = pytest.importorskip("vector_quantize_pytorch")
    example = load("vqvae")
    model = example.VQVAE(codes=64).eval()
    theirs = other.VectorQuantize(dim=8, codebook_size=64, accept_image_fmap=True).eval()
    theirs.codebook = model.quantizer.codebook
    images = example.random_pictures(3, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.encoder[-1].weight *= 50  # spreads the latents of random weights over the codes
        _, indices, _ = theirs(model.encoder(images))
        assert torch.equal(model(images)[2], indices)
    assert len(indices.unique()) > 3


# ---------------------------------------------------------------------------------------------------------------
# Text encoder


@pytest.mark.slow
def test_the_exported_text_encoder_is_the_model(tmp_path: Path) -> None:
    example = load("text_encoder")
    assert example.main(["one", "a longer text", "--save", str(tmp_path / "encoder.pt2")]) < 1e-6
    torch.manual_seed(0)
    model, loaded = example.TextEncoder().eval(), torch.export.load(tmp_path / "encoder.pt2").module()
    for texts in (["x"], ["some", "texts of", "other lengths than those"], ["ü" * 200] * 2):
        text = example.padded(texts)
        with torch.no_grad():
            torch.testing.assert_close(loaded(text), model(text))


def test_padding_does_not_change_a_text() -> None:
    example = load("text_encoder")
    model = example.TextEncoder().eval()
    texts = ["short", "a text that is longer"]
    with torch.no_grad():
        alone = torch.cat([model(example.padded([text])) for text in texts])
        torch.testing.assert_close(model(example.padded(texts)), alone)


# ---------------------------------------------------------------------------------------------------------------
# In-painting and token swaps


def test_inpainting_keeps_tokens(tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    tokens = load("inpainting").main(["--keep", "0-2,5", "--classes", "2", "--draws", "3", "-o", str(output)])
    assert tokens.shape == (2, 4, 8)
    assert (tokens[:, :, [0, 1, 2, 5]] == tokens[:, :1, [0, 1, 2, 5]]).all()
    assert (tokens[:, 1] != tokens[:, 2]).any()
    with Image.open(output) as picture:
        assert picture.size == (4 * 34 - 2, 2 * 34 - 2)


def test_inpainting_with_saved_models(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    tokens = load("inpainting").main(["--models", str(models), "--keep", "0", "-o", str(output)])
    assert tokens.shape == (4, 6, 4)
    assert output.exists()


def test_token_swap(models: Path, photos: Path, tmp_path: Path) -> None:
    example = load("token_swap")
    first, second = torch.arange(3), torch.arange(10, 13)
    expected = [
        [[0, 1, 2], [10, 1, 2], [10, 11, 2], [10, 11, 12]],
        [[10, 11, 12], [0, 11, 12], [0, 1, 12], [0, 1, 2]],
    ]
    assert example.swapped(first, second).tolist() == expected
    pictures = [str(photos / name) for name in ("a.png", "b.png")]
    tokens = example.main(["--models", str(models), "--pictures", *pictures, "-o", str(tmp_path / "a.png")])
    assert tokens.shape == (2, 5, 4)
    assert torch.equal(tokens[0, 0], tokens[1, -1])
    assert example.main(["-o", str(tmp_path / "b.png")]).shape == (2, 9, 8)
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size == (9 * 34 - 2, 2 * 34 - 2)


# ---------------------------------------------------------------------------------------------------------------
# Notebook


def test_the_tour_has_no_outputs_and_runs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, and with a tokenizer and a generator from a folder."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for folder in ("nothing", str(models)):
        monkeypatch.setenv("MODELS", folder)
        names: dict[str, object] = {}
        for cell in code:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        assert np.asarray(names["pictures"]).dtype == np.uint8
