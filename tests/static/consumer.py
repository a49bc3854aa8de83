"""A program that uses titok's public interface, for type checkers. It is checked and never run."""

from __future__ import annotations

import torch
from torch import Tensor

import titok
from titok import engine, ops, profiling
from titok.generation.sampling import Trace


def generate(folder: str, labels: list[int]) -> Tensor:
    pipe = titok.Pipeline.from_pretrained(folder, folder, device="cpu", dtype=torch.float32)
    with engine.plain(), profiling.enabled():
        pictures: Tensor = pipe(labels, seed=1, sampling=titok.SamplingConfig(steps=4))
    for picture in pipe.generate_many(labels, batch_size=2):
        pictures = torch.cat([pictures, picture[None]])
    return pictures


def sample(generator: titok.MaskGIT, labels: Tensor, trace: bool) -> Tensor:
    tokens: Tensor = titok.sample_tokens(generator, labels)
    pair: tuple[Tensor, Trace] = titok.sample_tokens(generator, labels, trace=True)
    either: Tensor | tuple[Tensor, Trace] = titok.sample_tokens(generator, labels, trace=trace)
    for tokens in titok.sample_steps(generator, [1], seed=2):
        tokens = tokens + 0
    return tokens if isinstance(either, Tensor) else pair[0]


def quantize(latents: Tensor, codebook: Tensor, return_quantized: bool) -> Tensor:
    indices: Tensor = ops.nearest_codebook(latents, codebook)
    rows: Tensor = ops.nearest_codebook(latents, codebook, return_quantized=True)[1]
    either = ops.nearest_codebook(latents, codebook, return_quantized=return_quantized)
    return indices if isinstance(either, Tensor) else rows


def attend(qkv: Tensor, key_mask: Tensor) -> Tensor:
    attended = ops.masked_attention(qkv, 4, query_range=[1, 5], key_mask=key_mask)
    return attended + ops.masked_attention(qkv, 4, query_range=(1, 5))


def decode(tokens: Tensor, logits: Tensor, return_order: bool) -> Tensor:
    params: Tensor = ops.pack_step_params(step=0, steps=8, num_masked=3)
    new: Tensor = ops.maskgit_decode_step_packed(tokens, logits, params=params, mask_token=7)
    _, scores, order = ops.maskgit_decode_step_packed(
        tokens, logits, params=params, mask_token=7, return_confidence=True, return_order=True
    )
    either = ops.maskgit_decode_step_packed(tokens, logits, params=params, mask_token=7, return_order=return_order)
    return new if isinstance(either, Tensor) else scores + order[0]


def tokenize(tokenizer: titok.TiTok, images: Tensor) -> Tensor:
    tokens: Tensor = tokenizer.encode(images)
    decoded: Tensor = tokenizer.decode(tokens)
    config: titok.TokenizerConfig = titok.TokenizerConfig.preset("titok-l-32")
    other: titok.TiTok = titok.TiTok.from_pretrained("folder", dtype=torch.bfloat16)
    other.save_pretrained("copy")
    return decoded * config.num_latent_tokens
