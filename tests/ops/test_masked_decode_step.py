"""`masked_decode_step`: bits of all back ends, the law of the draws, policies, windows, wrong arguments."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from decode_cases import POLICIES, random_call
from maskgit_cases import random_case
from titok.ops import masked_decode_step as decode
from titok.ops import maskgit_decode_step
from titok.ops.core.available import why_no_cpp

TESTS = Path(__file__).parents[1]
NEEDS_CPP = pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
BACKENDS = ["plain", pytest.param("cpp", marks=NEEDS_CPP)]


def digest(backend: str, cases: int = 200) -> str:
    """Of all results, bit by bit, over the random calls."""
    state = hashlib.sha256()
    for number in range(cases):
        tensors, arguments = random_call(number)
        for result in decode(*tensors, **arguments, backend=backend):
            state.update(b"none" if result is None else result.numpy().tobytes())
    return state.hexdigest()


@NEEDS_CPP
def test_cpp_gives_the_bits_of_plain() -> None:
    for number in range(200):
        tensors, arguments = random_call(number)
        plain = decode(*tensors, **arguments, backend="plain")
        cpp = decode(*tensors, **arguments, backend="cpp")
        for name, want, got in zip(plain._fields, plain, cpp, strict=True):
            assert (want is None) == (got is None), (number, name)
            assert want is None or torch.equal(want, got), (number, name, want, got)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_many_sizes_give_the_bits_of_plain(dtype: torch.dtype) -> None:
    """Runs of 512 codes whose weights are 0, small or large beside the top, and logits that are not finite."""
    g = torch.Generator().manual_seed(5)
    levels = torch.tensor([0.0, -3.5, -4.5, -12.0, -20.9, -22.5, -60.0, -30000.0])
    logits = (levels.repeat_interleave(512) + torch.rand(12, 4096, generator=g))[:, :4090].to(dtype)
    logits[1:4] *= -1
    chosen = torch.rand(12, 4090, generator=g)
    logits[2:8][chosen[2:8] < 0.01] = -math.inf
    logits[4:8][chosen[4:8] > 0.99] = math.nan
    logits[6, 7], logits[7, 4000], logits[9, 600] = math.inf, math.inf, torch.finfo(dtype).max
    logits[8], logits[10], logits[11] = -math.inf, math.nan, torch.finfo(dtype).min
    tokens = torch.full((1, 12), 4090)
    for temperature, softmax_temperature in (
        (0.0, 1.0),
        (1.0, 1.0),
        (0.5, 1.0),
        (1e-38, 1.0),
        (1e38, 1.0),
        (1.0, 0.7),
    ):
        for top_p in (1.0, 0.8):
            numbers = {"temperature": temperature, "softmax_temperature": softmax_temperature, "top_p": top_p}
            for confidence in ("log_probability", "negative_entropy"):
                plain, cpp = (
                    decode(tokens, logits[None], mask_token=4090, confidence=confidence, **numbers, backend=backend,
                           policy="top_k", count=12, return_log_probabilities=True)
                    for backend in ("plain", "cpp")
                )  # fmt: skip
                for want, got in zip(plain[:3], cpp[:3], strict=True):
                    assert torch.equal(want, got), (numbers, confidence, want, got)


@NEEDS_CPP
@pytest.mark.parametrize("first", [0.0, 1.0, 20.0, -7.0])
def test_truncation_among_logits_that_differ_in_their_last_bits_gives_the_bits_of_plain(first: float) -> None:
    """Logits whose patterns of bits lie up to 0, 1, 600, 5,000 and 3 million above that of `first`."""
    g = torch.Generator().manual_seed(3)
    start = torch.tensor(first).view(torch.int32)
    above = [torch.randint(0, most + 1, (3, 1031), generator=g) for most in (0, 1, 600, 5000, 3_000_000)]
    logits = (start + torch.cat(above).to(torch.int32)).view(torch.float32)
    logits[1::3, ::2] *= -1
    tokens = torch.full((1, 15), 1031)
    for top_k, top_p in ((0, 0.5), (0, 1e-9), (1, 1.0), (500, 1.0), (1030, 0.9)):
        plain, cpp = (
            decode(tokens, logits[None], mask_token=1031, policy="top_k", count=15, temperature=1.0, top_k=top_k,
                   top_p=top_p, seed=top_k, return_log_probabilities=True, backend=backend)
            for backend in ("plain", "cpp")
        )  # fmt: skip
        for want, got in zip(plain[:3], cpp[:3], strict=True):
            assert torch.equal(want, got), (top_k, top_p, want, got)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@NEEDS_CPP
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = "import test_masked_decode_step as t, titok._C as c; print(c.cpu_isa(), t.digest('cpp'))"
    paths = os.pathsep.join(map(str, (TESTS / "ops", TESTS, TESTS.parent)))
    env = {**os.environ, "TITOK_CPU_ISA": isa, "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    ran_on, got = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    if ran_on != isa:
        pytest.skip(f"this machine has no {isa}")
    assert got == digest("cpp")


@NEEDS_CPP
def test_thread_count_changes_nothing() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(digest("cpp", 60))
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_count_has_the_bits_of_maskgit_decode_step(backend: str) -> None:
    for number in range(120):
        (tokens, cond, uncond), given = random_case(number)
        want = maskgit_decode_step(tokens, cond, uncond, **given, return_confidence=True, backend=backend)
        rule = given["confidence"]
        got = decode(
            *(tokens, cond, uncond),
            policy="count",
            count=given["num_masked"],
            mask_token=given["mask_token"],
            step=given["step"],
            seed=given["seed"],
            sample=given["first_sample"],
            guidance=given["guidance"],
            softmax_temperature=given["softmax_temperature"],
            noise_temperature=given["noise_temperature"],
            temperature=given["noise_temperature"] if rule == "titok" else 1.0,
            confidence="logit" if rule == "titok" else "log_probability",
            backend=backend,
        )
        assert torch.equal(got.tokens, want[0]), number
        assert torch.equal(got.confidences, want[1]), number


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    compared = 0
    for number in range(60):
        tensors, given = random_call(number)
        batch = len(tensors[0])
        if not isinstance(given["sample"], Tensor):
            given["sample"] = torch.arange(batch) + given["sample"]
        whole = decode(*tensors, **given, backend=backend)
        for b in range(batch):
            one = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in given.items()}
            alone = decode(*(t if t is None else t[b : b + 1] for t in tensors), **one, backend=backend)
            for want, got in zip(whole, alone, strict=True):
                assert want is None or torch.equal(want[b : b + 1], got)
            compared += 1
    assert compared > 60


def expected_acceptance(
    given: dict[str, Any], confidence: list[float], logp: list[float], ent: list[float]
) -> set:
    """The positions that a policy accepts, of candidates 0 ... n - 1, by sorting in Python."""
    n, count = len(confidence), given["count"]
    surest = sorted(range(n), key=lambda i: (-confidence[i], i))
    match given["policy"]:
        case "count":
            return set(sorted(range(n), key=lambda i: (confidence[i], i))[count:])
        case "top_k":
            return set(surest[:count])
        case "threshold":
            return {i for i in range(n) if logp[i] > math.log(given["threshold"])} | set(surest[:count])
        case "leftmost":
            return set(range(min(n, count)))
        case "factor":
            likeliest = sorted(range(n), key=lambda i: (-logp[i], i))
            passed = [(k + 2) * (1 - math.exp(logp[i])) < given["factor"] for k, i in enumerate(likeliest)]
            return {i for k, i in enumerate(likeliest) if k < count or passed[k]}
    accepted, total = set(), 0.0
    for place, i in enumerate(sorted(range(n), key=lambda i: (ent[i], i))):
        if place < count or total <= given["entropy_bound"]:
            accepted.add(i)
        total += ent[i]
    return accepted


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_policies_against_sorting_in_python(backend: str, policy: str) -> None:
    for number in range(40):
        g = torch.Generator().manual_seed(number)
        logits = 3 * torch.randn(2, 9, 17, generator=g)
        given = {"policy": policy, "count": number % 4, "threshold": 0.55, "entropy_bound": 0.25 * (number % 7)}
        given["factor"] = 0.3 * (number % 9)
        tokens = torch.where(torch.rand(2, 9, generator=g) < 0.7, 17, 3)
        result = decode(tokens, logits, mask_token=17, **given, backend=backend)
        law = logits.double().log_softmax(-1)
        for b in range(2):
            places = (tokens[b] == 17).nonzero()[:, 0]
            mine = law[b, places]
            best, entropies = mine.amax(-1), -(mine.exp() * mine).sum(-1)
            accepted = expected_acceptance(given, best.tolist(), best.tolist(), entropies.tolist())
            want = tokens[b].clone()
            for i in accepted:
                want[places[i]] = mine[i].argmax()
            assert torch.equal(result.tokens[b], want), number
            assert torch.allclose(result.confidences[b, places].double(), best, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_and_entropies_of_both_laws(backend: str) -> None:
    logits = 2 * torch.randn(3, 5, 300)
    tokens = torch.full((3, 5), -1)
    for law in ("drawn", "model"):
        given = {"policy": "count", "count": 0, "mask_token": -1, "temperature": 0.6, "top_k": 40, "top_p": 0.8}
        given |= {"probabilities": law, "confidence": "negative_entropy", "return_log_probabilities": True}
        result = decode(tokens, logits, **given, seed=4, backend=backend)
        for b in range(3):
            for n in range(5):
                p = nucleus(logits[b, n].double().numpy() / 0.6, 40, 0.8)
                assert p[int(result.tokens[b, n])] > 0
                if law == "model":
                    p = logits[b, n].double().softmax(-1).numpy()
                entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
                assert float(result.confidences[b, n]) == pytest.approx(-entropy, abs=1e-5)
                want = math.log(p[int(result.tokens[b, n])])
                assert float(result.log_probabilities[b, n]) == pytest.approx(want, abs=1e-5)


def nucleus(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The truncated softmax in float64, code by code from the likeliest."""
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    weights = np.exp(logits[order] - logits.max())
    before = np.cumsum(weights) - weights
    weights[before > top_p * weights.sum()] = 0.0
    law = np.zeros(len(logits))
    law[order] = weights / weights.sum()
    return law


