"""The official layout of TiTok's checkpoints: its `config.json` and its parameter names, translated to ours.

Mistakes of the official code that the published weights depend on are in `titok.checkpoints.quirks`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from titok.checkpoints.lazy import LazyTensor
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig

# ---------------------------------------------------------------------------------------------------------------
# config.json


def is_official(config: Mapping[str, Any]) -> bool:
    """True when the values of a `config.json` are in the official layout; ours has no section "model.vq_model"."""
    model = config.get("model")
    return isinstance(model, Mapping) and isinstance(model.get("vq_model"), Mapping)


def _require(section: Mapping[str, Any], where: str, key: str) -> Any:
    if key not in section:
        raise ValueError(f"{where}.{key} is missing")
    return section[key]


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A JSON object within `values`; an empty one where the key is absent."""
    section = values.get(key, {})
    if not isinstance(section, Mapping):
        raise ValueError(f"{key}: expected a JSON object, got {section!r:.60}")
    return section


def _flag(section: Mapping[str, Any], where: str, key: str) -> bool:
    """A boolean value; all those of the official layout are true where they are absent."""
    value = section.get(key, True)
    if not isinstance(value, bool):
        raise ValueError(f"{where}.{key}: expected true or false, got {value!r:.60}")
    return value


def tokenizer_config(config: Mapping[str, Any]) -> TokenizerConfig:
    """Translates the tokenizer's part of an official `config.json`; absent keys take the official defaults.

    Raises:
        ValueError: a required key is missing, or a value is one that `TokenizerConfig` refuses.
    """
    vq = config["model"]["vq_model"]
    where = "model.vq_model"
    crop = _section(_section(config, "dataset"), "preprocessing").get("crop_size", 256)
    bottleneck = vq.get("quantize_mode", "vq")
    two_stage, legacy = _flag(vq, where, "finetune_decoder"), _flag(vq, where, "is_legacy")
    if bottleneck == "vae" and two_stage:
        raise ValueError("quantize_mode 'vae' does not go with finetune_decoder (the default is true)")
    proxy = legacy or two_stage
    return TokenizerConfig(
        image_size=crop,
        encoder=ViTConfig.named(_require(vq, where, "vit_enc_model_size"), vq.get("vit_enc_patch_size", 16)),
        decoder=ViTConfig.named(_require(vq, where, "vit_dec_model_size"), vq.get("vit_dec_patch_size", 16)),
        num_latent_tokens=_require(vq, where, "num_latent_tokens"),
        code_dim=_require(vq, where, "token_size"),
        codebook_size=vq.get("codebook_size", 4096),
        bottleneck=bottleneck,
        l2_normalize=bottleneck == "vq" and _flag(vq, where, "use_l2_norm"),
        commitment_cost=vq.get("commitment_cost", 0.25),
        head="proxy" if proxy else "pixels",
        proxy=VQGANConfig() if proxy else None,
        pixel_decoder=two_stage,
        reread_latents=legacy,
    )


