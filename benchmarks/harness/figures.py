"""The figures of docs/performance.md: every number and table in it, by the name that its template uses.

This file is longer than 400 lines because every name that the template may use is defined in it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness import flops, gpu_tables, measures, rival_tables, tables
from benchmarks.harness.results import Row, quantiles
from benchmarks.harness.tables import number, percent
from titok.config import GeneratorConfig, TokenizerConfig, VQGANConfig

Figures = dict[str, str]
DIT_STEPS = 250
NAMES = {
    "titok-l-32": "TiTok-L-32",
    "titok-b-64": "TiTok-B-64",
    "titok-s-128": "TiTok-S-128",
    "titok-l-64-512": "TiTok-L-64",
    "titok-b-128-512": "TiTok-B-128",
}
# What the table of ops has: title, bench, case, peer.
OP_LINES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("`nearest_codebook`", "nearest_codebook", {}, "official"),
    ("`nearest_codebook`", "nearest_codebook", {}, "faiss"),
    ("`masked_attention`, forward", "masked_attention", {"direction": "forward"}, "sdpa"),
    ("`masked_attention`, forward", "masked_attention", {"direction": "forward"}, "eager"),
    ("`masked_attention`, forward", "masked_attention", {"direction": "forward"}, "best SDPA"),
    ("`masked_attention`, forward and backward", "masked_attention", {"direction": "forward+backward"}, "sdpa"),
    ("`masked_attention`, forward and backward", "masked_attention", {"direction": "forward+backward"}, "eager"),
    ("`code_mixture`", "code_mixture", {}, "official"),
    ("`group_norm_silu`", "group_norm_silu", {"residual": "no"}, "eager"),
    ("`group_norm_silu`", "group_norm_silu", {"residual": "no"}, "compiled"),
    ("`group_norm_silu` with a residual sum", "group_norm_silu", {"residual": "yes"}, "eager"),
    ("`add_layer_norm`, forward", "add_layer_norm", {"direction": "forward"}, "eager"),
    ("`add_layer_norm`, forward and backward", "add_layer_norm", {"direction": "forward+backward"}, "eager"),
    ("`maskgit_decode_step`", "maskgit_decode_step", {}, "official"),
    ("`maskgit_decode_step`", "maskgit_decode_step", {}, "diffusers"),
)
PEERS = {
    "official": "the official expression",
    "sdpa": "SDPA with the copies that it needs",
    "eager": "PyTorch's separate ops",
    "faiss": "faiss-cpu, exact search",
    "best SDPA": "the fastest back end of SDPA",
    "compiled": "`torch.compile`",
    "diffusers": "diffusers' `AmusedScheduler`",
}
SDPA_PEERS = ("sdpa", "views", "flash", "math", "cudnn", "efficient")
FEW_CASES = 6  # an op with at most so many cases gets a line for each


def figures(rows: Sequence[Row]) -> Figures:
    """Name -> text, for every placeholder of the template: from CPU results, and the tables of GPU results.

    Raises:
        LookupError: a figure's measurement is in none of the results files.
    """
    on_cpu = [row for row in rows if measures.ran_on_cpu(row)]
    found: Figures = {"gpu_tables": gpu_tables.measured(rows), **rival_tables.today(on_cpu)}
    parts = (
        work,
        speedups,
        published,
        ladder,
        memory,
        training,
        waiting,
        int8,
        roofline,
        ops,
        masked_decode,
        dispatcher,
    )
    for part in parts:
        found |= part(on_cpu)
    return found


def work(rows: Sequence[Row]) -> Figures:
    """FLOP of one image by formula; these need no measurement."""
    lines = []
    for preset, name in NAMES.items():
        t, g = TokenizerConfig.preset(preset), GeneratorConfig.preset(preset)
        as_written = flops.total(
            (flops.generate(g, as_written=True), flops.decoder(t, all_rows=True), flops.pixel_decoder(t))
        )
        stages = (flops.generate(g), flops.decoder(t), flops.pixel_decoder(t, folded=True))
        columns = [as_written, flops.total(stages), *stages]
        title = f"{name}, {t.image_size[0]} px, {g.sampling.steps} steps"
        lines.append([title, *(number(column.flops / 1e12) for column in columns)])
    for title, formula in (("MaskGIT + VQGAN, {} px, 8 steps", _maskgit), ("DiT-XL/2, {} px, 250 steps", _dit)):
        lines += [[title.format(px), number(formula(px) / 1e12), "", "", "", ""] for px in (256, 512)]
    header = ["TFLOP an image", "as written", "as titok computes it", "generator", "ViT decoder", "pixel decoder"]
    generator = flops.generator_pass(GeneratorConfig.preset("titok-l-32"), 1, 1)
    return {
        "work_table": tables.markdown(header, lines),
        "work_ratio_512": number(_dit(512) / _titok("titok-l-64-512")),
        "work_ratio_256": number(_dit(256) / _titok("titok-l-32")),
        "work_l32_as_written": number(_titok("titok-l-32", as_written=True) / 1e12),
        "work_l32": number(_titok("titok-l-32") / 1e12),
        "generator_megabytes_l32": number(2 * generator.weights / 1e6),  # two bytes a weight in bfloat16
    }


def _titok(preset: str, *, as_written: bool = False) -> int:
    t, g = TokenizerConfig.preset(preset), GeneratorConfig.preset(preset)
    parts = (
        flops.generate(g, as_written=as_written),
        flops.decoder(t, all_rows=as_written),
        flops.pixel_decoder(t, folded=not as_written),
    )
    return flops.total(parts).flops


def _maskgit(resolution: int) -> int:
    width = resolution // 16
    generator = GeneratorConfig(width * width, VQGANConfig().codebook_size)
    decoder = flops.vqgan_decoder(VQGANConfig(), 1, width, width)
    return flops.generate(generator, as_written=True).plus(decoder).flops


def _dit(resolution: int) -> int:
    passes = flops.dit_pass(2, resolution // 16).times(DIT_STEPS)
    return passes.plus(flops.vae_decoder(1, resolution // 8)).flops


def speedups(rows: Sequence[Row]) -> Figures:
    """The comparisons with DiT-XL/2 and MaskGIT."""
    sides = measures.select(rows, "speedup")
    found: Figures = {
        "machine": "; ".join(dict.fromkeys(map(_machine, sides))),
        "batches": ", ".join(str(batch) for batch in sorted({row["case"]["batch"] for row in sides})),
    }
    for preset, resolution, dtypes in (
        ("titok-l-64-512", 512, ("bf16", "fp32")),
        ("titok-l-32", 256, ("bf16", "fp32")),
    ):
        for dtype in dtypes:
            case = {"resolution": resolution, "dtype": dtype}
            rival = {"family": "dit", "steps": DIT_STEPS, **case}
            run = measures.latest_run_with(rows, "speedup", {"name": preset, **case}, rival)
            ours = measures.latest(run, "speedup", name=preset, **case)
            dit = measures.latest(run, "speedup", family="dit", steps=DIT_STEPS, **case)
            key = f"{preset.removeprefix('titok-').removesuffix('-512').replace('-', '')}_{dtype}"
            found[f"speedup_table_{key}"] = tables.with_source(run, tables.transposed(*tables.speedup_table(run)))
            found[f"speedup_{key}"] = number(measures.rate(ours)[0] / measures.rate(dit)[0])
            found[f"speedup_fastest_{key}"] = number(measures.fastest(ours) / measures.fastest(dit))
    return found | _mm_range(rows)


def _machine(row: Row) -> str:
    about = row["environment"]
    return f"{about['cpu']}, {about['threads']} threads, {about['cpu_capability']}"


def _mm_range(rows: Sequence[Row]) -> Figures:
    """How far the fastest matrix product in bfloat16 differed between runs without a limit on the instruction set."""
    rates = [
        measures.own_ceiling(row, "mm") / 1e9
        for row in rows
        if row["bench"] in ("ceiling", "engine", "roofline")
        and row["case"]["dtype"] == "bf16"
        and row["environment"].get("onednn_max_cpu_isa") is None
    ]
    return {"mm_lowest": number(min(rates)), "mm_highest": number(max(rates))}


def published(rows: Sequence[Row]) -> Figures:
    """The comparisons with TiTok as published."""
    found: Figures = {}
    for dtype in ("bf16", "fp32"):
        for batch in (1, 4, 16) if dtype == "bf16" else (1, 4):
            row = measures.latest(rows, "engine", preset="titok-l-32", dtype=dtype, batch=batch)
            found[f"published_table_{dtype}_{batch}"] = tables.with_source(
                [row], tables.engine_table(row), tables.describe(row)
            )
    row = measures.latest(rows, "engine", preset="titok-l-32", dtype="bf16", batch=1)
    native, ours = (quantiles(row["samples_s"][name])[0] for name in ("native", "titok"))
    ratio = measures.engine_ratio(row, "native")
    mm = measures.own_ceiling(row, "mm")
    if ratio is None:
        raise LookupError("the engine's row of titok-l-32 in bf16 at batch 1 has no samples of titok")
    return found | {
        "largest_batch": str(max(row["case"]["batch"] for row in measures.select(rows, "engine"))),
        "published_ratio": f"{ratio[0]:.2f}",
        "published_of_mm": percent(row["work"]["native"] / native / mm),
        "titok_of_mm": percent(row["work"]["titok"] / ours / mm),
        "half_of_published_s": number(native / 2),
        "half_of_published_of_mm": percent(row["work"]["titok"] / (native / 2) / mm),
    }


def ladder(rows: Sequence[Row]) -> Figures:
    found: Figures = {}
    for dtype in ("fp32", "bf16"):
        run = measures.latest_run(measures.of_dtype(rows, dtype), "ladder", family="titok-l-32")
        found[f"ladder_table_{dtype}"] = tables.with_source(run, tables.ladder_table(run))
    return found


def memory(rows: Sequence[Row]) -> Figures:
    """Memory of whole processes."""
    found: Figures = {}
    for dtype in ("fp32", "bf16"):
        blocks = []
        for preset in ("titok-l-32", "titok-l-64-512"):
            row = measures.latest(rows, "memory", preset=preset, dtype=dtype, batch=1)
            weights = f"weights {row['weight_bytes'] / 1e6:,.0f} MB"
            blocks.append(
                tables.with_source([row], tables.memory_table(row), f"{tables.describe(row)}; {weights}")
            )
        found[f"memory_tables_{dtype}"] = "\n\n".join(blocks)
    return found


def training(rows: Sequence[Row]) -> Figures:
    """Training steps beside those of plain PyTorch, and of 32 tokens beside 256."""
    if not measures.select(rows, "training"):
        return {"training_tables": "No table of its results is here yet."}
    run = measures.latest_run(rows, "training")
    blocks = [tables.with_source(some, tables.training_table(some)) for some in tables.by_sides(run)]
    return {"training_tables": "\n\n".join(blocks)}


def waiting(rows: Sequence[Row]) -> Figures:
    """What each way of waiting costs, alone and beside busy processes."""
    found: Figures = {}
    for dtype in ("fp32", "bf16"):
        # Other processes are part of this measurement and no disturbance.
        run = [{**row, "conditions": None} for row in measures.latest_run(rows, "waiting", dtype=dtype)]
        found[f"waiting_table_{dtype}"] = tables.with_source(run, tables.waiting_table(run))
    return found


def int8(rows: Sequence[Row]) -> Figures:
    """What 8-bit layers gain and cost."""
    found: Figures = {}
    for batch in (1, 4):
        row = measures.latest(rows, "engine", preset="titok-l-32", dtype="bf16", batch=batch)
        median, low, high = measures.ratio(row, "native", measures.INT8)
        found |= {f"int8_ratio_{batch}": f"{median:.2f}", f"int8_range_{batch}": f"{low:.2f}-{high:.2f}"}
    parts = [
        measures.latest(rows, "precision", part=part)
        for part in ("generator", "tokenizer", "golden", "quickstart")
    ]
    blocks = [tables.with_source([row], tables.precision_table(row), row["case"]["part"]) for row in parts]
    return found | {"precision_tables": "\n\n".join(blocks)}


def roofline(rows: Sequence[Row]) -> Figures:
    found: Figures = {}
    presets = (("titok-l-64-512", "l64"), ("titok-l-32", "l32"))
    for (preset, name), dtype in itertools.product(presets, ("fp32", "bf16")):
        key = f"{name}_{dtype}"
        row = measures.latest(rows, "roofline", preset=preset, dtype=dtype)
        found[f"stage_table_{key}"] = tables.with_source([row], tables.stage_table(row), tables.describe(row))
        parts = measures.stages(row)[:-1]  # the last one is all of them together
        most = max(parts, key=lambda stage: stage["s"] - stage["floor_s"])
        found[f"stage_most_{key}"] = most["stage"]
        found[f"stage_most_ms_{key}"] = number(1e3 * (most["s"] - most["floor_s"]))
    return found


def ops(rows: Sequence[Row]) -> Figures:
    """How many times as fast as a peer each op is, over all of its measured cases."""
    lines, missing = [], []
    for title, bench, case, peer in OP_LINES:
        by_dtype = {
            dtype: [row for row in _latest_cases(rows, bench, dtype=dtype, **case) if _peer_times(row, peer)]
            for dtype in ("float32", "bfloat16")
        }
        if not any(by_dtype.values()):
            missing.append(f"{title} against {PEERS[peer]}")
        elif not by_dtype["bfloat16"] and len(by_dtype["float32"]) <= FEW_CASES:
            lines += [_op_line(title, peer, {"float32": [row], "bfloat16": []}) for row in by_dtype["float32"]]
        else:
            lines.append(_op_line(title, peer, by_dtype))
    header = ["op", "sizes", "compared with", "float32", "bfloat16", "commit, instruction set"]
    return {
        "op_table": tables.markdown(header, lines),
        "ops_not_measured": ", ".join(missing) or "none",
        "op_commands": _commands(rows, {bench for _, bench, *_ in OP_LINES}),
    }


def _op_line(title: str, peer: str, by_dtype: dict[str, list[Row]]) -> list[str]:
    """A line of the table of ops: one number for each dtype, or a range over several cases."""
    measured = [row for cases in by_dtype.values() for row in cases]
    runs = (row["environment"] for row in measured)
    commits = dict.fromkeys(f"{tables.commit(about)}, {about['cpu_capability']}" for about in runs)
    ratios = [_ratios(cases, peer) for cases in by_dtype.values()]
    return [title, _sizes(measured), PEERS[peer], *ratios, "; ".join(commits)]


def _latest_cases(rows: Sequence[Row], bench: str, **case: Any) -> list[Row]:
    """The rows of the newest run that has any with these values; empty if there is none."""
    if not measures.select(rows, bench, **case):
        return []
    return measures.select(measures.latest_run(rows, bench, **case), bench, **case)


def _peer_times(row: Row, peer: str) -> list[list[float]]:
    """The samples of a peer; of "best SDPA" those of every back end, if each that runs here was measured."""
    samples = row["samples_s"]
    if peer != "best SDPA":
        return [samples[peer]] if peer in samples else []
    return [samples[name] for name in SDPA_PEERS if name in samples] if "math" in samples else []


def _ratios(rows: Sequence[Row], peer: str) -> str:
    """The peer's median time over titok's: one number, or the smallest and the largest of several cases."""
    ratios = [
        min(map(statistics.median, _peer_times(r, peer))) / statistics.median(r["samples_s"]["titok"])
        for r in rows
    ]
    if not ratios:
        return "not measured"
    ends = dict.fromkeys(number(ratio) for ratio in (min(ratios), max(ratios)))
    return " to ".join(ends)


def _sizes(rows: Sequence[Row]) -> str:
    """The sizes of some cases, such as "B 1, 2, 8; N 33 to 385"."""
    parts = []
    for key in rows[0]["case"]:
        values = sorted({row["case"][key] for row in rows if not isinstance(row["case"][key], str)})
        if not values:
            continue
        if len(values) <= 3:
            parts.append(f"{key} {', '.join(f'{value:,}' for value in values)}")
        else:
            parts.append(f"{key} {values[0]:,} to {values[-1]:,}")
    return "; ".join(parts)


def _commands(rows: Sequence[Row], benches: Iterable[str]) -> str:
    """The commands that measured these benchmarks, without their results files, as a list."""
    found: dict[str, None] = {}
    for bench in sorted(benches):
        for row in measures.select(rows, bench):
            found[tables.command(row["environment"])] = None
    return "\n".join(f"- `{command}`" for command in found)


def masked_decode(rows: Sequence[Row]) -> Figures:
    """How many times as fast as the steps of diffusers' schedulers `masked_decode_step` is, and its own time."""
    run = measures.latest_run(rows, "masked_decode_step")
    names = {(row["case"]["scheduler"], row["case"]["decided"]): None for row in run}
    titles = [f"{name}; {decided} tokens decided" if decided else name for name, decided in names]
    sizes = dict.fromkeys((row["case"]["codes"], row["case"]["batch"]) for row in run)
    lines = []
    for codes, batch in sizes:
        cells = []
        for name, decided in names:
            case = {"codes": codes, "batch": batch, "scheduler": name, "decided": decided}
            row = measures.latest(run, "masked_decode_step", **case)
            median = row["median_s"]
            ratio, ms = number(median["diffusers"] / median["titok"]), number(1e3 * median["titok"])
            cells.append(f"{ratio} ({ms} ms){tables.mark(row)}")
        lines.append([f"{codes:,}", str(batch), *cells])
    return {"masked_decode_table": tables.with_source(run, (["codes", "batch", *titles], lines))}


