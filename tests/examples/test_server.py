"""examples/server.py: several clients at a time, each with its own picture."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_examples import load

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


async def ask(server, app, queries: list[dict[str, int]]) -> list:
    """The answers to requests that are sent at the same time."""
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://x") as client,
    ):
        return list(await asyncio.gather(*(client.get("/picture", params=query) for query in queries)))


def test_clients_share_batches_and_get_their_own_pictures() -> None:
    server = load("server")
    pipe = server.load_pipeline(None)
    app = server.make_app(pipe, seed=3, max_batch=4)
    labels = [5, 1, 1, 7, 0, 2, 9, 5]
    answers = asyncio.run(ask(server, app, [{"label": label} for label in labels]))
    assert all(answer.status_code == 200 for answer in answers)
    assert sum(app.state.batcher.sizes) == 8
    assert 1 < max(app.state.batcher.sizes) <= 4
    numbers = [int(answer.headers["x-sample"]) for answer in answers]
    assert sorted(numbers) == list(range(8))
    for label, number, answer in zip(labels, numbers, answers, strict=True):
        alone = pipe([label], seed=3, first_sample=number)[0]
        assert np.abs(pixels(answer.content) - alone.numpy()).max() <= 1  # rounded to the next of 256 levels
    assert len({answer.content for answer in answers}) == 8


def test_a_picture_again_by_its_number_and_wrong_requests() -> None:
    server = load("server")
    pipe = server.load_pipeline(None)
    app = server.make_app(pipe)
    queries = [{"label": 3, "sample": 7}, {"label": 4, "sample": 100}, {"label": 10}, {"label": 1, "sample": -1}]
    first, second, no_class, no_sample = asyncio.run(ask(server, app, queries))
    for answer, label, sample in ((first, 3, 7), (second, 4, 100)):
        alone = pipe(torch.tensor([label]), first_sample=sample)[0]
        assert np.abs(pixels(answer.content) - alone.numpy()).max() <= 1
    assert no_class.status_code == no_sample.status_code == 422
    assert "label: expected 0 to 9, got 10" in no_class.text
