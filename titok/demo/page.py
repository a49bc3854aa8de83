"""The page of `titok demo`, made with gradio, and the server that answers with it.

The page takes everything that it needs from this server. A Content-Security-Policy makes the browser refuse anything
else, so that no request leaves the machine.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import numpy as np
import uvicorn
from PIL import Image

from titok.data.class_names import NUM_CLASSES, read_imagenet_names
from titok.demo.logic import Demo, Picture, Stage

TITLE = "titok: pictures as tokens"
ADDRESS = "127.0.0.1"
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "media-src 'self' data: blob:; frame-ancestors 'none'"
)
NO_CLASS = "no class"
STYLE = """
.tokens textarea { font-family: ui-monospace, monospace; }
.steps .grid-wrap { min-height: 0 !important; max-height: none !important; overflow: visible !important; }
.steps .grid-container { grid-template-rows: none !important; }
@media (max-width: 640px) { .steps .grid-container { grid-template-columns: repeat(2, 1fr) !important; } }
"""


class KeepBrowsersHere:
    """ASGI middleware: adds to every answer the headers that keep a browser from asking other machines.

    FastAPI's decorator for middleware is not used, because it ends a streamed answer wrongly when its reader leaves.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [
                    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def serve(demo: Demo, port: int) -> None:
    """Answers browsers on this machine until the process is interrupted."""
    uvicorn.run(make_server(demo), host=ADDRESS, port=port, log_level="warning")


def make_server(demo: Demo) -> fastapi.FastAPI:
    """The web application: the page at "/"."""
    server = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    server.add_middleware(KeepBrowsersHere)
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        server,
        make_page(demo),
        path="/",
        server_name=ADDRESS,
        theme=theme,
        css=STYLE,
        footer_links=[],
        ssr_mode=False,
        max_file_size="20mb",
    )


def make_page(demo: Demo) -> gr.Blocks:
    """The page with its four tabs."""
    config = demo.tokenizer.config
    height, width = config.image_size
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# {TITLE}\nThis tokenizer turns a picture of {width} x {height} pixels into {demo.length} tokens, each "
            f"one of {demo.codes} codes. The generator draws tokens for one of {demo.num_classes} classes."
        )
        with gr.Tab("Generate"):
            _generate_tab(demo)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(demo)
        with gr.Tab("Edit"):
            _edit_tab(demo)
        with gr.Tab("Swap"):
            _swap_tab(demo)
    return page


# ---------------------------------------------------------------------------------------------------------------
# Tabs


def _generate_tab(demo: Demo) -> None:
    sampling = demo.generator.config.sampling
    with gr.Row():
        with gr.Column(scale=1):
            label, seed = _class_and_seed(demo)
            with gr.Accordion("Decoding", open=False):
                steps = gr.Slider(1, max(16, sampling.steps), sampling.steps, step=1, label="Steps")
                guidance = gr.Slider(0, 20, sampling.guidance_scale, step=0.5, label="Guidance scale")
                temperature = gr.Slider(0, 20, sampling.temperature, step=0.5, label="Temperature")
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            picture = _picture("Picture", "generated")
            tokens = _tokens("Its tokens")
    gallery = _gallery("Step by step. Tokens that are still masked count as the mean of all codes.", "steps")

    def act(label: str, seed: float, steps: int, guidance: float, temperature: float) -> Iterator[Any]:
        stages = demo.generate(
            _class(label), _seed(seed), steps=int(steps), guidance=guidance, temperature=temperature
        )
        yield from _as_they_come(stages)

    inputs: list[Any] = [label, seed, steps, guidance, temperature]
    button.click(_as_gradio_calls_it(act), inputs, [picture, tokens, gallery], api_name="generate")


def _reconstruct_tab(demo: Demo) -> None:
    upload = _upload("Your picture", "upload")
    button = gr.Button("Reconstruct", variant="primary")
    with gr.Row():
        original, copy = _picture("Original", "original"), _picture("From tokens", "copy")
    ratio = gr.Textbox(label="PSNR", interactive=False, elem_id="psnr")
    tokens = _tokens("Its tokens")

    def act(path: str | None) -> Iterator[Any]:
        result = demo.reconstruct(path)
        yield result.original, result.copy, f"{result.psnr:.2f} dB", _text(result.tokens)

    button.click(_as_gradio_calls_it(act), [upload], [original, copy, ratio, tokens], api_name="reconstruct")


def _edit_tab(demo: Demo) -> None:
    gr.Markdown(
        "Change tokens by hand and look at the picture; or give positions, and the generator draws new tokens there "
        "that fit the others (in-painting). The tokens can be those of a picture of yours, or copied from another tab."
    )
    with gr.Row():
        with gr.Column(scale=1):
            with gr.Accordion("Take the tokens of a picture", open=False):
                upload = _upload("Your picture", "edit-upload")
                read = gr.Button("Take its tokens")
            tokens = _tokens("Tokens", interactive=True, value=_text([0] * demo.length), name="edit-tokens")
            show = gr.Button("Show the picture", variant="primary")
            positions = gr.Textbox(
                f"0-{(demo.length - 1) // 2}", label="Positions to draw anew, such as 0-3, 7", elem_id="positions"
            )
            label, seed = _class_and_seed(demo, name="inpaint")
            inpaint = gr.Button("In-paint", variant="primary")
        with gr.Column(scale=1):
            picture = _picture("Picture", "edited")
    gallery = _gallery("In-painting, step by step.", "inpaint-steps")

    def take(path: str | None) -> Iterator[Any]:
        result = demo.reconstruct(path)
        yield _text(result.tokens), result.copy

    def decode(text: str) -> Iterator[Any]:
        yield demo.decode(demo.parse_tokens(text))

    def draw(text: str, places: str, label: str, seed: float) -> Iterator[Any]:
        stages = demo.inpaint(demo.parse_tokens(text), demo.parse_positions(places), _class(label), _seed(seed))
        # The tokens stay as they are until the last step, so that a visitor can draw again from the same ones.
        for shown, _, steps in _as_they_come(stages):
            yield shown, steps

    read.click(_as_gradio_calls_it(take), [upload], [tokens, picture], api_name="tokens")
    show.click(_as_gradio_calls_it(decode), [tokens], [picture], api_name="decode")
    inpaint.click(
        _as_gradio_calls_it(draw), [tokens, positions, label, seed], [picture, gallery], api_name="inpaint"
    )


