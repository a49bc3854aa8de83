"""Everything that reading the official checkpoints of TiTok demands, and nothing else does.

Three parts: the accidents of the official code that its published weights were trained with (each used by the model
under a flag that new models leave off), the official `config.json`, and the official parameter names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig

# ---------------------------------------------------------------------------------------------------------------
# Accidents


def reread_latents(x: Tensor) -> Tensor:
    """(B, K, D) token-major latents, re-read by a reshape as if they were (B, D, K), then given back token-major.

    The legacy models (L-32, B-64, S-128) lack a transpose in front of the projection to the code dimension, which
    therefore mixes tokens: value c of "token" n is flat element c*K + n. `TokenizerConfig.reread_latents`.
    """
    b, k, d = x.shape
    return x.reshape(b, d, k).transpose(1, 2)


def shortcut_of_result(h: Tensor, shortcut: Callable[[Tensor], Tensor]) -> Tensor:
    """The end of a MaskGIT-VQGAN residual block whose channel count changes: h + shortcut(h).

    The 1x1 shortcut is applied to the block's *result* in place of its input, so no path leads around the two
    convolutions. `VQGANConfig.shortcut_of_result`.
    """
    return h + shortcut(h)


def fold_shortcut_of_result(weight: Tensor, shortcut: Tensor) -> Tensor:
    """The one convolution that `shortcut_of_result` after a convolution without bias amounts to.

    weight (O, C, k, k), shortcut (O, O, 1, 1) -> (O, C, k, k), summed in float64 and rounded once.
    """
    both = shortcut.double().flatten(1) + torch.eye(len(shortcut), dtype=torch.float64, device=shortcut.device)
    return (both @ weight.double().flatten(1)).view_as(weight).to(weight.dtype)


# ---------------------------------------------------------------------------------------------------------------
# config.json


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether this `config.json` has the official layout (ours names its format)."""
    return isinstance(config.get("model"), Mapping) and "vq_model" in config["model"]


def _require(section: Mapping[str, Any], where: str, key: str) -> Any:
    if key not in section:
        raise ValueError(f"{where}.{key} is missing")
    return section[key]


def tokenizer_config(config: Mapping[str, Any]) -> TokenizerConfig:
    """Our configuration of an official one. Absent keys have the official defaults."""
    vq = config["model"]["vq_model"]
    crop = config.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256)
    bottleneck = vq.get("quantize_mode", "vq")
    two_stage, legacy = vq.get("finetune_decoder", True), vq.get("is_legacy", True)
    if bottleneck == "vae" and two_stage:
        raise ValueError("quantize_mode 'vae' does not go with finetune_decoder (the default is true)")
    proxy = legacy or two_stage
    where = "model.vq_model"
    return TokenizerConfig(
        image_size=crop,
        encoder=ViTConfig.named(_require(vq, where, "vit_enc_model_size"), vq.get("vit_enc_patch_size", 16)),
        decoder=ViTConfig.named(_require(vq, where, "vit_dec_model_size"), vq.get("vit_dec_patch_size", 16)),
        num_latent_tokens=_require(vq, where, "num_latent_tokens"),
        code_dim=_require(vq, where, "token_size"),
        codebook_size=vq.get("codebook_size", 4096),
        bottleneck=bottleneck,
        l2_normalize=bottleneck == "vq" and bool(vq.get("use_l2_norm", True)),
        commitment_cost=vq.get("commitment_cost", 0.25),
        head="proxy" if proxy else "pixels",
        proxy=VQGANConfig() if proxy else None,
        pixel_decoder=two_stage,
        reread_latents=legacy,
    )


def generator_config(config: Mapping[str, Any]) -> GeneratorConfig:
    """Our configuration of the generator in an official one. `image_seq_len` may be the unresolved reference
    ``${model.vq_model.num_latent_tokens}``, which the official code resolves while loading."""
    vq = config["model"]["vq_model"]
    if "generator" not in config["model"]:
        raise ValueError("model.generator is missing: this checkpoint holds a tokenizer alone")
    g = config["model"]["generator"]
    tokens = _require(g, "model.generator", "image_seq_len")
    if isinstance(tokens, str):
        if tokens.replace(" ", "") != "${model.vq_model.num_latent_tokens}":
            raise ValueError(f"model.generator.image_seq_len: expected an int, got {tokens!r}")
        tokens = _require(vq, "model.vq_model", "num_latent_tokens")
    kinds = {"ViT": "vit", "UViT": "uvit"}
    kind = g.get("model_type", "ViT")
    if kind not in kinds:
        raise ValueError(f"model.generator.model_type: expected one of {sorted(kinds)}, got {kind!r}")
    return GeneratorConfig(
        num_latent_tokens=tokens,
        codebook_size=_require(vq, "model.vq_model", "codebook_size"),
        num_classes=g.get("condition_num_classes", 1000),
        architecture=kinds[kind],  # type: ignore[arg-type]
        width=g.get("hidden_size", 768),
        layers=g.get("num_hidden_layers", 24),
        heads=g.get("num_attention_heads", 16),
        mlp_width=g.get("intermediate_size", 3072),
        dropout=g.get("dropout", 0.1) if kind == "ViT" else 0.0,  # the official U-ViT ignores it
        sampling=SamplingConfig(
            steps=g.get("num_steps", 8),
            guidance_scale=g.get("guidance_scale", 3.0),
            guidance_schedule=g.get("guidance_decay", "constant"),
            temperature=g.get("randomize_temperature", 4.5),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------
# Parameter names. Rules are tried in order; the first that matches the start of a name rewrites it.

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


def _rename(weights: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            new, hits = re.subn("^" + pattern, replacement, name)
            if hits:
                break
        renamed[new if hits else name] = value
    return renamed


def vqgan_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official MaskGIT-VQGAN tensors under our names."""
    return _rename(weights, _VQGAN_RULES)


def tokenizer_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official TiTok tensors under our names; 1x1 convolutions become linear layers."""
    ours = _rename(weights, _VIT_RULES + _VQGAN_RULES)
    for name in ("encoder.project.weight", "decoder.head.0.weight", "decoder.head.2.weight"):
        if name in ours and ours[name].ndim == 4:
            ours[name] = ours[name].flatten(1)
    return ours


def generator_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official generator tensors ("ViT" or "U-ViT") under our names.

    Of the BERT embedding's two token types only row 0 was ever used, added at every position: it is folded into the
    table of positions. Query, key and value become one projection. `position_ids`, a buffer that older releases of
    transformers saved, is dropped.
    """
    if not any(name.startswith("model.") for name in weights):
        ours = _rename(weights, _UVIT_RULES)
        if "positions" in ours:
            ours["positions"] = ours["positions"].squeeze(0)
        return ours
    rest = {k: v for k, v in weights.items() if k != "model.embeddings.position_ids"}
    types = rest.pop("model.embeddings.token_type_embeddings.weight", None)
    ours = _rename(rest, _BERT_RULES)
    if types is not None and "positions" in ours:
        # in float64, so that the one rounding is that of the dtype which the model is loaded in
        ours["positions"] = ours["positions"].double() + types[0].double()
    packed: dict[str, Tensor] = {}
    for name, value in ours.items():
        match = re.match(r"(.*\.attn\.)(query|key|value)(\..*)", name)
        if match is None:
            packed[name] = value
        elif match[2] == "query":
            parts = [ours.get(match[1] + part + match[3]) for part in ("query", "key", "value")]
            found = [part for part in parts if part is not None]
            packed[f"{match[1]}qkv{match[3]}"] = torch.cat(found)  # a missing part shows as a misshapen tensor
    return packed
