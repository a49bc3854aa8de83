"""A VQ-VAE (van den Oord et al. 2017) whose codebook `titok` looks up: compiled, in mixed precision, on many processes.

    python examples/vqvae.py                                              # a minute on a CPU
    torchrun --nproc-per-node 2 examples/vqvae.py --amp --compile inductor

`EMAVectorQuantizer` calls `titok.ops.quantize`, which never stores the matrix of distances. It takes feature maps
(B, C, H, W) as they are, and updates its codes alike in every process. The pictures are smooth random ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from titok.nn import EMAVectorQuantizer


class VQVAE(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to their reconstructions, through one code for each 4 x 4 pixels."""

    def __init__(self, codes: int, width: int = 32, code_dim: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(width, code_dim, 1),
        )  # fmt: skip
        self.quantizer = EMAVectorQuantizer(codes, code_dim, dim=1, decay=0.9, restart_below=0.5)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, width, 3, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction error, the commitment loss, and the indices (B, H / 4, W / 4) of the codes."""
        quantized = self.quantizer(self.encoder(images))
        error = F.mse_loss(self.decoder(quantized.quantized).float(), images)
        return error, quantized.commitment_loss, quantized.indices


def random_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth random pictures (count, 3, size, size) in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def train(options: argparse.Namespace) -> VQVAE:
    """Trains a model and prints its losses, in the first process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)  # the same weights in every process
    model = VQVAE(options.codes)
    step_model: nn.Module = model
    if options.compile:
        step_model = torch.compile(model, backend=options.compile)
    if dist.is_initialized():
        step_model = DistributedDataParallel(step_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(rank)  # other pictures in every process
    autocast = torch.autocast("cpu", torch.bfloat16) if options.amp else contextlib.nullcontext()
    for step in range(1, options.steps + 1):
        images = random_pictures(options.batch_size, options.size, generator)
        with autocast:
            error, commitment_loss, indices = step_model(images)
            loss = error + commitment_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % max(1, options.steps // 5) == 0 or step == 1):
            used = len(indices.unique())
            print(f"step {step:4d}  error {error.item():.4f}  {used} of {options.codes} codes in this batch")
    return model


def main(arguments: list[str] | None = None) -> VQVAE:
    """Reads the command line, trains, and returns the model of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures of a process in a step")
    parser.add_argument("--size", type=int, default=32, help="pixels along a side of a picture")
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--amp", action="store_true", help="convolutions in bfloat16")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile: inductor, aot_eager")
    parser.add_argument("--save", metavar="FILE", help="for the weights; each process adds its number")
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    try:
        model = train(options)
        if options.save:
            torch.save(model.state_dict(), f"{options.save}.{os.environ.get('RANK', 0)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
