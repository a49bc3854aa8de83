"""A server that answers many clients from one pipeline. Needs fastapi and uvicorn.

    python examples/server.py                              # random weights: the pictures are noise
    python examples/server.py --models runs/quickstart
    curl -o three.png -D - 'http://127.0.0.1:8000/picture?label=3'               # its header x-sample tells the number
    curl -o again.png 'http://127.0.0.1:8000/picture?label=3&sample=0'           # the same picture again

Requests that wait at the same time are generated in one batch. A picture depends on the server's seed, its label and
its sample number, and not on the batch: the noise of sample i is that of sample i, wherever it is drawn. (A pixel may
be rounded to the next of 256 levels.) So a client can have its picture again by its number.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Response
from PIL import Image

from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, ViTConfig


class Wanted(NamedTuple):
    """A picture that a client waits for."""

    label: int
    sample: int
    picture: asyncio.Future[np.ndarray]  # uint8 (H, W, channels)


class Batcher:
    """Collects requests and generates them together, one batch after the other.

    Attributes:
        sizes: of the batches so far.
    """

    def __init__(self, pipe: Pipeline, *, seed: int, max_batch: int) -> None:
        self.pipe, self.seed, self.max_batch = pipe, seed, max_batch
        self.queue: asyncio.Queue[Wanted] = asyncio.Queue()
        self.sizes: list[int] = []

    async def picture(self, label: int, sample: int) -> np.ndarray:
        """The picture of a label with a sample number; waits for the batch that it is generated in."""
        wanted = Wanted(label, sample, asyncio.get_running_loop().create_future())
        await self.queue.put(wanted)
        return await wanted.picture

    async def run(self) -> None:
        """Answers requests until the task is cancelled."""
        while True:
            batch = [await self.queue.get()]
            while len(batch) < self.max_batch and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            for run in consecutive(batch):
                try:
                    # In a thread, so that requests are received meanwhile; they form the next batch.
                    pictures = await asyncio.to_thread(self.generate, run)
                except Exception as error:
                    for wanted in run:
                        wanted.picture.set_exception(error)
                    continue
                self.sizes.append(len(run))
                for wanted, picture in zip(run, pictures, strict=True):
                    if not wanted.picture.cancelled():  # its client may have left
                        wanted.picture.set_result(picture)

    def generate(self, run: list[Wanted]) -> np.ndarray:
        """The pictures of requests with consecutive sample numbers, uint8 (B, H, W, channels)."""
        labels = [wanted.label for wanted in run]
        return self.pipe(labels, seed=self.seed, first_sample=run[0].sample).cpu().numpy()


def consecutive(batch: list[Wanted]) -> list[list[Wanted]]:
    """The requests by sample number, in runs of numbers that follow each other."""
    runs: list[list[Wanted]] = []
    for wanted in sorted(batch, key=lambda w: w.sample):
        if runs and wanted.sample == runs[-1][-1].sample + 1:
            runs[-1].append(wanted)
        else:
            runs.append([wanted])
    return runs


def make_app(pipe: Pipeline, *, seed: int = 0, max_batch: int = 16) -> FastAPI:
    """The web application; its `state.batcher` is the `Batcher` while it runs."""
    next_sample = itertools.count()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(pipe, seed=seed, max_batch=max_batch)
        task = asyncio.create_task(app.state.batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="titok", lifespan=lifespan)

    @app.get("/picture", response_class=Response)
    async def picture(label: int, sample: int | None = None) -> Response:
        """A PNG of a class. Without `sample` it gets the next number, which the header x-sample tells."""
        if not 0 <= label < pipe.generator.config.num_classes:
            raise HTTPException(422, f"label: expected 0 to {pipe.generator.config.num_classes - 1}, got {label}")
        if sample is not None and not 0 <= sample < 2**63:
            raise HTTPException(422, f"sample: expected an integer in [0, 2^63), got {sample}")
        number = next(next_sample) if sample is None else sample
        pixels = await app.state.batcher.picture(label, number)
        encoded = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(encoded, format="PNG")
        return Response(encoded.getvalue(), media_type="image/png", headers={"x-sample": str(number)})

    return app


def load_pipeline(folder: str | None) -> Pipeline:
    """The models in the sub-folders tokenizer and generator of a folder; without one, small random ones."""
    if folder is not None:
        return Pipeline.from_pretrained(f"{folder}/tokenizer", f"{folder}/generator")
    torch.manual_seed(0)
    vit = ViTConfig(width=64, layers=2, heads=2, patch_size=8)
    tokenizer = TokenizerConfig(
        image_size=32, encoder=vit, decoder=vit, num_latent_tokens=8, code_dim=8, codebook_size=64
    )
    generator = GeneratorConfig(
        num_latent_tokens=8, codebook_size=64, num_classes=10, width=64, layers=2, heads=2, mlp_width=128
    )
    return Pipeline(TiTok(tokenizer).eval(), MaskGIT(generator).eval())


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, and answers until the process is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="FOLDER", help="with sub-folders tokenizer and generator")
    parser.add_argument("--seed", type=int, default=0, help="of all pictures")
    parser.add_argument("--max-batch", type=int, default=16, help="pictures generated at a time")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    import uvicorn

    app = make_app(load_pipeline(options.models), seed=options.seed, max_batch=options.max_batch)
    uvicorn.run(app, host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
