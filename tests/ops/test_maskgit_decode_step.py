"""`maskgit_decode_step`: law, exactness across back ends, selection, invariances, bad input.

This file is longer than 400 lines because all tests of one op share its inputs and tolerances.
"""

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
from maskgit_cases import DTYPES, order_of, random_case
from titok.ops import maskgit_decode_step, maskgit_decode_step_packed, pack_step_params
from titok.ops.core.available import why_no_cpp

TESTS = Path(__file__).parents[1]
BACKENDS = ["plain", pytest.param("cpp", marks=pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp())))]
CASES = range(200)


def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    result = maskgit_decode_step(*args, **kwargs, return_confidence=True)
    assert isinstance(result, tuple)
    return result


def digest(backend: str) -> str:
    """Of tokens and confidences, bit by bit, over all the random cases."""
    state = hashlib.sha256()
    for number in CASES:
        case = random_case(number)
        for result in run(*case.tensors, **case.arguments, backend=backend):
            state.update(result.numpy().tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def plain_digest() -> str:
    return digest("plain")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
def test_every_instruction_set_gives_the_plain_paths_bits(isa: str, plain_digest: str) -> None:
    code = "import test_maskgit_decode_step as t, titok._C as c; print(c.cpu_isa(), t.digest('cpp'))"
    env = {
        **os.environ,
        "TITOK_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS / "ops", TESTS, TESTS.parent))),
    }
    output = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    ran_on, got = output.split()
    if ran_on != isa:
        pytest.skip(f"this machine has no {isa}")
    assert got == plain_digest


@pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_codebook(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 262_144).to(dtype)
    tokens = torch.full((1, 2), -1)
    for logits_of_case in (logits, torch.zeros_like(logits)):  # equal weights: the sum is 2^48 itself
        arguments = {"step": 0, "steps": 2, "num_masked": 0, "mask_token": -1, "noise_temperature": 1.0, "seed": 3}
        plain = run(tokens, logits_of_case, **arguments, backend="plain")
        cpp = run(tokens, logits_of_case, **arguments, backend="cpp")
        assert torch.equal(plain[0], cpp[0])
        assert torch.equal(plain[1], cpp[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("confidence", ["titok", "maskgit"])
@pytest.mark.parametrize("guided", [False, True])
def test_against_float64(backend: str, confidence: str, guided: bool) -> None:
    """Code by the inverse CDF of the oracle's own uniform, confidence with the oracle's own noise."""
    batch, length, codes, step, seed, first = 3, 7, 301, 2, (5 << 40) + 3, (1 << 33) + 1
    tokens = torch.full((batch, length), codes)
    cond, uncond = 2 * torch.randn(2, batch, length, codes)
    arguments = {"guidance": 2.5, "softmax_temperature": 0.8}
    t = 1.7
    new, scores = run(
        tokens,
        cond,
        uncond if guided else None,
        **arguments,
        step=step,
        steps=9,
        num_masked=0,
        mask_token=codes,
        noise_temperature=t,
        confidence=confidence,
        seed=seed,
        first_sample=first,
        backend=backend,
    )
    for b in range(batch):
        for n in range(length):
            sample = first + b
            words = oracles.philox4x32((n, step, sample % 2**32, sample >> 32), (seed % 2**32, seed >> 32))
            logits, probability = oracles.decode_distribution(
                cond[b, n].numpy(),
                uncond[b, n].numpy() if guided else None,
                2.5,
                0.8,
                t if confidence == "titok" else 1.0,
            )
            uniform = (words[0] * 2**32 + words[1]) / 2**64
            until = np.cumsum(probability)
            code = int(new[b, n])
            assert until[code] - probability[code] - 1e-6 <= uniform <= until[code] + 1e-6
            score = logits[code] if confidence == "titok" else math.log(probability[code])
            noise = -math.log(-math.log((words[2] // 2**9 + 0.5) / 2**23))
            assert float(scores[b, n]) == pytest.approx(score + t * noise, rel=2e-6, abs=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_noise_it_is_the_first_largest_logit(backend: str) -> None:
    codes = 1100
    logits = torch.randn(2, 5, codes)
    logits[0, 0] = 0.0
    logits[0, 1, 700:] = 9.0
    logits[1, 2] = math.nan
    new, scores = run(
        torch.full((2, 5), codes), logits, step=0, steps=1, num_masked=3, mask_token=codes, backend=backend
    )
    finite = logits.nan_to_num(nan=-3e38)
    assert torch.equal(new, torch.from_numpy(finite.numpy().argmax(-1)))  # numpy promises the first
    mask = torch.tensor([[True] * 5, [True, True, False, True, True]])
    assert torch.equal(scores[mask], finite.amax(-1)[mask])


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
@pytest.mark.parametrize(
    ("confidence", "noise", "softmax"),
    [("titok", 0.3, 1.0), ("titok", 1.0, 1.2), ("titok", 9.5, 1.0), ("maskgit", 4.5, 0.5), ("maskgit", 0.0, 1.0)],
)
def test_five_million_draws_follow_the_softmax(confidence: str, noise: float, softmax: float) -> None:
    batch, length, codes = 1221, 4096, 203
    cond, uncond = 1.5 * torch.randn(2, codes)
    new = maskgit_decode_step(
        torch.full((batch, length), codes),
        cond.expand(batch, length, codes),
        uncond.expand(batch, length, codes),
        step=1,
        steps=3,
        num_masked=0,
        mask_token=codes,
        guidance=1.8,
        softmax_temperature=softmax,
        noise_temperature=noise,
        confidence=confidence,
        seed=11,
        backend="cpp",
    )
    assert isinstance(new, Tensor)
    temperature = noise if confidence == "titok" else 1.0
    _, probability = oracles.decode_distribution(cond.numpy(), uncond.numpy(), 1.8, softmax, temperature)
    counts = new.flatten().bincount(minlength=codes).numpy()
    assert tail(*oracles.chi_square(counts, probability)) > 1e-3


@pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
def test_draws_are_independent() -> None:
    """Neighbouring positions, samples, steps and seeds: pairs that share no draw, against the product law."""
    batch, length, codes = 100, 1024, 7
    logits = torch.randn(codes)
    arguments = {"steps": 9, "num_masked": 0, "mask_token": codes, "noise_temperature": 1.3, "final": True}
    tokens = torch.full((batch, length), codes)

    def draw(step: int, seed: int) -> Tensor:
        return run(tokens, logits.expand(batch, length, codes), **arguments, step=step, seed=seed, backend="cpp")[
            0
        ]

    _, p = oracles.decode_distribution(logits.numpy(), None, 1.0, 1.0, 1.3)
    new = draw(0, 0)
    pairs = ((new[:, ::2], new[:, 1::2]), (new[::2], new[1::2]), (new, draw(1, 0)), (new, draw(0, 1)))
    for left, right in (*pairs, (new, draw(0, 1 << 32))):
        counts = (left * codes + right).flatten().bincount(minlength=codes**2).numpy()
        assert tail(*oracles.chi_square(counts, np.outer(p, p).flatten())) > 1e-3


def tail(statistic: float, freedom: int) -> float:
    return float(
        torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_of_the_confidence_is_gumbel(backend: str) -> None:
    batch, length, t = 50, 4096, 2.0
    logits = torch.zeros(batch, length, 1)
    arguments = {"step": 4, "steps": 8, "num_masked": 0, "mask_token": 1, "noise_temperature": t, "seed": 5}
    _, scores = run(torch.ones(batch, length, dtype=torch.int64), logits, **arguments, backend=backend)
    sample = np.sort(scores.flatten().double().numpy() / t)
    cdf = np.exp(-np.exp(-sample))
    steps = np.arange(1, len(sample) + 1) / len(sample)
    distance = max(np.abs(steps - cdf).max(), np.abs(steps - 1 / len(sample) - cdf).max())
    assert distance < 1.95 / math.sqrt(len(sample))  # Kolmogorov-Smirnov at 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_counts_are_exact(backend: str) -> None:
    """Over whole decodes of N tokens, with ties in every other sample."""
    for length in range(1, 257) if backend == "cpp" else (1, 2, 31, 256):
        tokens = torch.full((2, length), 3)
        for step in range(8):
            left = math.floor(length * math.acos((step + 1) / 8) / (math.pi / 2))
            logits = torch.randn(2, length, 3)
            logits[0] = logits[0].round()
            before = tokens
            tokens, scores = run(
                tokens, logits, step=step, steps=8, num_masked=left, mask_token=3, backend=backend
            )
            was, now = before == 3, tokens == 3
            assert now.sum(1).tolist() == [min(left, n) for n in was.sum(1).tolist()]
            assert torch.equal(tokens[~was], before[~was])
            assert torch.isinf(scores[~was]).all()
            # Those masked again come first among the masked ones, by confidence, then position.
            place = np.lexsort((np.arange(length)[None].repeat(2, 0), scores.numpy()), axis=-1).argsort(-1)
            assert np.array_equal(place < left, now.numpy()) or left > was.sum(1).min()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    case = random_case(31, codes=(257,), most_tokens=9)
    tokens = torch.full((6, 9), 257)
    cond, uncond = torch.randn(2, 6, 9, 257)
    arguments = {**case.arguments, "num_masked": 4, "noise_temperature": 1.5, "guidance": 2.0, "first_sample": 40}
    new, scores = run(tokens, cond, uncond, **arguments, backend=backend)
    for start, end in ((0, 1), (1, 4), (4, 6)):
        part = run(
            tokens[start:end],
            cond[start:end],
            uncond[start:end],
            **{**arguments, "first_sample": 40 + start},
            backend=backend,
        )
        assert torch.equal(part[0], new[start:end])
        assert torch.equal(part[1], scores[start:end])
    other = run(tokens, cond, uncond, **{**arguments, "seed": arguments["seed"] ^ 1}, backend=backend)
    assert not torch.equal(other[1], scores)


@pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
def test_thread_count_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(digest("cpp"))
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_stand_for_logits_of_masked_positions(backend: str) -> None:
    batch, length, codes = 3, 6, 50
    tokens = torch.where(torch.rand(batch, length) < 0.5, codes, torch.randint(codes, (batch, length)))
    cond, uncond = torch.randn(2, batch, length, codes)
    arguments = {
        "step": 1,
        "steps": 4,
        "num_masked": 2,
        "mask_token": codes,
        "guidance": 3.0,
        "noise_temperature": 1.0,
    }
    want = run(tokens, cond, uncond, **arguments, backend=backend)
    masked = tokens == codes
    count = int(masked.sum())
    rows = torch.full((batch, length), -99)
    rows[masked] = torch.arange(count).flip(0)
    got = run(tokens, cond[masked].flip(0), uncond[masked].flip(0), **arguments, rows=rows, backend=backend)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])

    shared = uncond[:1].expand_as(uncond)  # one unconditional pass for all samples
    want = run(tokens, cond, shared, **arguments, backend=backend)
    flat = torch.arange(batch * length).view(batch, length)
    got = run(
        tokens,
        cond.flatten(0, 1),
        uncond[0],
        **arguments,
        rows=flat,
        uncond_rows=flat[:1].expand_as(flat),
        backend=backend,
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_out_and_counts_by_sample(backend: str) -> None:
    batch, length, codes = 4, 5, 33
    both = torch.randn(2 * batch, length + 1, codes)  # cond and uncond in one batch, a class token in front
    cond, uncond = both[:, 1:].chunk(2)
    tokens = torch.full((batch, length), codes)
    keep = torch.tensor([0, 1, 3, 9])
    arguments = {"step": 0, "steps": 4, "mask_token": codes, "guidance": 2.0, "noise_temperature": 1.0}
    want, _ = run(tokens, cond.contiguous(), uncond.contiguous(), **arguments, num_masked=keep, backend="plain")
    assert (want == codes).sum(1).tolist() == [0, 1, 3, 5]
    got = maskgit_decode_step(tokens, cond, uncond, **arguments, num_masked=keep, out=tokens, backend=backend)
    assert got is tokens
    assert torch.equal(tokens, want)
    strided = torch.zeros(batch, 2 * length, dtype=torch.int64)[:, ::2]
    masked = torch.full((batch, length), codes)
    maskgit_decode_step(masked, cond, uncond, **arguments, num_masked=keep, out=strided, backend=backend)
    assert torch.equal(strided, want)
    final, _ = run(masked, cond, uncond, **arguments, num_masked=keep, final=True, backend=backend)
    assert (final != codes).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_one_is_the_conditional_pass(backend: str) -> None:
    tokens, cond, bad = torch.full((1, 3), 8), torch.randn(1, 3, 8), torch.full((1, 3, 8), math.nan)
    arguments = {
        "step": 0,
        "steps": 2,
        "num_masked": 1,
        "mask_token": 8,
        "noise_temperature": 1.0,
        "backend": backend,
    }
    for got, want in zip(
        run(tokens, cond, bad, guidance=1.0, **arguments), run(tokens, cond, **arguments), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_parameters(backend: str) -> None:
    for number in range(0, 40, 3):
        tensors, arguments = random_case(number)
        want = run(*tensors, **arguments, backend=backend)
        numbers = dict(arguments)
        mask_token, confidence = numbers.pop("mask_token"), arguments["confidence"]
        got = maskgit_decode_step_packed(
            *tensors,
            params=pack_step_params(**numbers),
            mask_token=mask_token,
            confidence=confidence,
            return_confidence=True,
            return_order=True,
            backend=backend,
        )
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[2], order_of(got[0] == mask_token))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    arguments = {"step": 0, "steps": 2, "num_masked": 1, "mask_token": 4, "backend": backend}
    for batch, length in ((0, 3), (3, 0)):
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        assert run(tokens, torch.zeros(batch, length, 4), **arguments)[0].shape == (batch, length)
    known = torch.tensor([[1, 2]])
    rows = torch.zeros(1, 2, dtype=torch.int64)
    assert torch.equal(run(known, torch.zeros(0, 4), rows=rows, **arguments)[0], known)  # no logits at all


@pytest.mark.slow
def test_opcheck_and_compile() -> None:
    tokens, cond, uncond = torch.tensor([[7, 2, 7]]), torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    numbers = (-5, 3, 1, 1, 2.0, 1.0, 1.0, 1.0, 7, "titok", True, "auto")
    torch.library.opcheck(
        torch.ops.titok.maskgit_decode_step.default, (tokens, cond, uncond, None, None, None, None, None, *numbers)
    )

    def step(tokens: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        return run(
            tokens,
            cond * 2,
            uncond,
            step=1,
            steps=3,
            num_masked=1,
            mask_token=7,
            guidance=2.0,
            noise_temperature=1.0,
            seed=(1 << 64) - 5,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(tokens, cond, uncond), step(tokens, cond, uncond), strict=True):
        assert torch.equal(got, want)


GOOD = {
    "tokens": torch.tensor([[5, 1, 5]]),
    "cond_logits": torch.zeros(1, 3, 5),
    "step": 0,
    "steps": 2,
    "num_masked": 1,
    "mask_token": 5,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokens", torch.tensor([5, 1]), ValueError),
        ("tokens", torch.tensor([[5, 1, 5]], dtype=torch.int32), TypeError),
        ("tokens", torch.tensor([[5, 6, 5]]), ValueError),
        ("tokens", torch.tensor([[5, -1, 5]]), ValueError),
        ("tokens", [[5, 1, 5]], TypeError),
        ("cond_logits", torch.zeros(1, 2, 5), ValueError),
        ("cond_logits", torch.zeros(1, 3, 0), ValueError),
        ("cond_logits", torch.zeros(1, 3, 5, dtype=torch.float64), TypeError),
        ("cond_logits", torch.zeros(1, 3, 5, device="meta"), ValueError),
        ("cond_logits", torch.zeros(1, 3, 10)[..., ::2], ValueError),
        ("uncond_logits", torch.zeros(1, 3, 4), ValueError),
        ("uncond_logits", torch.zeros(1, 3, 5, dtype=torch.float16), TypeError),
        ("step", 2, ValueError),
        ("step", -1, ValueError),
        ("num_masked", -1, ValueError),
        ("num_masked", torch.tensor([-1]), ValueError),
        ("num_masked", torch.tensor([1, 1]), ValueError),
        ("num_masked", torch.tensor([1.0]), TypeError),
        ("mask_token", 4, ValueError),
        ("guidance", math.nan, ValueError),
        ("softmax_temperature", 0.0, ValueError),
        ("softmax_temperature", math.inf, ValueError),
        ("noise_temperature", -0.1, ValueError),
        ("noise_temperature", math.nan, ValueError),
        ("confidence", "best", ValueError),
        ("seed", 1 << 64, ValueError),
        ("seed", -1, ValueError),
        ("first_sample", -1, ValueError),
        ("uncond_rows", torch.zeros(1, 3, dtype=torch.int64), ValueError),
        ("out", torch.zeros(1, 2, dtype=torch.int64), ValueError),
        ("out", torch.zeros(1, 3), TypeError),
    ],
)
def test_bad_input(backend: str, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        maskgit_decode_step(**{**GOOD, name: value}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows(backend: str) -> None:
    for row in (-1, 3):
        rows = torch.tensor([[0, 1, row]])
        packed = {**GOOD, "cond_logits": torch.zeros(3, 5)}
        with pytest.raises(ValueError, match=r"^rows: "):
            maskgit_decode_step(**packed, rows=rows, backend=backend)
        with pytest.raises(ValueError, match=r"^uncond_rows: "):
            maskgit_decode_step(
                **packed,
                uncond_logits=torch.zeros(3, 5),
                rows=torch.zeros_like(rows),
                uncond_rows=rows,
                guidance=2.0,
                backend=backend,
            )


def test_unknown_and_unavailable_back_ends() -> None:
    with pytest.raises(ValueError, match=r"^backend: "):
        maskgit_decode_step(**GOOD, backend="sdpa")
    with pytest.raises(RuntimeError, match="cuda"):
        maskgit_decode_step(**GOOD, backend="cuda")
