"""The page of `titok demo` in headless Chromium. Skipped where gradio, playwright or Chromium is missing.

One visit of each tab is one test, because a page takes seconds to load.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from titok import Pipeline
from titok.demo.logic import Demo

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 600_000.0  # milliseconds, which only a page that hangs takes, also on a busy machine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def demo(tiny_tokenizer: Callable[..., Any], tiny_generator: Callable[..., Any]) -> Demo:
    return Demo(Pipeline(tiny_tokenizer(), tiny_generator()))


@pytest.fixture(scope="module")
def address(demo: Demo) -> Iterator[str]:
    """Of a server in a thread of this process."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    import uvicorn

    from titok.demo.page import ADDRESS, make_server

    with socket.socket() as free:
        free.bind((ADDRESS, 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_server(demo), host=ADDRESS, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended"
        time.sleep(0.05)
    yield f"http://{ADDRESS}:{port}/"
    server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextlib.contextmanager
def visit(browser: Any, address: str) -> Iterator[Any]:
    """The page of a new visitor, who must make no request to another machine."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    yield page
    assert len(requests) > 10
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def upload(page: Any, place: str, path: Path) -> None:
    page.locator(f"#{place} input[type=file]").set_input_files(path)
    page.locator(f"#{place} img").wait_for()


def shown(page: Any, place: str) -> np.ndarray:
    """The pixels of a picture on the page."""
    image = page.locator(f"#{place} img").first
    image.wait_for()
    return np.asarray(Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB"))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < end, "the page does not get there"
        time.sleep(0.1)


def wait_for_picture(page: Any, place: str, expected: np.ndarray) -> None:
    wait_until(lambda: np.array_equal(shown(page, place), expected))


def test_two_visitors_generate_their_own_pictures(browser: Any, address: str, demo: Demo) -> None:
    with visit(browser, address) as first, visit(browser, address) as second:
        for page, seed in ((first, "3"), (second, "4")):
            page.locator("#generate-seed input").fill(seed)
        click(first, "Generate")
        click(second, "Generate")
        expected = [list(demo.generate(0, seed)) for seed in (3, 4)]
        assert not np.array_equal(expected[0][-1].picture, expected[1][-1].picture)
        for page, stages in zip((first, second), expected, strict=True):
            wait_for_picture(page, "generated", stages[-1].picture)
            wait_until(lambda: page.locator("#steps img").count() == len(stages))  # noqa: B023


def test_reconstruction_and_a_bad_upload(
    browser: Any, address: str, demo: Demo, photos: Path, tmp_path: Path
) -> None:
    with visit(browser, address) as page:
        open_tab(page, "Reconstruct")
        upload(page, "upload", photos / "b.png")
        click(page, "Reconstruct")
        result = demo.reconstruct(photos / "b.png")
        wait_for_picture(page, "copy", result.copy)
        wait_for_picture(page, "original", result.original)
        assert page.locator("#psnr textarea, #psnr input").input_value() == f"{result.psnr:.2f} dB"
        page.reload()
        open_tab(page, "Reconstruct")
        bad = tmp_path / "bad.png"
        bad.write_text("no picture")
        page.locator("#upload input[type=file]").set_input_files(bad)
        page.locator("#upload img").wait_for(state="attached")
        click(page, "Reconstruct")
        page.get_by_text("This file is not a picture that can be read here.").wait_for()


def test_editing_and_inpainting(browser: Any, address: str, demo: Demo, photos: Path) -> None:
    with visit(browser, address) as page:
        open_tab(page, "Edit")
        tokens = page.locator("#edit-tokens textarea")
        tokens.fill("1 2 3 4")
        click(page, "Show the picture")
        wait_for_picture(page, "edited", demo.decode([1, 2, 3, 4]))
        page.locator("#positions").locator("textarea, input").fill("1-2")
        page.locator("#inpaint-seed input").fill("5")
        click(page, "In-paint")
        wait_for_picture(page, "edited", list(demo.inpaint([1, 2, 3, 4], [1, 2], 0, 5))[-1].picture)
        tokens.fill("1 2 3")
        click(page, "Show the picture")
        page.get_by_text("A picture has 4 tokens, and there are 3 here.").wait_for()
        page.get_by_text("Take the tokens of a picture").click()
        upload(page, "edit-upload", photos / "a.png")
        click(page, "Take its tokens")
        expected = " ".join(map(str, demo.reconstruct(photos / "a.png").tokens))
        wait_until(lambda: tokens.input_value() == expected)


def test_swap(browser: Any, address: str, demo: Demo, photos: Path) -> None:
    names = {"first": "a.png", "second": "b.png"}
    with visit(browser, address) as page:
        open_tab(page, "Swap")
        for place, name in names.items():
            upload(page, f"swap-upload-{place}", photos / name)
        click(page, "Swap")
        a, b = (demo.reconstruct(photos / name).tokens for name in names.values())
        for place, tokens in zip(names, demo.swap(a, b, [0, 1]), strict=True):
            wait_for_picture(page, f"swapped-{place}", demo.decode(tokens))