def generator_config(config: Mapping[str, Any]) -> GeneratorConfig:
    """Translates the generator's part of an official `config.json`; absent keys take the official defaults.

    `image_seq_len` may be the reference ``${model.vq_model.num_latent_tokens}``, which the official code resolves
    while it loads the file.

    Raises:
        ValueError: a required key is missing, or a value is one that `GeneratorConfig` refuses.
    """
    vq = config["model"]["vq_model"]
    if "generator" not in config["model"]:
        raise ValueError("model.generator is missing: this checkpoint holds a tokenizer alone")
    generator = _section(config["model"], "generator")
    tokens = _require(generator, "model.generator", "image_seq_len")
    if isinstance(tokens, str):
        if tokens.replace(" ", "") != "${model.vq_model.num_latent_tokens}":
            raise ValueError(f"model.generator.image_seq_len: expected an int, got {tokens!r:.60}")
        tokens = _require(vq, "model.vq_model", "num_latent_tokens")
    kinds = {"ViT": "vit", "UViT": "uvit"}
    kind = generator.get("model_type", "ViT")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"model.generator.model_type: expected one of {sorted(kinds)}, got {kind!r:.60}")
    return GeneratorConfig(
        num_latent_tokens=tokens,
        codebook_size=_require(vq, "model.vq_model", "codebook_size"),
        num_classes=generator.get("condition_num_classes", 1000),
        architecture=kinds[kind],  # type: ignore[arg-type]
        width=generator.get("hidden_size", 768),
        layers=generator.get("num_hidden_layers", 24),
        heads=generator.get("num_attention_heads", 16),
        mlp_width=generator.get("intermediate_size", 3072),
        dropout=generator.get("dropout", 0.1) if kind == "ViT" else 0.0,  # the official U-ViT ignores this key
        sampling=SamplingConfig(
            steps=generator.get("num_steps", 8),
            guidance_scale=generator.get("guidance_scale", 3.0),
            guidance_schedule=generator.get("guidance_decay", "constant"),
            temperature=generator.get("randomize_temperature", 4.5),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------
# Parameter names. A rule is a regular expression, matched at the start of a name, and its replacement. The first
# rule that matches rewrites the name.

_VIT_RULES = (
    (r"(encoder|decoder)\.transformer\.(\d+)\.ln_([12])\.", r"\1.trunk.blocks.\2.norm\3."),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.in_proj_", r"\1.trunk.blocks.\2.attn.qkv."),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.out_proj\.", r"\1.trunk.blocks.\2.attn.proj."),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_fc\.", r"\1.trunk.blocks.\2.mlp.fc1."),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_proj\.", r"\1.trunk.blocks.\2.mlp.fc2."),
    (r"(encoder|decoder)\.ln_(pre|post)\.", r"\1.trunk.norm_\2."),
    (r"(encoder|decoder)\.class_embedding$", r"\1.class_token"),
    (r"(encoder|decoder)\.latent_token_positional_embedding$", r"\1.latent_positions"),
    (r"(encoder|decoder)\.positional_embedding$", r"\1.patch_positions"),
    (r"latent_tokens$", r"encoder.latent_tokens"),
    (r"encoder\.conv_out\.", r"encoder.project."),
    (r"decoder\.decoder_embed\.", r"decoder.embed."),
    (r"decoder\.ffn\.0\.", r"decoder.head.0."),
    (r"decoder\.ffn\.2\.", r"decoder.head.2."),
    (r"decoder\.conv_out\.", r"decoder.smooth."),
    (r"quantize\.embedding\.weight$", r"quantizer.codebook"),
    (r"pixel_quantize\.embedding\.weight$", r"pixel_codebook"),
)  # fmt: skip
_VQGAN_RULES = (
    (r"((?:pixel_)?(?:encoder|decoder))\.down\.(\d+)\.block\.(\d+)\.", r"\1.levels.\2.blocks.\3."),
    (r"((?:pixel_)?(?:encoder|decoder))\.up\.(\d+)\.block\.(\d+)\.", r"\1.levels.\2.blocks.\3."),
    (r"((?:pixel_)?(?:encoder|decoder))\.up\.(\d+)\.upsample_conv\.", r"\1.levels.\2.upsample."),
    (r"quantize\.embedding\.weight$", r"codebook"),
)
_UVIT_RULES = (
    (r"out_blocks\.(\d+)\.skip_linear\.", r"trunk.skips.\1."),
    (r"(in_blocks|mid_block|out_blocks|norm)\.", r"trunk.\1."),
    (r"embeddings\.weight$", r"embedding.weight"),
    (r"pos_embed$", r"positions"),
)
_BERT_RULES = (
    (r"model\.encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"trunk.blocks.\1.attn.\2."),
    (r"model\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"trunk.blocks.\1.attn.proj."),
    (r"model\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"trunk.blocks.\1.norm1."),
    (r"model\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"trunk.blocks.\1.mlp.fc1."),
    (r"model\.encoder\.layer\.(\d+)\.output\.dense\.", r"trunk.blocks.\1.mlp.fc2."),
    (r"model\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"trunk.blocks.\1.norm2."),
    (r"model\.embeddings\.word_embeddings\.", r"embedding."),
    (r"model\.embeddings\.position_embeddings\.weight$", r"positions"),
    (r"model\.embeddings\.LayerNorm\.", r"trunk.norm."),
    (r"model\.lm_head\.", r"lm_head."),
)  # fmt: skip


def _rename(weights: Mapping[str, LazyTensor], rules: tuple[tuple[str, str], ...]) -> dict[str, LazyTensor]:
    """The same tensors under the names that `rules` make; a name that no rule matches stays."""
    return {_renamed(name, rules): value for name, value in weights.items()}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        new_name, matches = re.subn("^" + pattern, replacement, name)
        if matches:
            return new_name
    return name


def vqgan_weights(weights: Mapping[str, LazyTensor], config: VQGANConfig | None = None) -> dict[str, LazyTensor]:
    """Tensors of an official MaskGIT-VQGAN under the names of `MaskGITVQGAN`."""
    return _rename(weights, _VQGAN_RULES)


def tokenizer_weights(
    weights: Mapping[str, LazyTensor], config: TokenizerConfig | None = None
) -> dict[str, LazyTensor]:
    """Tensors of an official TiTok under the names of `TiTok`.

    Weights of 1x1 convolutions (O, C, 1, 1) become those of linear layers (O, C).
    """
    renamed = _rename(weights, _VIT_RULES + _VQGAN_RULES)
    for name in ("encoder.project.weight", "decoder.head.0.weight", "decoder.head.2.weight"):
        if name in renamed and len(renamed[name].shape) == 4:
            renamed[name] = LazyTensor.computed(lambda weight: weight.flatten(1), renamed[name])
    return renamed


def generator_weights(
    weights: Mapping[str, LazyTensor], config: GeneratorConfig | None = None
) -> dict[str, LazyTensor]:
    """Tensors of an official generator, "ViT" or "UViT", under the names of `MaskGIT`.

    With `config`, the file may lack the weight of the output layer: see `_untied`.
    """
    if any(name.startswith("model.") for name in weights):
        return _bert_weights(weights if config is None else _untied(weights, config.codebook_size))
    renamed = _rename(weights, _UVIT_RULES)
    if "positions" in renamed:
        renamed["positions"] = LazyTensor.computed(lambda table: table.squeeze(0), renamed["positions"])
    return renamed


def _untied(weights: Mapping[str, LazyTensor], codebook_size: int) -> dict[str, LazyTensor]:
    """Tensors of an official "ViT" generator with a weight of the output layer.

    Releases of transformers from 2024 on tie the output layer to the embeddings of all tokens: codes, classes, mask and
    "no class". A file that was saved under one of them lacks the weight, and the bias has one value for each of these
    tokens. The first `codebook_size` rows of both belong to the codes, and nothing else may be predicted.
    """
    table, bias = (weights.get(f"model.{name}") for name in ("embeddings.word_embeddings.weight", "lm_head.bias"))
    if "model.lm_head.weight" in weights or table is None or bias is None:
        return dict(weights)
    table = table._replace(load=functools.cache(table.load))  # two tensors are made of it
    return {
        **weights,
        "model.embeddings.word_embeddings.weight": table,
        "model.lm_head.weight": LazyTensor.computed(lambda rows: rows[:codebook_size].clone(), table),
        "model.lm_head.bias": LazyTensor.computed(lambda values: values[:codebook_size].clone(), bias),
    }


def _bert_weights(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The "ViT" generator is BERT's encoder, which differs from `MaskGIT` in three ways beside the names.

    - BERT adds an embedding of the token type. The generator only ever used row 0 of that table, at every
      position, so the row is added to the table of positions.
    - Query, key and value are three projections; `MaskGIT` packs them into one.
    - `position_ids` is a buffer that older releases of transformers saved. It is dropped.
    """
    remaining = {name: value for name, value in weights.items() if name != "model.embeddings.position_ids"}
    token_types = remaining.pop("model.embeddings.token_type_embeddings.weight", None)
    renamed = _rename(remaining, _BERT_RULES)
    if token_types is not None and "positions" in renamed:
        # In float64, so that the sum is rounded only once: to the dtype that the model is loaded in.
        renamed["positions"] = LazyTensor.computed(
            lambda positions, types: positions.double() + types[0].double(), renamed["positions"], token_types
        )
    packed: dict[str, LazyTensor] = {}
    for name, value in renamed.items():
        match = re.match(r"(.*\.attn\.)(query|key|value)(\..*)", name)
        if match is None:
            packed[name] = value
        elif match[2] == "query":
            parts = [renamed.get(match[1] + part + match[3]) for part in ("query", "key", "value")]
            # If a part is missing, the result is too short, and loading reports its shape.
            found = [part for part in parts if part is not None]
            packed[f"{match[1]}qkv{match[3]}"] = LazyTensor.computed(lambda *given: torch.cat(given), *found)
    return packed
