"""The colour quickstart's pictures and its report, one HTML file that contains everything it shows."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titok.checkpoints.writing import atomic_path
from titok.data.emoji import CLASSES, LICENCE, Emoji
from titok.models.tokenizer import TiTok
from titok.quickstart.report import COLOURS, STYLE, curves, embedded, picture_rows, save_picture

SHOWN = 10  # held-out pictures in a row
SWAPS = 8  # tokens that are exchanged, one at a time
STAGES = {
    "vqgan": "2D tokenizer, {codes} codes",
    "proxy": "stage 1, {tokens} tokens, decoder of the 2D tokenizer",
    "tokenizer": "stage 2, {tokens} tokens",
}


def write_report(
    folder: Path,
    metrics: dict[str, Any],
    histories: dict[str, list[dict[str, float]]],
    emoji: Emoji,
    decoded: dict[str, Tensor],
    samples: Tensor,
    tokenizer: TiTok,
) -> None:
    """Writes `reconstructions.png`, `samples.png`, `swaps.png` and `report.html` into `folder`.

    Args:
        metrics: what `metrics.json` holds.
        histories: of each training run, by its name.
        decoded: held-out pictures as each stage reconstructs them.
        samples: (classes, n, 3, H, W), generated pictures.
        tokenizer: whose tokens are exchanged.
    """
    order = torch.randperm(len(emoji.test_images), generator=torch.Generator().manual_seed(0))
    chosen = order[: 2 * SHOWN]
    rows: list[tuple[str, Tensor]] = []
    for part in chosen.split(SHOWN):
        if rows:
            rows.append(("", emoji.test_images))  # the images of a space are not used
        rows.append(("held out", emoji.test_images[part]))
        rows += [(name, decoded[key][part]) for key, name in (("vqgan", "2D codes"), ("proxy", "stage 1"))]
        rows.append(("stage 2", decoded["tokenizer"][part]))
    save_picture(folder / "reconstructions.png", picture_rows(rows, scale=1))
    save_picture(folder / "samples.png", picture_rows(list(zip(CLASSES, samples, strict=True)), scale=1))
    save_picture(folder / "swaps.png", picture_rows(swap_rows(tokenizer, emoji.test_images[chosen]), scale=1))
    counts = {"codes": _codes_of_2d(tokenizer), "tokens": tokenizer.config.num_latent_tokens}
    minutes = metrics["wall_seconds"] / 60
    pictures = metrics["pictures"]
    summary = (
        f"{counts['tokens']} tokens for a picture of 64 x 64 pixels, of which the 2D tokenizer needs {counts['codes']} "
        f"codes. All models were trained from scratch on {pictures['trained on']:,} emoji in {minutes:.0f} minutes "
        f"({metrics['cpu_seconds']:,.0f} CPU-seconds), with seed {metrics['seed']}. Figures are of "
        f"{pictures['held out']} emoji that no model was trained on."
    )
    page = _PAGE.format(
        style=STYLE,
        summary=html.escape(summary),
        reconstructions=embedded(folder / "reconstructions.png"),
        samples=embedded(folder / "samples.png"),
        swaps=embedded(folder / "swaps.png"),
        table=_table(metrics, counts),
        probe=_probe(metrics["metrics"]),
        curves=curves(histories),
        folder=html.escape(str(folder)),
        licence=html.escape(LICENCE),
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


@torch.no_grad()
def swap_rows(tokenizer: TiTok, images: Tensor) -> list[tuple[str, Tensor]]:
    """Rows of pictures: two of them as decoded, then the first with one token of the second, for several tokens."""
    count = tokenizer.config.num_latent_tokens
    share = count // SWAPS  # one token of each share, in various places of it
    positions = [number * share + (3 * number + 2) % share for number in range(SWAPS)]
    rows = []
    for first, second in tokenizer.encode(images[:8]).unflatten(0, (-1, 2)):
        mixed = first.repeat(SWAPS, 1)
        for row, position in enumerate(positions):
            mixed[row, position] = second[position]
        pictures = tokenizer.decode(torch.cat([first[None], second[None], mixed]))
        rows.append((f"A, B, A with B's token {', '.join(str(position) for position in positions)}", pictures))
    return [("A, B, swaps", pictures.clamp(0, 1)) for _, pictures in rows]


def _codes_of_2d(tokenizer: TiTok) -> int:
    assert tokenizer.config.proxy is not None
    height, width = (side // tokenizer.config.proxy.factor for side in tokenizer.config.image_size)
    return height * width


def _table(metrics: dict[str, Any], counts: dict[str, int]) -> str:
    figures, rows = metrics["metrics"], []
    for key, name in STAGES.items():
        distance = figures[f"{key}_distance"]
        text = "not measured" if distance is None else f"{distance:.1f}"
        rows.append(
            f"<tr><td>{html.escape(name.format(**counts))}</td><td class='n'><b>{figures[f'{key}_psnr']:.2f} dB</b>"
            f"</td><td class='n'>{text}</td></tr>"
        )
    reached = figures["tokenizer_psnr"] >= metrics["required_psnr"]
    colour, word = (COLOURS["good"], "reached") if reached else (COLOURS["bad"], "missed")
    rows.append(
        f"<tr><td>required of stage 2: {metrics['required_psnr']:g} dB</td><td class='n' style='color:{colour}'>{word}"
        "</td><td></td></tr>"
    )
    rows.append(
        f"<tr><td>codes in use, of {metrics['codebook_size']:,}</td><td class='n'><b>{figures['codes']:,}</b></td>"
        f"<td class='n'>{figures['entropy']:.2f} bits</td></tr>"
    )
    return "\n".join(rows)


def _probe(figures: dict[str, float]) -> str:
    return (
        f"A linear classifier reads the class of {100 * figures['probe_latents']:.0f}% of the held-out emoji from the "
        f"latents, and of {100 * figures['probe_pixels']:.0f}% from the pixels."
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>titok: emoji in tokens</title>
<style>{style}</style></head><body><main>
<h1>Emoji in tokens</h1>
<p>{summary}</p>
<figure><img src="{reconstructions}" alt="held-out emoji and their reconstructions by each stage">
<figcaption>Emoji that no model was trained on, not selected, and what each stage makes of them.</figcaption></figure>
<h2>Figures</h2>
<table><thead><tr><th>reconstruction of held-out emoji</th><th class="n">PSNR</th><th class="n">Frechet distance,
EfficientNet-Lite0</th></tr></thead><tbody>
{table}
</tbody></table>
<p class="muted" style="margin-top:10px">{probe}</p>
<h2>Generated</h2>
<figure><img src="{samples}" alt="generated emoji, one row for each class">
<figcaption>One row for each class, not selected.</figcaption></figure>
<h2>What a token means</h2>
<figure><img src="{swaps}" alt="emoji with one token exchanged">
<figcaption>In each row two emoji, A and B, then A with one of its tokens replaced by that of B, for eight of the
tokens. Each token began as a copy of a patch, and still describes its surroundings.</figcaption></figure>
<h2>Training</h2>
{curves}
<h2>Use the models</h2>
<pre>import titok
pipeline = titok.Pipeline.from_pretrained("{folder}/tokenizer", "{folder}/generator")
images = pipeline([0, 3, 5], seed=9)   # uint8 (3, 64, 64, 3): a face, something to eat, a flag</pre>
<p class="muted" style="margin-top:14px">{licence}. The pictures on this page are derived from them, under the same
licence.</p>
</main></body></html>
"""
