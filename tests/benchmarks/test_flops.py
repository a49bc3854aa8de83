"""The FLOP formulas against what `torch.utils.flop_counter` counts in the models, mostly on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import few_step_flops, flops
from benchmarks.harness.sides import counted_flops
from titok import GeneratorConfig, MaskGIT, SamplingConfig, TiTok, TokenizerConfig, engine, sample_tokens
from titok.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, VQGANConfig
from titok.models.vqgan import MaskGITVQGAN
from titok.ops import code_mixture


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def close(formula: int, count: int) -> bool:
    return abs(formula - count) <= 0.02 * count


FAST = ("titok-s-128", "titok-b-128-512")  # of each image size one


@pytest.mark.parametrize(
    "name", [pytest.param(p, marks=[] if p in FAST else pytest.mark.slow) for p in TOKENIZER_PRESETS]
)
def test_tokenizer_presets(name):
    config = TokenizerConfig.preset(name)
    with torch.device("meta"):
        model, batch = TiTok(config), 3
        images, latents = (
            torch.empty(batch, 3, *config.image_size),
            torch.empty(batch, config.num_latent_tokens, config.code_dim),
        )

    def encode():
        x = model.encoder(images)
        if model.quantizer is not None:
            model.quantizer.indices(x)

    assert close(flops.encoder(config, batch).flops, counted(encode))
    assert close(flops.decoder(config, batch).flops, counted(lambda: model.decoder(latents)))
    if config.pixel_decoder:
        side = config.image_size[0] // config.proxy.factor
        logits = torch.empty(batch, side, side, config.proxy.codebook_size, device="meta")

        def pixels():
            model.pixel_decoder(code_mixture(logits, model.pixel_codebook).permute(0, 3, 1, 2))

        assert close(flops.pixel_decoder(config, batch).flops, counted(pixels))


@pytest.mark.parametrize("name", GENERATOR_PRESETS)
def test_generator_presets_pass(name):
    config = GeneratorConfig.preset(name)
    with torch.device("meta"):
        model = MaskGIT(config).eval()
        x = torch.empty(2, 1 + config.num_latent_tokens, config.width)
    count = counted(lambda: model.lm_head(model.trunk(x)[:, 1:]))
    assert close(flops.generator_pass(config, 2, 2 * config.num_latent_tokens).flops, count)


@pytest.mark.parametrize(
    ("guidance_schedule", "labels", "steps"),
    [("constant", [3, 1, 3], 4), ("linear", [2, 2, 2], 4), ("linear", [0, 1], 14)],
)
def test_generate_counts_what_the_loop_computes(guidance_schedule, labels, steps):
    sampling = SamplingConfig(steps=steps, guidance_schedule=guidance_schedule)
    config = GeneratorConfig(12, 40, num_classes=5, width=32, layers=2, heads=4, mlp_width=48, sampling=sampling)
    generator = MaskGIT(config)
    formula = flops.generate(config, len(labels), distinct=len(set(labels))).flops
    assert formula == counted(lambda: sample_tokens(generator, labels))
    assert formula < flops.generate(config, len(labels), as_written=True).flops


@pytest.mark.parametrize("shortcut_of_result", [True, False])
def test_vqgan_decoder_alone(shortcut_of_result):
    config = VQGANConfig(hidden_channels=32, code_dim=16, codebook_size=8, shortcut_of_result=shortcut_of_result)
    model, codes = MaskGITVQGAN(config).eval(), torch.randn(2, config.code_dim, 5, 7)
    assert close(flops.vqgan_decoder(config, 2, 5, 7).flops, counted(lambda: model.decoder(codes)))
    model.prepare()
    assert close(flops.vqgan_decoder(config, 2, 5, 7, folded=True).flops, counted(lambda: model.decoder(codes)))
    with engine.plain():
        assert close(flops.vqgan_decoder(config, 2, 5, 7).flops, counted(lambda: model.decoder(codes)))


def test_folded_upsampling_is_the_same_map_with_fewer_taps():
    """The saving that `folded=True` counts: upsampling by 2 and a 3x3 convolution are four 2x2 convolutions."""
    x, w = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    direct = torch.conv2d(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), w, padding=1)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for i in (0, 1):
        for j in (0, 1):
            rows = [w[:, :, 0], w[:, :, 1] + w[:, :, 2]] if i == 0 else [w[:, :, 0] + w[:, :, 1], w[:, :, 2]]
            kernel = torch.stack(rows, dim=2)
            columns = (
                [kernel[..., 0], kernel[..., 1] + kernel[..., 2]]
                if j == 0
                else [kernel[..., 0] + kernel[..., 1], kernel[..., 2]]
            )
            phase = torch.conv2d(padded[:, :, i : i + 5, j : j + 6], torch.stack(columns, dim=3))
            torch.testing.assert_close(direct[:, :, i::2, j::2], phase)
    windows = 5 * 6  # of the padded map; each meets four kernels of four taps
    assert flops.upsample_conv(1, 8, 10, 2, folded=True).flops == 2 * 16 * windows * 2 * 2
    assert flops.upsample_conv(1, 8, 10, 2, folded=False).flops == 2 * 9 * 8 * 10 * 2 * 2


@pytest.mark.slow
def test_diffusers():
    pytest.importorskip("diffusers")
    from benchmarks.baselines import dit

    for size, width, layers in ((16, 1152, 28), (32, 96, 3)):
        grid = size // 2
        config = {**dit.TRANSFORMER, "sample_size": size, "num_layers": layers, "attention_head_dim": width // 16}
        with torch.device("meta"):
            model = dit.transformer(config)
            arguments = (
                torch.empty(2, 4, size, size),
                torch.empty(2, dtype=torch.int64),
                torch.empty(2, dtype=torch.int64),
            )
        count = counted(lambda model=model, a=arguments: model(a[0], timestep=a[1], class_labels=a[2]))
        assert close(flops.dit_pass(2, grid, width=width, layers=layers).flops, count)
    with torch.device("meta"):
        vae, latents = dit.vae(), torch.empty(1, 4, 32, 32)
    assert close(flops.vae_decoder(1, 32).flops, counted(lambda: vae.decode(latents)))


@pytest.mark.slow
def test_models_of_a_few_steps():
    diffusers = pytest.importorskip("diffusers")
    from benchmarks.baselines import dit, few_steps

    config = few_steps.DC_AE
    with torch.device("meta"):
        deep = diffusers.AutoencoderDC.from_config(config).eval()
        latents = torch.empty(1, config["latent_channels"], 16, 16)
    channels, layers = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
    formula = few_step_flops.dc_decoder(1, 16, channels, layers, config["latent_channels"], 3)
    assert close(formula.flops, counted(lambda: deep.decode(latents)))

    config = few_steps.AMUSED_VQ
    with torch.device("meta"):
        vq = diffusers.VQModel.from_config(config).eval()
        latents = torch.empty(1, config["latent_channels"], 16, 16)
    formula = flops.vae_decoder(1, 16, config["block_out_channels"], config["latent_channels"], attends=False)
    assert close(formula.flops, counted(lambda: vq.decoder(vq.post_quant_conv(latents))))

    for halved in (False, True):
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 352}
        with torch.device("meta"):
            model = diffusers.UVit2DModel.from_config({**sizes, "downsample": halved, "upsample": halved}).eval()
            codes = torch.empty(2, 16, 16, dtype=torch.int64)
            text, pooled, about = torch.empty(2, 77, 768), torch.empty(2, 768), torch.empty(2, 5)

        def one_pass(model=model, codes=codes, text=text, pooled=pooled, about=about):
            model(codes, micro_conds=about, pooled_text_emb=pooled, encoder_hidden_states=text)

        formula = few_step_flops.uvit2d_pass(2, 16, hidden=128, layers=2, mlp=352, halved=halved)
        assert close(formula.flops, counted(one_pass))

    with torch.device("meta"):
        model = dit.transformer({**few_steps.PIXEL_STEP, "num_layers": 2})
        images, one = torch.empty(1, 3, 512, 512), torch.empty(1, dtype=torch.int64)
    formula = flops.dit_pass(1, 16, width=1024, layers=2, patch=32, channels=3, outputs=3)
    assert close(formula.flops, counted(lambda: model(images, timestep=one, class_labels=one)))


def test_work_of_one_pixel_step():
    """Within a tenth of the 0.234 TFLOP published for pMF-L/32, whose blocks are others than DiT's."""
    work = flops.dit_pass(1, 16, width=1024, layers=32, patch=32, channels=3, outputs=3)
    assert work.flops == pytest.approx(0.234e12, rel=0.1)


