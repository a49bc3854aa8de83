"""Every recipe: it learns, it goes on where it was stopped, and it trains what it should and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
import torch
from PIL import Image
from recipes import FIRST, KINDS, VQGAN, WHOLE, config_of, perceptual, pictures, seeded, train
from test_training import Stop, content, same_weights, stop_at

from titok import MaskGIT, MaskGITVQGAN, TiTok
from titok.checkpoints.files import read_weights
from titok.evaluation.reconstruction import evaluate_reconstruction
from titok.training import (
    DecoderTraining,
    join_stages,
    read_metrics,
    tokenize_images,
    train_decoder,
    train_generator,
)
from titok.training.checkpoint import read_run_info
from titok.training.folder import CHECKPOINT

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {"vqgan": MaskGITVQGAN, "vit": MaskGIT, "uvit": MaskGIT}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_a_run_that_was_stopped_equals_one_that_was_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(kind, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 11)  # with a discriminator, in the seventh or eighth step; otherwise in the last
        with pytest.raises(Stop):
            train(kind, tmp_path / "cut")
    assert read_run_info(tmp_path / "cut" / CHECKPOINT)["step"] in (5, 10)
    assert all(parameter.is_contiguous() for parameter in whole.parameters())
    assert same_weights(whole, train(kind, tmp_path / "cut", resume=True))
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    read = MODELS.get(kind, TiTok).from_pretrained(tmp_path / "whole")
    assert same_weights(read, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 150, "batch_size": 12, "warmup_steps": 10, "log_every": 1}
    if kind not in ("vit", "uvit", "proxy"):
        changes |= {"adversarial_weight": 0.0}
    train(kind, tmp_path, changes)
    key = "loss" if kind in ("vit", "uvit") else "codes_loss" if kind == "proxy" else "reconstruction"
    values = [entry[key] for entry in read_metrics(tmp_path)]
    share = 0.95 if kind in ("vit", "uvit") else 0.85  # random tokens have little to be learned
    assert sum(values[-10:]) < share * sum(values[:10]), (values[0], values[-1])


@pytest.mark.slow
def test_the_discriminator_begins_when_it_should(tmp_path: Path) -> None:
    train("tokenizer", tmp_path, {"log_every": 1})
    entries = read_metrics(tmp_path)
    begun = [entry["step"] for entry in entries if "discriminator_loss" in entry]
    assert begun == list(range(5, 13))  # step 4 is the fifth
    assert [entry["adversarial"] == 0 for entry in entries] == [True] * 4 + [False] * 8
    # Its learning rate is counted from its own first step, where a warm-up of one step begins with 0.
    assert entries[4]["discriminator_learning_rate"] == 0
    assert entries[5]["discriminator_learning_rate"] == pytest.approx(3e-3)
    state = read_weights(tmp_path / CHECKPOINT)
    assert {name.partition("/")[0] for name in state} == {
        "model", "averages", "optimizer", "discriminator", "discriminator_optimizer", "extra",
    }  # fmt: skip
    # LeCam's averages, by their definition.
    real = fake = 0.0
    for entry in entries[4:]:
        real = 0.999 * real + 0.001 * entry["discriminator_real_logits"]
        fake = 0.999 * fake + 0.001 * entry["discriminator_fake_logits"]
    assert float(state["extra/discriminator/real"]) == pytest.approx(real, rel=1e-4, abs=1e-7)
    assert float(state["extra/discriminator/fake"]) == pytest.approx(fake, rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_stage_2_leaves_encoder_tokens_and_codebook(tmp_path: Path) -> None:
    start = join_stages(seeded(TiTok, FIRST), seeded(MaskGITVQGAN, VQGAN), WHOLE)
    trained = train("decoder", tmp_path)
    raw = TiTok.from_pretrained(tmp_path / "raw")
    changed = set()
    for (name, before), after, averaged in zip(
        start.named_parameters(), raw.parameters(), trained.parameters(), strict=True
    ):
        if name.startswith(("encoder.", "quantizer.")):
            assert torch.equal(before, after), name
            assert torch.equal(before, averaged), name
        elif not torch.equal(before, after):
            changed.add(name.partition(".")[0])
    assert changed == {"decoder", "pixel_decoder", "pixel_codebook"}
    assert not any(p.requires_grad is False for n, p in trained.named_parameters() if n.startswith("decoder."))


def test_stages_join(tmp_path: Path) -> None:
    first, proxy = seeded(TiTok, FIRST), seeded(MaskGITVQGAN, VQGAN)
    whole = join_stages(first, proxy, WHOLE).eval()
    images = pictures(3)
    tokens = first.encode(images)
    assert torch.equal(whole.encode(images), tokens)
    # The expectation of the code vectors, decoded by the 2D tokenizer's decoder.
    vectors = first.decode_logits(tokens).softmax(dim=1).movedim(1, -1) @ proxy.codebook
    torch.testing.assert_close(whole.decode(tokens), proxy.decoder(vectors.movedim(-1, 1)), rtol=1e-4, atol=1e-4)
    assert same_weights(join_stages(whole, proxy, WHOLE), whole)
    with pytest.raises(ValueError, match=r"initial: .* differs in \['num_latent_tokens'\]"):
        join_stages(first, proxy, WHOLE.from_dict({**WHOLE.to_dict(), "num_latent_tokens": 8}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "vit", "uvit"])
def test_a_run_starts_from_weights(kind: str, tmp_path: Path) -> None:
    first = train(kind, tmp_path / "first")
    still = {"learning_rate": 0.0, "final_learning_rate": 0.0, "ema_decay": 0.0}
    if kind == "tokenizer":
        still |= {"restart_every": 0}
    second = train(kind, tmp_path / "second", still, initial=first)
    assert same_weights(first, second)
    with pytest.raises(ValueError, match="the weights that the run starts from are not those"):
        train(kind, tmp_path / "second", still, initial=second_model(kind), resume=True)
    other = MaskGITVQGAN(VQGAN)
    with pytest.raises(ValueError, match="initial: expected a model with the configuration that is trained"):
        train(kind, tmp_path / "third", initial=other)


@pytest.mark.slow
def test_stage_1_starts_from_a_whole_tokenizer(tmp_path: Path) -> None:
    whole = seeded(TiTok, WHOLE)
    still = {"learning_rate": 0.0, "final_learning_rate": 0.0, "ema_decay": 0.0, "restart_every": 0}
    first = train("proxy", tmp_path, still, initial=whole)
    assert first.config == FIRST
    expected, weights = whole.state_dict(), first.state_dict()
    assert set(expected) - set(weights) == {name for name in expected if name.startswith("pixel_")}
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def second_model(kind: str) -> Any:
    """A model with other weights."""
    return seeded(TiTok if kind == "tokenizer" else MaskGIT, config_of(kind).model)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "vit", "uvit"])
def test_recomputed_activations_change_nothing(kind: str, tmp_path: Path) -> None:
    plain = train(kind, tmp_path / "plain")
    saving = train(kind, tmp_path / "saving", {"checkpoint_activations": True})
    assert same_weights(plain, saving)
    assert not any(getattr(module, "checkpoint_activations", False) for module in saving.modules())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "tf32"])
def test_precisions(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    full, half = (
        train("tokenizer", tmp_path / "full"),
        train("tokenizer", tmp_path / "half", {"precision": precision}),
    )
    assert torch.get_float32_matmul_precision() == before
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())
    assert same_weights(full, half) == (precision == "tf32")  # TF32 is of GPUs
    one, other = (read_metrics(tmp_path / name)[0]["loss"] for name in ("full", "half"))
    assert one == pytest.approx(other, rel=0.1)
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        with pytest.raises(Stop):
            train("tokenizer", tmp_path / "cut", {"precision": precision})
    train("tokenizer", tmp_path / "cut", {"precision": precision}, resume=True)
    assert content(tmp_path / "half") == content(tmp_path / "cut")


@pytest.mark.slow
def test_old_checkpoints_are_kept_and_can_be_resumed(tmp_path: Path) -> None:
    changes = {"checkpoint_every": 2, "keep_last": 2, "keep_every": 6}
    whole = train("vit", tmp_path / "whole", changes)
    names = [path.name for path in sorted((tmp_path / "whole").glob("training-*"))]
    assert names == [f"training-{step:08}.safetensors" for step in (6, 10, 12)]
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / CHECKPOINT).write_bytes((tmp_path / "whole" / names[0]).read_bytes())
    assert same_weights(train("vit", tmp_path / "earlier", changes, resume=True), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "proxy", "decoder", "tokenizer", "vae"])
def test_pictures_of_held_out_images(kind: str, tmp_path: Path) -> None:
    held_out = pictures(3)
    changes = {"picture_every": 6}
    with_pictures = train(kind, tmp_path / "a", changes, held_out=held_out)
    assert same_weights(with_pictures, train(kind, tmp_path / "b")), "they do not change the training"
    names = sorted((tmp_path / "a" / "pictures").iterdir())
    assert [path.name for path in names] == ["00000006.png", "00000012.png"]
    with Image.open(names[0]) as image:
        assert image.size == (3 * 16 + 2 * 2, 3 * 16 + 2 * 2)
        first = torch.from_numpy(np.array(image)[:16, :16].astype(np.int64))
    assert torch.equal(first, (held_out[0] * 255).round().movedim(0, -1).long())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "tokenizer", "vae"])
def test_measurements_of_held_out_images(kind: str, tmp_path: Path) -> None:
    """They are of the averaged weights, which are those of the model that is saved."""
    held_out = pictures(5)

    def measure(model: TiTok, images: Any) -> dict[str, float]:
        return evaluate_reconstruction(model, images, progress=False).figures

    measured = train(kind, tmp_path / "a", {"evaluate_every": 5}, held_out=held_out, measure=measure)
    assert same_weights(measured, train(kind, tmp_path / "b")), "they do not change the training"
    found = {entry["step"]: entry for entry in read_metrics(tmp_path / "a") if "held_out_psnr" in entry}
    assert sorted(found) == [5, 10, 12]
    model = TiTok.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        levels = (model.decode(model.encode(held_out)).clamp(0, 1) * 255).round() / 255
    exact = (held_out * 255).round() / 255
    errors = (levels - exact).double().square().mean((1, 2, 3))
    assert found[12]["held_out_psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-3)
    assert found[5]["held_out_psnr"] != found[12]["held_out_psnr"]
    assert ("held_out_codebook_usage" in found[12]) == (kind != "vae")


@pytest.mark.slow
def test_trackers_receive_figures_and_pictures(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def log(self, step: int, figures: dict[str, float]) -> None:
            self.calls.append((step, figures["loss"]))

        def picture(self, step: int, path: Path) -> None:
            self.calls.append((step, path.name))

        def close(self) -> None:
            self.calls.append("closed")

    recorder = Recorder()
    train("tokenizer", tmp_path, {"picture_every": 8}, held_out=pictures(2), trackers=[recorder])
    losses = {entry["step"]: entry["loss"] for entry in read_metrics(tmp_path)}
    assert recorder.calls == [(4, losses[4]), (8, losses[8]), (8, "00000008.png"), (12, losses[12]), "closed"]


@pytest.mark.slow
def test_a_generator_of_the_2d_tokenizers_codes(tmp_path: Path) -> None:
    proxy = seeded(MaskGITVQGAN, VQGAN)
    tokens = tokenize_images(proxy, pictures(4))
    assert torch.equal(tokens[:, 0], proxy.encode(pictures(4)).flatten(1))
    config = config_of("vit")
    model = config.model.from_dict({**config.model.to_dict(), "num_latent_tokens": 64})  # type: ignore[attr-defined]
    config = type(config).from_dict({**config.to_dict(), "model": model.to_dict()})
    train_generator(tokens, torch.arange(4) % 3, config, tmp_path, progress=False)  # type: ignore[arg-type]


def test_recipes_refuse_models_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DecoderTraining\.model: expected a tokenizer with a pixel decoder"):
        DecoderTraining(model=FIRST)
    with pytest.raises(ValueError, match="images: expected at least one"):
        train_decoder(
            pictures(0), seeded(TiTok, FIRST), seeded(MaskGITVQGAN, VQGAN), config_of("decoder"), tmp_path,
            perceptual=perceptual,
        )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "uvit"])  # without dropout, whose random numbers would be others
def test_compiled_networks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_layer = dataclasses.replace(recipes.VIT, layers=1)  # which halves what has to be compiled
    monkeypatch.setattr(
        recipes, "SINGLE", dataclasses.replace(recipes.SINGLE, encoder=one_layer, decoder=one_layer)
    )
    changes = {"steps": 4, "log_every": 1}
    train(kind, tmp_path / "plain", changes)
    compiled = train(kind, tmp_path / "compiled", {**changes, "compile": True})
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not any(module._compiled_call_impl for module in compiled.modules())
    assert same_weights(MODELS.get(kind, TiTok).from_pretrained(tmp_path / "compiled"), compiled)