@pytest.mark.slow
@NEEDS_CPP
@pytest.mark.parametrize(
    ("temperature", "softmax", "top_k", "top_p", "guidance"),
    [
        (1.0, 1.0, 0, 1.0, 1.0),
        (0.6, 1.3, 0, 1.0, 2.0),
        (1.2, 1.0, 9, 1.0, 1.0),
        (1.0, 1.0, 0, 0.8, 1.5),
        (1.5, 0.9, 20, 0.7, 1.0),
    ],
)
def test_millions_of_draws_follow_the_law(
    temperature: float, softmax: float, top_k: int, top_p: float, guidance: float
) -> None:
    batch, length, codes = 1221, 4096, 53
    if top_k or top_p < 1:
        batch = 488  # 2 million draws, because truncation costs more passes
    cond, uncond = 1.5 * torch.randn(2, 1, codes)
    new = decode(
        torch.full((batch, length), codes), cond, uncond, policy="count", count=0, mask_token=codes,
        rows=torch.zeros(batch, length, dtype=torch.int64), temperature=temperature, softmax_temperature=softmax,
        top_k=top_k, top_p=top_p, guidance=guidance, seed=11, confidence="random", backend="cpp",
    ).tokens  # fmt: skip
    guided = guidance * cond[0].double() + (1 - guidance) * uncond[0].double()
    law = nucleus(guided.numpy() / softmax / temperature, top_k, top_p)
    counts = new.flatten().bincount(minlength=codes).numpy()
    assert (counts[law == 0] == 0).all()
    assert tail(*oracles.chi_square(counts[law > 0], law[law > 0])) > 1e-3


