"""Against golden data of the official code: float64 first (1e-10), then float32, tokens and indices exactly.

The models are read through `from_pretrained` in the official layout, so the reading is what is tested too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden import Case, manifest, recipe_state
from titok import MaskGIT, MaskGITVQGAN, SamplingConfig, TiTok, sample_tokens
from titok.checkpoints.lazy import LazyTensor
from titok.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
from titok.data.images import to_uint8
from titok.generation.schedules import schedule
from titok.models.quantizer import DiagonalGaussian

DTYPES = [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32]
TOKENIZERS = [
    pytest.param("tokenizer_s_legacy_vq", marks=pytest.mark.slow),
    "tokenizer_s_stage1",
    pytest.param("tokenizer_s_pixel_vq", marks=pytest.mark.slow),
    "tokenizer_s_vae",
]


def write_official(folder: Path, case: str, config: dict[str, Any] | None) -> Path:
    save_file(recipe_state(case), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(case: Case, name: str, got: Tensor) -> None:
    """Compares with the golden array f64.<name> or out.<name>, by the dtype of `got`."""
    if got.dtype == torch.float64:
        case.assert_float64(f"f64.{name}", got)
    else:
        case.assert_float32(f"out.{name}", got)


def token_major(x: Tensor) -> Tensor:
    """Official (B, C, 1, K) to our (B, K, C)."""
    return x.squeeze(2).transpose(1, 2)


def official(x: Tensor) -> Tensor:
    """Ours (B, K, C) to the official (B, C, 1, K)."""
    return x.transpose(1, 2).unsqueeze(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(name)
    folder = write_official(tmp_path, name, case.entry["config"])
    model = TiTok.from_pretrained(folder, dtype=dtype)
    images, vae = case["in.image"].to(dtype), name.endswith("vae")
    with torch.no_grad():
        if vae:
            posterior = model.posterior(images)
            check(case, "mean", official(posterior.mean))
            check(case, "logvar", official(posterior.logvar))
            check(case, "kl", posterior.kl())
            assert torch.equal(model.encode(images), posterior.mean)
            check(case, "decoded_from_mean", model.decode(posterior.mean))
            return
        z = model.encode_latents(images)
        check(case, "z", official(z))
        tokens = model.encode(images)
        assert torch.equal(tokens, case["out.indices"].squeeze(1))
        if name.endswith("stage1"):
            logits = model.decode_logits(tokens)
            check(case, "decoded_from_z_quantized", logits)
            assert torch.equal(logits.argmax(1), case["out.proxy_codes_argmax"])
            with pytest.raises(ValueError, match="no pixel decoder"):
                model.decode(tokens)
            return
        decoded = model.decode(tokens)
        check(case, "decoded_from_z_quantized", decoded)
        if name.endswith("legacy_vq"):
            check(case, "decoder_logits", model.decode_logits(tokens))
        if dtype == torch.float32:
            case.assert_float32("out.decoded_from_given_tokens", model.decode(case["in.tokens"]))
            # Rounding may change a level by one, of one value in 500 at most.
            levels = to_uint8(decoded, "truncate").int() - case["out.uint8_image"].int()
            assert levels.abs().max() <= 1
            assert (levels != 0).float().mean() <= 0.002


@pytest.mark.slow
def test_vae_sample_is_mean_plus_std_times_noise(tmp_path: Path) -> None:
    case = Case("tokenizer_s_vae")
    model = TiTok.from_pretrained(write_official(tmp_path, case.name, case.entry["config"]))
    with torch.no_grad():
        posterior = model.posterior(case["in.image"])
        drawn = official(posterior.mean) + official(posterior.std) * case["in.noise"]
        case.assert_float32("out.sample_with_noise", drawn)
        case.assert_float32("out.decoded_from_sample", model.decode(token_major(drawn)))
        first, again = (
            model.encode(case["in.image"], sample=True, generator=torch.Generator().manual_seed(s)) for s in (0, 0)
        )
        other = model.encode(case["in.image"], sample=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    standard = (other - posterior.mean) / posterior.std
    assert standard.abs().mean().item() == pytest.approx(0.798, abs=0.15)  # E|N(0, 1)|, 256 values


def test_gaussian_clamps_logvar() -> None:
    case = Case("quantizer")
    parameters = token_major(case["in.gaussian.parameters"].double())
    gaussian = DiagonalGaussian.from_parameters(parameters)
    for name in ("mean", "logvar", "std"):
        torch.testing.assert_close(
            official(getattr(gaussian, name)), case[f"f64.gaussian.{name}"], rtol=1e-12, atol=0
        )
    torch.testing.assert_close(gaussian.kl(), case["f64.gaussian.kl"], rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_vqgan(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case("vqgan")
    model = MaskGITVQGAN.from_pretrained(write_official(tmp_path, "vqgan", None), dtype=dtype)
    images = case["in.image"].to(dtype)
    with torch.no_grad():
        check(case, "encoder_output", model.encoder(images))
        codes = model.encode(images)
        assert torch.equal(codes.flatten(1), case["out.encoded_codes"])
        vectors = model.codebook[codes].permute(0, 3, 1, 2)
        check(case, "decoder_unclamped", model.decoder(vectors))
        if dtype == torch.float32:
            case.assert_float32("out.decoded", model.decode(codes))
            case.assert_float32("out.decoded_given_codes", model.decode(case["in.codes"].view(-1, 4, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["generator_vit", "generator_uvit"])
def test_generator_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(name)
    model = MaskGIT.from_pretrained(write_official(tmp_path, name, case.entry["config"]), dtype=dtype)
    with torch.no_grad():
        check(case, "logits_cond", model(case["in.input_ids"], case["in.labels"]))
        check(case, "logits_uncond", model(case["in.input_ids"]))
        dropped = torch.full_like(case["in.labels"], model.no_class)
        check(case, "logits_uncond", model(case["in.input_ids"], dropped))


def sampling_of(variant: dict[str, Any]) -> SamplingConfig:
    """The configuration of a golden run; what the run does not list has the default of the official function."""
    return SamplingConfig(
        steps=variant.get("num_sample_steps", 8),
        guidance_scale=variant.get("guidance_scale", 3.0),
        guidance_schedule=variant.get("guidance_decay", "constant"),
        guidance_power=variant.get("guidance_scale_pow", 3.0),
        temperature=variant.get("randomize_temperature", 4.5),
        softmax_annealing=variant.get("softmax_temperature_annealing", False),
    )


def test_guided_logits(tmp_path: Path) -> None:
    """Guidance and annealing: the logits that each step decides on, from the official tokens that entered it."""
    from titok.ops import maskgit_decode_step

    case = Case("generator_vit")
    model = MaskGIT.from_pretrained(write_official(tmp_path, case.name, case.entry["config"]))
    runs = [n.split(".")[1:-1] for n in case.entry["arrays"] if n.endswith("guided_logits_row0")]
    assert len(runs) == 6
    for parts in runs:
        run = ".".join(parts)
        config = sampling_of(case.entry["generate_variants"][run])
        for step, tokens in zip(schedule(config), case[f"out.{run}.ids_steps"][:-1, :1], strict=True):
            with torch.no_grad():
                cond, uncond = model(tokens, case["in.labels"][:1]), model(tokens)
            want = case[f"out.{run}.guided_logits_row0"][step.index]
            got = step.guidance * cond + (1 - step.guidance) * uncond
            assert (got / step.softmax_temperature - want).abs().max() <= 3e-4, run
            # The confidence of a greedy draw is the largest guided logit, so it shows what the op computes.
            _, confidence = maskgit_decode_step(
                tokens,
                cond,
                uncond,
                step=step.index,
                steps=config.steps,
                num_masked=0,
                mask_token=model.mask_token,
                guidance=step.guidance,
                softmax_temperature=step.softmax_temperature,
                noise_temperature=0.0,
                confidence="titok",
                seed=0,
                first_sample=0,
                final=step.final,
                return_confidence=True,
            )
            masked = tokens == model.mask_token
            assert (confidence - want.max(-1).values)[masked].abs().max() <= 3e-4, run


@pytest.mark.parametrize("name", ["generator_vit", pytest.param("generator_uvit", marks=pytest.mark.slow)])
def test_noiseless_decoding_step_by_step(name: str, tmp_path: Path) -> None:
    case = Case(name)
    model = MaskGIT.from_pretrained(write_official(tmp_path, name, case.entry["config"]))
    variants = {k: v for k, v in case.entry["generate_variants"].items() if v.get("randomize_temperature") == 0}
    assert len(variants) >= 14
    for run, variant in variants.items():
        tokens, trace = sample_tokens(model, case["in.labels"], sampling_of(variant), trace=True)
        assert torch.equal(trace.tokens, case[f"out.{run}.ids_steps"]), run
        assert torch.equal(tokens, case[f"out.{run}.ids"]), run
        want, masked = case[f"out.{run}.confidence"], trace.tokens[:-1] == model.mask_token
        assert torch.equal(want == torch.inf, ~masked), run
        assert (trace.confidences - want)[masked].abs().max() <= 1e-3, run  # the logits reach 9


def test_guidance_and_temperatures_follow_the_schedules() -> None:
    case = Case("schedules")
    names = [n for n in case.entry["arrays"] if n.startswith("out.effective_cond_weight")]
    assert len(names) >= 12
    for name in names:
        run, steps = name.removeprefix("out.effective_cond_weight.").split(".steps")
        kind, rest = run.split(".scale")
        scale, power = (float(x) for x in rest.split(".pow"))
        config = SamplingConfig(int(steps), scale, kind, power, temperature=1.0)  # type: ignore[arg-type]
        plan = list(schedule(config))
        torch.testing.assert_close(
            torch.tensor([s.guidance for s in plan], dtype=torch.float64), case[name], rtol=2e-7, atol=0
        )  # the official power-cosine computes its scale in float32
        for what, numbers in (
            ("softmax_temperature", [s.softmax_temperature for s in plan]),
            ("gumbel_temperature_per_unit", [s.noise_temperature for s in plan]),
        ):
            want = case[f"out.{what}.steps{steps}"]
            torch.testing.assert_close(
                torch.tensor(numbers, dtype=torch.float64), want, rtol=1e-7, atol=1e-7
            )  # the golden values were measured in float32


def test_masked_counts_follow_the_schedule() -> None:
    case = Case("schedules")
    for length, steps in case.entry["params_of_case"]["mask"]:
        left, counts = length, []
        for step in schedule(SamplingConfig(steps)):
            left = step.num_masked(length, left)
            counts.append(left)
        assert counts == case[f"out.masked_after_step.seq{length}.steps{steps}"].tolist(), (length, steps)


@pytest.mark.slow
def test_every_preset_has_the_official_names_and_shapes() -> None:
    """The names and shapes of every published checkpoint convert to exactly our parameters."""
    files = {
        "titok_l32": "titok-l-32",
        "titok_b64": "titok-b-64",
        "titok_s128": "titok-s-128",
        "titok_bl64_vq8k": "titok-bl-64-vq8k",
        "titok_bl128_vq8k": "titok-bl-128-vq8k",
        "titok_sl256_vq8k": "titok-sl-256-vq8k",
        "titok_ll32_vae_c16": "titok-ll-32-vae-c16",
        "titok_bl64_vae_c16": "titok-bl-64-vae-c16",
        "titok_bl128_vae_c16": "titok-bl-128-vae-c16",
    }
    for file, preset in files.items():
        values = manifest(f"{file}.config")
        checks = [(TiTok, f"{file}.tokenizer", TOKENIZER_PRESETS[preset])]
        if "generator" in values["model"]:
            checks.append((MaskGIT, f"{file}.generator", GENERATOR_PRESETS[preset]))
        for kind, names, expected in checks:
            config, is_official = kind.read_config(values)
            assert is_official
            assert config == expected, preset
            with torch.device("meta"):
                ours = {k: tuple(v.shape) for k, v in kind(config).state_dict().items()}
                state = {
                    k: LazyTensor(torch.empty(shape), lambda: pytest.fail("read"), False)
                    for k, (shape, _) in manifest(names).items()
                }
                converted = {k: tuple(v.shape) for k, v in kind.convert_official(state).items()}
            assert converted == ours, preset
