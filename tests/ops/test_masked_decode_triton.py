"""`masked_decode_step` in Triton: the bits of plain PyTorch, for any number of chunks.

Without a GPU the kernels run in Triton's interpreter, which takes about a second for each of these calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decode_cases import random_call
from titok.ops import last_backend, masked_decode_step
from titok.ops.core.available import why_no_triton

pytest.importorskip("triton")
if reason := why_no_triton():
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check_call(number: int, chunk: int) -> None:
    """Compares a random call of few positions and codes, the codes cut into chunks of so many."""
    from titok.kernels import masked_decode_step as kernels

    tensors, arguments = random_call(number, codes=(1, 2, 7, 33, 40), most_tokens=2)
    want = masked_decode_step(*tensors, **arguments, backend="plain")
    moved = [None if t is None else t.to(DEVICE) for t in tensors]
    given = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "chunk_size", lambda positions, codes, device: max(chunk, -(-codes // 3)))
        got = masked_decode_step(*moved, **given, backend="triton")
    assert last_backend("masked_decode_step") == "triton"
    for name, expected, found in zip(want._fields, want, got, strict=True):
        assert (expected is None) == (found is None), (number, name)
        assert expected is None or torch.equal(expected, found.cpu()), (number, name)


@pytest.mark.parametrize("number", range(100, 112))
def test_random_calls(number: int) -> None:
    check_call(number, (1024, 16, 20)[number % 3])


def test_in_place() -> None:
    """Tokens and step map are updated where they lie, with renoising and a truncated draw."""
    tokens, logits = torch.full((1, 3), 6), torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1))
    step_map = torch.full((1, 3), -1, dtype=torch.int32)
    arguments = {"policy": "leftmost", "count": 2, "mask_token": 6, "temperature": 1.0, "top_k": 3, "seed": 5}
    arguments |= {"step": 4, "renoise": True}
    want = masked_decode_step(tokens, logits, **arguments, step_map=step_map, backend="plain")
    mine, map_of_mine = tokens.clone().to(DEVICE), step_map.clone().to(DEVICE)
    got = masked_decode_step(
        mine, logits.to(DEVICE), **arguments, step_map=map_of_mine, in_place=True, backend="triton"
    )
    assert got.tokens is mine
    assert got.step_map is map_of_mine
    assert torch.equal(mine.cpu(), want.tokens)
    assert want.step_map is not None
    assert torch.equal(map_of_mine.cpu(), want.step_map)
    assert want.step_map.tolist() == [[4, 4, -1]]


def test_memory_is_that_of_positions_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 integers for each position and 1 to 16 for each of its chunks and stages."""
    from titok.kernels import masked_decode_step as kernels

    empty, sizes = torch.empty, []

    def counted(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        sizes.append(tensor.nbytes)
        return tensor

    tokens, logits = torch.full((1, 2), 40, device=DEVICE), torch.randn(1, 2, 40, device=DEVICE)
    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(kernels, "chunk_size", lambda positions, codes, device: 20)
    masked_decode_step(tokens, logits, policy="threshold", threshold=0.5, mask_token=40, backend="triton")
    positions, chunks = 2, 2
    assert sizes == [8 * positions * 13, *(8 * positions * chunks * width for width in (2, 3, 1))]
