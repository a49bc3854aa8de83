"""diffusers' aMUSEd model, decoded by `titok.ops.masked_decode_step` in place of diffusers' scheduler.

    pip install diffusers
    python examples/amused_decode.py

The model is a `UVit2DModel` with random weights and a small configuration, so that nothing is downloaded; a trained one
(`UVit2DModel.from_pretrained("amused/amused-256", subfolder="transformer")`) is driven in the same way. The program
decodes the same tokens with `AmusedScheduler` and with the op, greedily, compares them, and prints what a step took.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import AmusedScheduler, UVit2DModel
from torch import Tensor

from titok.ops import masked_decode_step

SIDE, CODES, MASK, WIDTH = 8, 256, 256, 64


def make_model(seed: int) -> UVit2DModel:
    torch.manual_seed(seed)
    model: UVit2DModel = UVit2DModel(
        hidden_size=WIDTH, cond_embed_dim=WIDTH, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
        encoder_hidden_size=WIDTH, vocab_size=CODES + 8, codebook_size=CODES, in_channels=WIDTH,
        block_out_channels=WIDTH, num_res_blocks=1, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * WIDTH, sample_size=SIDE,
    )  # fmt: skip
    return model.eval()


def make_denoiser(model: UVit2DModel, batch: int, seed: int) -> Callable[[Tensor], Tensor]:
    """From tokens (B, N) to logits (B, N, V), for prompts whose embeddings are random."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(batch, 7, WIDTH, generator=generator)
    pooled = torch.randn(batch, WIDTH, generator=generator)
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, 6.0]]).expand(batch, -1)  # of the picture, its crop, aesthetic score

    def denoise(tokens: Tensor) -> Tensor:
        # Random weights give nearly equal logits; the factor lets confidences differ by more than their rounding.
        logits = 20 * model(tokens.view(batch, SIDE, SIDE), words, pooled, sizes)  # (B, V, side, side)
        return logits.flatten(2).mT.float().contiguous()

    return denoise


def first_tokens(batch: int, seed: int) -> Tensor:
    """Tokens (B, N), every third one given, as for inpainting.

    aMUSEd adds nothing to a token that says where it lies. With masks alone, many positions of a model with random
    weights would be equally confident, and equal confidences the scheduler and the op order differently.
    """
    tokens = torch.full((batch, SIDE * SIDE), MASK)
    given = tokens[:, ::3]
    given[:] = torch.randint(CODES, given.shape, generator=torch.Generator().manual_seed(seed))
    return tokens


def decode_with_titok(denoise: Callable[[Tensor], Tensor], tokens: Tensor, steps: int) -> tuple[Tensor, float]:
    """Tokens (B, N), and the seconds that the op took."""
    seconds = 0.0
    for step in range(steps):
        masked = int((tokens[0] == MASK).sum())  # the same number in every row
        share = torch.cos(torch.tensor((step + 1) / steps) * math.pi / 2).item()  # float32, as in the scheduler
        stay = max(1, min(masked - 1, int(SIDE * SIDE * share))) if step < steps - 1 else 0
        logits = denoise(tokens)
        begin = time.perf_counter()
        # temperature=1 and noise_temperature=t would draw as aMUSEd does; both 0 here, to compare.
        tokens = masked_decode_step(tokens, logits, policy="count", count=stay, mask_token=MASK, step=step).tokens
        seconds += time.perf_counter() - begin
    return tokens, seconds


@contextmanager
def greedy_multinomial() -> Iterator[None]:
    """Within, `torch.multinomial` takes the likeliest code: `AmusedScheduler` has no setting for that."""
    before = torch.multinomial
    torch.multinomial = lambda probabilities, *_, **__: probabilities.argmax(-1, keepdim=True)
    try:
        yield
    finally:
        torch.multinomial = before


def decode_with_diffusers(denoise: Callable[[Tensor], Tensor], tokens: Tensor, steps: int) -> tuple[Tensor, float]:
    """Tokens (B, N), and the seconds that the scheduler took."""
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(steps, temperature=(0, 0))
    seconds = 0.0
    for timestep in scheduler.timesteps.tolist():
        logits = denoise(tokens)
        begin = time.perf_counter()
        with greedy_multinomial():
            tokens = scheduler.step(logits, timestep, tokens).prev_sample
        seconds += time.perf_counter() - begin
    return tokens, seconds


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="decode steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    denoise = make_denoiser(make_model(options.seed), options.batch, options.seed)
    tokens = first_tokens(options.batch, options.seed)
    ours, our_seconds = decode_with_titok(denoise, tokens, options.steps)
    theirs, their_seconds = decode_with_diffusers(denoise, tokens, options.steps)
    equal = int((ours == theirs).sum())
    print(f"{equal} of {ours.numel()} tokens equal, {len(ours.unique())} different codes")
    print(
        f"{1e3 * our_seconds / options.steps:.2f} ms a step, {1e3 * their_seconds / options.steps:.2f} in diffusers"
    )
    if equal < ours.numel():
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