@pytest.mark.slow
@NEEDS_CPP
def test_renoising_is_uniform_and_apart_from_the_draw() -> None:
    batch, length, codes = 1221, 4096, 7
    given = {"policy": "top_k", "mask_token": codes, "temperature": 1.0, "confidence": "random", "backend": "cpp"}
    tokens, rows = torch.full((batch, length), codes), torch.zeros(batch, length, dtype=torch.int64)
    logits = torch.randn(1, codes)
    noise = decode(tokens, logits, rows=rows, count=0, renoise=True, **given).tokens
    drawn = decode(tokens, logits, rows=rows, count=length, **given).tokens
    law = np.outer(logits[0].double().softmax(-1).numpy(), np.full(codes, 1 / codes)).flatten()
    counts = (drawn * codes + noise).flatten().bincount(minlength=codes**2).numpy()
    assert tail(*oracles.chi_square(counts, law)) > 1e-3


def tail(statistic: float, freedom: int) -> float:
    half = torch.tensor([freedom / 2.0, statistic / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_blocks_step_map_and_in_place(backend: str) -> None:
    logits = torch.randn(3, 8, 5)
    tokens = torch.tensor([[5, 5, 1, 1, 5, 5, 5, 5], [1, 1, 1, 1, 5, 1, 5, 5], [5] * 8])
    best = logits.argmax(-1)
    given = {
        "policy": "leftmost",
        "mask_token": 5,
        "backend": backend,
        "count": 8,
        "step": torch.tensor([3, 4, 5]),
    }
    result = decode(tokens, logits, block_length=4, **given)
    places = torch.zeros(3, 8, dtype=torch.bool)
    places[0, :2] = places[1, 4] = places[1, 6:] = places[2, :4] = True
    assert torch.equal(result.tokens, torch.where(places, best, tokens))
    assert torch.equal(result.confidences.isfinite(), places)
    # Blocks are counted from the start of the window: the first row's are [3, 6) and [6, 8).
    window = torch.tensor([[3, 8], [0, 5], [8, 2]])
    step_map = torch.full((3, 8), -1, dtype=torch.int32)
    result = decode(tokens, logits, window=window, block_length=3, step_map=step_map, in_place=True, **given)
    places = torch.zeros(3, 8, dtype=torch.bool)
    places[0, 4:6] = places[1, 4] = True
    assert result.tokens is tokens
    assert result.step_map is step_map
    assert step_map.tolist() == [[-1, -1, -1, -1, 3, 3, -1, -1], [-1, -1, -1, -1, 4, -1, -1, -1], [-1] * 8]
    assert torch.equal(tokens[places], best[places])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_an_undecided_position_have_no_block_to_edit(backend: str) -> None:
    given = {"policy": "top_k", "mask_token": 9, "edit_threshold": 0.0, "block_length": 3, "backend": backend}
    for window in (None, (0, 2), (1, 7)):
        step = decode(torch.zeros(1, 8, dtype=torch.int64), 5 * torch.randn(1, 8, 4), window=window, **given)
        assert not step.tokens.any()
        assert step.confidences.isinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_draw_the_lowest_code_and_the_first_positions(backend: str) -> None:
    logits = torch.zeros(1, 4, 1100)
    logits[0, 1, 700:] = 1.0
    tokens = torch.full((1, 4), -1)
    given = {"mask_token": -1, "backend": backend, "confidence": "random", "count": 2}
    assert decode(tokens, logits, policy="top_k", **given).tokens.tolist() == [[0, 700, -1, -1]]
    assert decode(tokens, logits, policy="count", **given).tokens.tolist() == [[-1, -1, 0, 0]]


def good() -> dict[str, Any]:
    return {
        "tokens": torch.full((2, 3), 5),
        "cond_logits": torch.zeros(2, 3, 5),
        "policy": "top_k",
        "mask_token": 5,
    }


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"policy": "best"}, ValueError, "policy"),
        ({"policy": "threshold"}, ValueError, "threshold"),
        ({"policy": "entropy"}, ValueError, "entropy_bound"),
        ({"mask_token": None}, ValueError, "mask_token"),
        ({"undecided": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, "mask_token"),
        ({"count": -1}, ValueError, "count"),
        ({"count": torch.tensor([1, -1])}, ValueError, "count"),
        ({"count": torch.tensor([1])}, ValueError, "count"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": torch.tensor([1.0, math.nan])}, ValueError, "temperature"),
        ({"softmax_temperature": 0.0}, ValueError, "softmax_temperature"),
        ({"threshold": 1.5}, ValueError, "threshold"),
        ({"edit_threshold": -0.5}, ValueError, "edit_threshold"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"seed": -1}, ValueError, "seed"),
        ({"step": 1 << 31}, ValueError, "step"),
        ({"window": (2, 1)}, ValueError, "window"),
        ({"window": [0, 1]}, TypeError, "window"),
        ({"block_length": 0}, ValueError, "block_length"),
        ({"confidence": "surest"}, ValueError, "confidence"),
        ({"probabilities": "raw"}, ValueError, "probabilities"),
        ({"cond_logits": torch.zeros(2, 3, 5, dtype=torch.float64)}, TypeError, "cond_logits"),
        ({"cond_logits": torch.zeros(6, 5), "rows": torch.full((2, 3), 6)}, ValueError, "rows"),
        ({"step_map": torch.zeros(2, 3)}, TypeError, "step_map"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens"),
    ],
)
@pytest.mark.parametrize("backend", [None, "plain"])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], name: str, backend: str | None) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        decode(**{**good(), **change}, backend=backend)