def dispatcher(rows: Sequence[Row]) -> Figures:
    """What a call of each op costs around PyTorch's dispatcher and through it."""
    run = _latest_cases(rows, "dispatch")
    if not run:
        raise LookupError("no result of 'dispatch'")
    lines, differences = [], {}
    for row in run:
        direct, dispatched = (
            1e6 * statistics.median(row["samples_s"][name]) / row["case"]["calls"]
            for name in ("eager", "dispatched")
        )
        op = row["case"]["op"]
        differences[op] = dispatched - direct
        lines.append([f"`{op}`", *(f"{value:.1f}" for value in (direct, dispatched, dispatched - direct))])
    header = ["op", "around the dispatcher, us", "through it, us", "difference, us"]
    calls = calls_per_image(TokenizerConfig.preset("titok-l-32"), GeneratorConfig.preset("titok-l-32"))
    saved = sum(differences[op] * count for op, count in calls.items()) / 1e6
    image = measures.latest(rows, "engine", preset="titok-l-32", dtype="fp32", batch=1)["median_s"]["titok"]
    return {
        "dispatch_table": tables.with_source(run, (header, lines)),
        "dispatch_calls": number(sum(calls.values())),
        "dispatch_saved_ms": number(1e3 * saved),
        "dispatch_saved_share": f"{saved / image:.1%}",
        "image_ms": number(1e3 * image),
    }


def calls_per_image(tokenizer: TokenizerConfig, generator: GeneratorConfig) -> dict[str, int]:
    """How often generating one image calls each op, for a ViT generator and a tokenizer with a proxy.

    No step may be left out, as happens when there are more steps than tokens.

    Raises:
        ValueError: the models are of another kind.
    """
    if generator.architecture != "vit" or tokenizer.proxy is None:
        raise ValueError("calls_per_image: expected a ViT generator and a tokenizer with a proxy")
    steps, proxy = generator.sampling.steps, tokenizer.proxy
    layers = steps * generator.layers + tokenizer.decoder.layers
    residual_blocks = 2 + len(proxy.channel_multipliers) * proxy.blocks_per_level
    return {
        "masked_attention": layers,
        "add_layer_norm": 2 * layers,
        "maskgit_decode_step": steps,
        "code_mixture": 1,
        "group_norm_silu": 2 * residual_blocks + 1,
    }