def test_table_of_floors():
    """TFLOP of one image as the official code computes it, and of each stage as titok computes it."""
    # preset -> everything as written, then generator, ViT decoder and pixel decoder as titok computes them
    floors = {
        "titok-l-32": (0.544, 0.172, 0.182, 0.160),
        "titok-b-64": (0.588, 0.340, 0.059, 0.160),
        "titok-l-64-512": (1.298, 0.342, 0.203, 0.641),
    }
    for name, (as_written, *parts) in floors.items():
        tokenizer, generator = TokenizerConfig.preset(name), GeneratorConfig.preset(name)
        published = (
            flops.generate(generator, as_written=True),
            flops.decoder(tokenizer, all_rows=True),
            flops.pixel_decoder(tokenizer),
        )
        ours = (flops.generate(generator), flops.decoder(tokenizer), flops.pixel_decoder(tokenizer, folded=True))
        assert sum(w.flops for w in published) == pytest.approx(as_written * 1e12, rel=0.02)
        for work, expected in zip(ours, parts, strict=True):
            assert work.flops == pytest.approx(expected * 1e12, rel=0.025)
    for pixels, expected in ((256, 1.575e12), (512, 7.156e12)):
        side = pixels // 16
        config = GeneratorConfig(side * side, 1024)
        image = (
            flops.generate(config, as_written=True).flops + flops.vqgan_decoder(VQGANConfig(), 1, side, side).flops
        )
        assert image == pytest.approx(expected, rel=0.02)
    for pixels, expected in ((256, 119.2e12), (512, 527.0e12)):
        image = 250 * flops.dit_pass(2, pixels // 16).flops + flops.vae_decoder(1, pixels // 8).flops
        assert image == pytest.approx(expected, rel=0.02)


def test_bytes_are_those_of_weights_inputs_and_outputs():
    work = flops.linear(10, 3, 5)
    assert work.bytes(2) == 2 * (15 + 30 + 50)
    assert flops.conv(2, 8, 8, 3, 16, 4, 4) == (2 * 128 * 16 * 3 * 16, 16 * 3 * 16, 128 * 16 * 3 + 128 * 16)


def test_a_compiled_side_is_counted_as_written_and_still_compiles():
    """A compiled module whose first call is made under the counter would stay uncompiled in all later calls."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = torch.nn.Linear(8, 16)
    compiled = torch.compile(module, backend=backend)
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert counted_flops(lambda: compiled(x)) == 2 * 4 * 8 * 16
        assert graphs == []
        compiled(x)
    assert len(graphs) == 1
