"""The quickstart's pictures and its report, one HTML file that contains everything it shows."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from titok.checkpoints.writing import atomic_path
from titok.data.images import to_uint8
from titok.quickstart.metrics import REQUIREMENTS

COLOURS = {"ink": "#1b1f24", "muted": "#6b7280", "accent": "#2f5fd0", "good": "#1a7f4b", "bad": "#c2372e"}


def picture_rows(
    rows: list[tuple[str, Tensor]], *, font_size: int = 20, scale: int = 3, gap: int = 6
) -> Image.Image:
    """One picture, made of rows of images with a text in front of each row.

    Args:
        rows: texts and images (n, 1, H, W) or (n, 3, H, W) in [0, 1]. The text "" makes a narrow space instead of a row.
        font_size: in pixels.
        scale: by which the images are enlarged.
        gap: in pixels, between images.
    """
    font = ImageFont.load_default(size=font_size)
    images = next(images for text, images in rows if text)
    count, channels, height, width = images.shape
    height, width = height * scale, width * scale
    left = 24 + int(max(font.getlength(text) for text, _ in rows))
    total = sum(height + gap if text else 3 * gap for text, _ in rows)
    mode, white = ("L", 255) if channels == 1 else ("RGB", (255, 255, 255))
    canvas = Image.new(mode, (left + count * (width + gap) + gap, total + gap), white)
    draw = ImageDraw.Draw(canvas)
    top = gap
    for text, images in rows:
        if not text:
            top += 3 * gap
            continue
        draw.text((left - 12, top + height // 2), text, fill="#282828", font=font, anchor="rm")
        for i, image in enumerate(to_uint8(images).squeeze(-1)):
            tile = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(tile, (left + i * (width + gap), top))
        top += height + gap
    return canvas


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG file; an existing file is replaced once the new one is complete."""
    encoded = io.BytesIO()  # written by us, because Pillow's encoders do not all report a full disk
    picture.save(encoded, format="PNG", optimize=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


def reconstruction_rows(images: Tensor, reconstructions: Tensor, labels: Tensor) -> list[tuple[str, Tensor]]:
    """Rows for `picture_rows`: two digits of each class, each above its reconstruction."""
    rows: list[tuple[str, Tensor]] = []
    for nth in range(2):
        chosen = torch.tensor([int((labels == digit).nonzero()[nth]) for digit in range(10)])
        if rows:
            rows.append(("", images))  # the images of a space are not used
        rows += [("held out", images[chosen]), ("decoded", reconstructions[chosen])]
    return rows


def curves(histories: dict[str, list[dict[str, float]]]) -> str:
    """The figures of each run over its steps, as an SVG element.

    Args:
        histories: of the runs, by the name of the run, as `titok.training.metrics.read_metrics` returns them.
    """
    from matplotlib.figure import Figure

    titles = {
        "loss": "loss",
        "psnr": "PSNR of the batch, dB",
        "codes": "codes in use",
        "accuracy": "masked tokens correct",
    }
    panels = [(run, key) for run, rows in histories.items() if rows for key in titles if key in rows[0]]
    figure = Figure(figsize=(2.5 * len(panels), 2.1), layout="constrained")
    for axes, (run, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        steps, values = zip(*[(row["step"], row[key]) for row in histories[run]], strict=True)
        axes.plot(steps, values, color="#c9d4ee", linewidth=0.8)
        axes.plot(steps, _smoothed(list(values)), color=COLOURS["accent"], linewidth=1.6)
        axes.set_title(f"{run}: {titles[key]}", fontsize=8, color=COLOURS["ink"], loc="left")
        axes.tick_params(labelsize=7, colors=COLOURS["muted"], length=2)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#d5d9e0")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smoothed(values: list[float], reach: int = 3) -> list[float]:
    """The mean of each value and up to `reach` neighbours on both sides.

    Near an end of the list there are fewer neighbours, but as many on one side as on the other, so that the curve
    does not lag behind the values.
    """
    means = []
    for i in range(len(values)):
        neighbours = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - neighbours : i + neighbours + 1]) / (2 * neighbours + 1))
    return means