def _swap_tab(demo: Demo) -> None:
    with gr.Row():
        uploads = [_upload(f"{name} picture", f"swap-upload-{name.lower()}") for name in ("First", "Second")]
    positions = gr.Textbox(
        f"0-{(demo.length - 1) // 2}", label="Positions to swap, such as 0-3, 7", elem_id="swap-positions"
    )
    button = gr.Button("Swap", variant="primary")
    with gr.Row():
        pictures = [_picture(f"{name}, swapped", f"swapped-{name.lower()}") for name in ("First", "Second")]
    texts = [_tokens(f"Tokens of the {name} picture, swapped") for name in ("first", "second")]

    def act(first: str | None, second: str | None, places: str) -> Iterator[Any]:
        tokens = [demo.reconstruct(path).tokens for path in (first, second)]
        swapped = demo.swap(tokens[0], tokens[1], demo.parse_positions(places))
        yield *(demo.decode(x) for x in swapped), *(_text(x) for x in swapped)

    button.click(_as_gradio_calls_it(act), [*uploads, positions], [*pictures, *texts], api_name="swap")


# ---------------------------------------------------------------------------------------------------------------
# Parts that several tabs have


def _class_and_seed(demo: Demo, name: str = "generate") -> tuple[gr.Dropdown, gr.Number]:
    numbers = [str(i) for i in range(demo.num_classes)]
    names = numbers
    if demo.num_classes == NUM_CLASSES:
        names = [f"{number}: {known[0]}" for number, known in zip(numbers, read_imagenet_names(), strict=True)]
    classes = [*zip(names, numbers, strict=True), (NO_CLASS, NO_CLASS)]
    label = gr.Dropdown(classes, value="0", label="Class", filterable=True, elem_id=f"{name}-class")
    return label, gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{name}-seed")


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, format="png", height=300, elem_id=name, buttons=["download"])


def _gallery(heading: str, name: str) -> gr.Gallery:
    gr.Markdown(heading)
    return gr.Gallery(
        show_label=False,
        columns=5,
        height="auto",
        format="png",
        interactive=False,
        elem_id=name,
        elem_classes=["steps"],
        object_fit="contain",
        buttons=[],
    )


def _tokens(label: str, *, interactive: bool = False, value: str = "", name: str | None = None) -> gr.Textbox:
    return gr.Textbox(
        value, label=label, interactive=interactive, lines=2, max_lines=16, elem_classes=["tokens"], elem_id=name
    )


def _upload(label: str, name: str) -> gr.Image:
    upload: Any = gr.Image(label=label, sources=["upload"], type="filepath", height=300, elem_id=name, buttons=[])
    # Reading the file is left to `Demo`, which explains in a sentence why a file cannot be read.
    upload.preprocess = lambda payload: None if payload is None else payload.path
    return upload


def _as_they_come(stages: Iterator[Stage]) -> Iterator[tuple[Picture, str, list[tuple[Picture, str]]]]:
    """For each stage the picture, its tokens, and all pictures so far with their captions."""
    so_far: list[tuple[Picture, str]] = []
    for stage in stages:
        so_far.append((stage.picture, stage.caption))
        yield stage.picture, _text(stage.tokens), list(so_far)


def _text(tokens: list[int] | list[int | None]) -> str:
    return " ".join("_" if token is None else str(token) for token in tokens)


def _class(label: str) -> int | None:
    return None if label == NO_CLASS else int(label)


def _seed(value: float | None) -> int:
    if value is None or not 0 <= value < 2**53:  # integers above are not exact in a browser
        raise ValueError("The seed is an integer from 0 to 9007199254740991.")
    return int(value)


def _with_files(value: Any, folder: Path, written: list[tuple[Picture, str]]) -> Any:
    """The value with the path of a PNG in `folder` in place of every picture. `written` lists those that are there."""
    if isinstance(value, list | tuple):
        return type(value)(_with_files(part, folder, written) for part in value)
    if not isinstance(value, np.ndarray):
        return value
    for picture, path in written:
        if picture is value:
            return path
    path = str(folder / f"{len(written)}.png")
    Image.fromarray(value).save(path)
    written.append((value, path))
    return path


def _as_gradio_calls_it(act: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The function as gradio calls it: pictures are files, and an error is a sentence that leaves the page as it was.

    gradio writes a picture that is shown a second time again to the same file, while a browser may be reading it.
    A file it copies at once, and a single time.
    """

    def wrapped(*inputs: Any) -> Iterator[Any]:
        with tempfile.TemporaryDirectory(prefix="titok-demo-") as folder:
            written: list[tuple[Picture, str]] = []
            try:
                for outputs in act(*inputs):
                    yield _with_files(outputs, Path(folder), written)
            except (ValueError, TypeError) as error:
                gr.Warning(html.escape(str(error), quote=False))
                yield gr.skip()

    return wrapped