def test_opcheck() -> None:
    tokens, logits = torch.full((2, 3), 5), torch.randn(2, 3, 5)
    integers = torch.tensor([[1, 0, 0, 1, 0, 1 << 32, 0, 3]] * 2)
    floats = torch.tensor([[1.0, 1.0, 1.0, 0.5, 0.0, 0.0]] * 2)
    choices = ("top_k", "logit", "drawn", False, False, 0, True, False)
    step_map = torch.zeros(2, 3, dtype=torch.int32)
    arguments = (tokens, logits, None, None, None, None, None, step_map, integers, floats, 5, *choices)
    torch.library.opcheck(torch.ops.titok.masked_decode_step.default, arguments)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("policy", ["threshold", "entropy"])
@NEEDS_CPP
def test_peak_memory_is_no_multiple_of_the_codes(policy: str) -> None:
    """With every result asked for, C++ takes far less than one float32 copy of the logits, which is 16 MiB."""
    codes = 65_536
    logits = torch.randn(4, 16, codes, generator=torch.Generator().manual_seed(0))
    tokens = torch.full((4, 16), codes)
    arguments = {"policy": policy, "threshold": 0.9, "entropy_bound": 1.0, "mask_token": codes, "temperature": 1.0}
    arguments |= {"top_p": 0.9, "top_k": 50, "renoise": True, "confidence": "margin", "edit_threshold": 0.5}
    step_map = torch.zeros(4, 16, dtype=torch.int32)

    def peak() -> int:
        """KiB, since the last reset."""
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])

    def step() -> None:
        decode(
            tokens, logits, **arguments, step_map=step_map, return_log_probabilities=True, backend="cpp"
        )  # results are freed

    step()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    step()
    assert peak() - before < 1024