def embedded(path: Path) -> str:
    """The picture in a file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _table(metrics: dict[str, Any]) -> str:
    """The rows of the table of requirements."""
    rows = []
    for requirement in REQUIREMENTS:
        value = metrics[requirement.key]
        color, symbol = (COLOURS["good"], "✓") if requirement.met_by(value) else (COLOURS["bad"], "✗")
        sign = "≥" if requirement.at_least else "≤"
        rows.append(
            f'<tr><td><span class="mark" style="color:{color}">{symbol}</span></td>'
            f"<td>{html.escape(requirement.meaning)}</td>"
            f'<td class="n"><b>{requirement.text(value)}</b></td>'
            f'<td class="n limit">{sign} {requirement.text(requirement.value)}</td></tr>'
        )
    return "\n".join(rows)


STYLE = """
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f4f5f7; color: {ink};
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, sans-serif; }}
main {{ max-width: 1020px; margin: 28px auto; background: #fff; padding: 28px 40px 32px; border-radius: 10px;
  box-shadow: 0 1px 4px rgb(0 0 0 / 9%); }}
h1 {{ font-size: 25px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -.01em; }}
h2 {{ font-size: 16px; margin: 26px 0 8px; }}
p {{ margin: 0 0 10px; max-width: 76ch; }}
.muted, figcaption {{ color: {muted}; font-size: 13px; }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 26px; align-items: start; }}
figure {{ margin: 0; }} figure img {{ width: 100%; display: block; border-radius: 4px; }}
figcaption {{ margin-top: 6px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th {{ text-align: left; font-weight: 600; font-size: 12px; color: {muted}; }}
td, th {{ padding: 5px 8px 5px 0; border-bottom: 1px solid #eceef1; }}
.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }} .limit {{ color: {muted}; }}
.mark {{ font-weight: 700; }}
svg {{ width: 100%; height: auto; display: block; }}
pre {{ background: #f4f5f7; padding: 12px 14px; border-radius: 6px; font-size: 13px; line-height: 1.45; margin: 0;
  overflow-x: auto; }}
@media (max-width: 760px) {{ main {{ padding: 20px; }} .two {{ grid-template-columns: 1fr; }} }}
""".format(**COLOURS)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>titok quickstart</title>
<style>{style}</style></head><body><main>
<h1>Handwritten digits in {tokens} tokens</h1>
<p>{summary}</p>
<div class="two">
<figure><img src="{samples}" alt="generated digits, one row for each class">
<figcaption>Generated digits, one row for each class, not selected. Each took {steps} decoding
steps.</figcaption></figure> <div><table><thead><tr><th></th><th>measured</th><th class="n">value</th><th
class="n">required</th></tr></thead> <tbody>
{table}
</tbody></table>
<p class="muted" style="margin-top:10px">{notes}</p></div>
</div>
<h2>Reconstructions</h2>
<figure><img src="{reconstructions}" alt="held-out digits above their reconstructions">
<figcaption>Digits that were not used in training, above their reconstructions from {tokens} tokens.</figcaption>
</figure>
<h2>Training</h2>
{curves}
<h2>Use the two models</h2>
<pre>import titok
pipeline = titok.Pipeline.from_pretrained("{folder}/tokenizer", "{folder}/generator")
images = pipeline([3, 1, 4, 1, 5], seed=9)   # uint8 (5, 32, 32, 1)</pre>
</main></body></html>
"""


def write_report(
    folder: Path, metrics: dict[str, Any], histories: dict[str, list[dict[str, float]]], texts: dict[str, Any]
) -> Path:
    """Writes `report.html` into `folder`, which holds `samples.png` and `reconstructions.png` already.

    Args:
        metrics: as `titok.quickstart.metrics.measure` returns them.
        histories: of each training run, by its name.
        texts: "tokens", "decoding_steps", "summary" and "notes", which the page shows.

    Returns:
        the path of the report.
    """
    page = _PAGE.format(
        style=STYLE,
        tokens=texts["tokens"],
        steps=texts["decoding_steps"],
        summary=html.escape(texts["summary"]),
        notes=html.escape(texts["notes"]),
        samples=embedded(folder / "samples.png"),
        reconstructions=embedded(folder / "reconstructions.png"),
        table=_table(metrics),
        curves=curves(histories),
        folder=html.escape(str(folder)),
    )
    path = folder / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
