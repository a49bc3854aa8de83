"""Philox4x32-10 against the published vectors, and the counter's layout."""

from __future__ import annotations

import pytest
import torch

import oracles
from titok.ops.philox import decode_words, philox4x32

# The philox4x32-10 lines of Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    got = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words
    assert oracles.philox4x32(counter, key) == words  # the oracle of the other tests


def test_layout_and_broadcasting() -> None:
    seed, step = (7 << 32) + 5, 3
    samples, positions = torch.tensor([[0], [9 << 32], [(1 << 63) - 1]]), torch.arange(4)[None]
    words = decode_words(samples, step, positions, seed)
    for i, sample in enumerate(samples[:, 0].tolist()):
        for n in range(4):
            counter = (n, step, sample % 2**32, sample >> 32)
            assert tuple(int(w[i, n]) for w in words) == oracles.philox4x32(counter, (5, 7))
