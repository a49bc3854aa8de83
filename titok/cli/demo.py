"""`titok demo`: a web page on this machine to try a tokenizer and its generator."""

from __future__ import annotations

from typing import Annotated

import typer

from titok.cli.errors import note
from titok.cli.inputs import load_generator, load_tokenizer
from titok.cli.options import DeviceOption, DtypeOption, GeneratorOption, TokenizerOption


def demo(
    tokenizer: TokenizerOption,
    generator: GeneratorOption,
    port: Annotated[
        int, typer.Option(metavar="N", min=1, max=65535, help="Of the page: http://127.0.0.1:N.")
    ] = 7860,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Open a page to generate, reconstruct, edit, swap and in-paint.

    The page answers this machine alone, and loads nothing from elsewhere. Needs
    pip install 'titok-kernels[demo]'. Ctrl-C ends it.

    \b
    titok demo -t runs/quickstart/tokenizer -g runs/quickstart/generator
    """
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by gradio when it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from titok.demo.page import ADDRESS, serve
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "titok":
            raise
        raise ModuleNotFoundError(
            f"{error.name}, which the page needs, is not installed: pip install 'titok-kernels[demo]'"
        ) from error
    from titok import Pipeline
    from titok.demo.logic import Demo

    pipe = Pipeline(load_tokenizer(tokenizer, device, dtype), load_generator(generator, device, dtype))
    note(f"http://{ADDRESS}:{port} shows the page; Ctrl-C ends it")
    serve(Demo(pipe), port)
