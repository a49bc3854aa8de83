"""The benchmarks' rival computes what the official code does: the golden data of tests/test_parity.py, and its work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import DTYPES, check, sampling_of, write_official
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.as_published import AsPublished
from benchmarks.baselines.published_decoder import PublishedDecoder
from benchmarks.baselines.published_generator import PublishedGenerator, sample_steps
from benchmarks.harness import flops, ladder
from golden import Case
from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig, VQGANConfig
from titok.config import SamplingConfig


def tiny(architecture="vit", patch_size=8, classes=3) -> tuple[TiTok, MaskGIT]:
    vit = ViTConfig(width=32, layers=2, heads=2, patch_size=patch_size)
    proxy = VQGANConfig(hidden_channels=32, channel_multipliers=(1, 2, 2), codebook_size=16, code_dim=8)
    config = TokenizerConfig(
        32,
        vit,
        vit,
        num_latent_tokens=5,
        code_dim=6,
        codebook_size=20,
        head="proxy",
        proxy=proxy,
        pixel_decoder=True,
    )
    generator = GeneratorConfig(
        5, 20, num_classes=classes, architecture=architecture, width=32, layers=2, heads=2, mlp_width=48,
        sampling=SamplingConfig(steps=3),
    )  # fmt: skip
    return TiTok(config).eval(), MaskGIT(generator).eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tokenizer_s_legacy_vq", "tokenizer_s_stage1"])
def test_decoding(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(name)
    model = PublishedDecoder.of(
        TiTok.from_pretrained(write_official(tmp_path, name, case.entry["config"]), dtype=dtype)
    )
    with torch.no_grad():
        logits = model.logits(case["out.indices"].squeeze(1))
        if name.endswith("stage1"):
            check(case, "decoded_from_z_quantized", logits)
            assert torch.equal(logits.argmax(1), case["out.proxy_codes_argmax"])
            with pytest.raises(ValueError, match="pixel decoder"):
                model.pixels(logits)
            return
        check(case, "decoder_logits", logits)
        check(case, "decoded_from_z_quantized", model.pixels(logits))
        if dtype == torch.float32:
            case.assert_float32("out.decoded_from_given_tokens", model.pixels(model.logits(case["in.tokens"])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["generator_vit", "generator_uvit"])
def test_generator_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(name)
    model = PublishedGenerator.of(
        MaskGIT.from_pretrained(write_official(tmp_path, name, case.entry["config"]), dtype=dtype)
    )
    with torch.no_grad():
        for which, drop in (("cond", 0.0), ("uncond", 1.0)):
            check(case, f"logits_{which}", model(case["in.input_ids"], case["in.labels"], drop))


def replayed(case: Case, variant: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Uniform numbers as the golden run was given them: per step those for the logits, then those for the drawn."""
    if variant["randomize_temperature"] == 0:
        return torch.zeros_like
    kinds = [case[f"in.uniform_noise_{kind}"] for kind in ("logits", "confidence")]
    numbers = iter([kind[step] for step in range(variant["num_sample_steps"]) for kind in kinds])
    return lambda like: next(numbers).to(like.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generator_vit", "generator_uvit"])
def test_sampling_step_by_step(name: str, tmp_path: Path) -> None:
    """Token for token, with the golden noise and without any."""
    case = Case(name)
    model = PublishedGenerator.of(MaskGIT.from_pretrained(write_official(tmp_path, name, case.entry["config"])))
    c = model.config
    runs = {k: v for k, v in case.entry["generate_variants"].items() if v["rows_equal"]}
    assert len(runs) >= 14
    with torch.no_grad():
        for run, variant in runs.items():
            steps = sample_steps(
                model,
                case["in.labels"],
                c.num_latent_tokens,
                c.codebook_size,
                sampling_of(variant),
                replayed(case, variant),
            )
            assert torch.equal(torch.stack(steps), case[f"out.{run}.ids_steps"]), run


def test_loop_with_scripted_logits() -> None:
    """Ties mask more than was asked for, and one row's count is every row's: as published."""
    case = Case("sampler")
    runs = case.entry["generate_variants"]
    assert sum(not variant["rows_equal"] for variant in runs.values()) == 4
    for run, variant in runs.items():
        kind = next((f"{kind}_" for kind in ("tied", "crowded") if run.startswith(kind)), "")
        scripts = {drop: iter(case[f"in.{kind}{name}"]) for drop, name in ((0.0, "cond"), (1.0, "uncond"))}
        calls = []

        def predict(
            tokens: Tensor, labels: Tensor, drop: float, scripts: Any = scripts, calls: Any = calls
        ) -> Tensor:
            calls.append(drop)
            if drop == 0.0 and len(calls) > 1 and calls[-2] == 0.0:
                next(scripts[1.0])  # of the step that needed one pass
            return next(scripts[drop])

        _, batch, length, codes = case[f"in.{kind}cond"].shape
        steps = sample_steps(
            predict, torch.zeros(batch), length, codes, sampling_of(variant), replayed(case, variant)
        )
        assert torch.equal(torch.stack(steps), case[f"out.{run}.ids_steps"]), run
        assert len(calls) == variant["forward_calls"], run


@pytest.mark.parametrize("patch_size", [4, 8])
@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_same_model_as_ours(architecture: str, patch_size: int) -> None:
    tokenizer, generator = (model.double() for model in tiny(architecture, patch_size))
    rival = AsPublished(tokenizer, generator)
    tokens, labels = torch.randint(20, (2, 5)), torch.tensor([1, 3])
    with torch.no_grad():
        torch.testing.assert_close(rival.generator(tokens, labels, 0.0), generator(tokens, labels))
        logits = rival.logits(tokens)
        torch.testing.assert_close(logits, tokenizer.decode_logits(tokens))
        torch.testing.assert_close(rival.pixels(logits), tokenizer.decode(tokens))


WAYS: dict[str, dict[str, Any]] = {
    "native": {"dtype": torch.bfloat16},
    "autocast": {"autocast": True},
    "math": {"attention": "math"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_every_way_runs_and_is_close_to_float32(architecture: str, way: str) -> None:
    tokenizer, generator = tiny(architecture)
    exact, rival = AsPublished(tokenizer, generator), AsPublished(tokenizer, generator, **WAYS[way])
    logits = exact.logits(torch.randint(20, (2, 5)))
    assert logits.dtype == torch.float32
    error = (rival.pixels(logits.to(rival.decoder.codebook.dtype)) - exact.pixels(logits)).norm()
    assert error / exact.pixels(logits).norm() < (1e-5 if way == "math" else 0.15)
    assert rival.decoder.codebook.dtype == WAYS[way].get("dtype", torch.float32)
    tokens = rival.sample([0, 1, 2])
    assert tokens.shape == (3, 5)
    assert tokens.max() < generator.mask_token
    pictures = rival([0, 2])
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == torch.uint8


@pytest.mark.parametrize("schedule", ["constant", "linear", "power-cosine"])
@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_does_the_work_as_written(architecture: str, schedule: str) -> None:
    tokenizer, generator = tiny(architecture)
    sampling = SamplingConfig(steps=3, guidance_schedule=schedule)  # type: ignore[arg-type]
    generator.config = dataclasses.replace(generator.config, sampling=sampling)
    rival = AsPublished(tokenizer, generator)
    with FlopCounterMode(display=False) as counter:
        rival([0, 2])
    t, g = tokenizer.config, generator.config
    parts = (flops.generate(g, 2, as_written=True), flops.decoder(t, 2, all_rows=True), flops.pixel_decoder(t, 2))
    assert counter.get_total_flops() == sum(part.flops for part in parts)


def test_weights_are_contiguous_and_ours_stay_as_they_are() -> None:
    tokenizer, generator = tiny()
    assert tokenizer.pixel_decoder is not None
    tokenizer.pixel_decoder.to(memory_format=torch.channels_last)
    rival = AsPublished(tokenizer, generator)
    assert all(p.is_contiguous() for p in [*rival.decoder.parameters(), *rival.generator.parameters()])
    assert not tokenizer.pixel_decoder.conv_in.weight.is_contiguous()


def test_what_was_never_published_is_refused() -> None:
    tokenizer, generator = tiny()
    corrected = dataclasses.replace(
        tokenizer.config, proxy=dataclasses.replace(tokenizer.config.proxy, shortcut_of_result=False)
    )
    with pytest.raises(ValueError, match="published proxy codes"):
        PublishedDecoder.of(TiTok(corrected))
    with pytest.raises(ValueError, match="confidence"):
        PublishedGenerator.of(generator).sample(torch.tensor([0]), SamplingConfig(confidence="maskgit"))


@pytest.mark.parametrize("change", [ladder.channels_last, ladder.folded])
def test_rungs_change_no_result(change: Callable[[AsPublished], Any]) -> None:
    models = tiny()
    rival, changed = AsPublished(*models), AsPublished(*models)
    change(changed)
    logits = rival.logits(torch.randint(20, (2, 5)))
    torch.testing.assert_close(changed.pixels(logits), rival.pixels(logits), rtol=1e-4, atol=1e-5)
    assert not changed.pixels(logits).is_contiguous()
