"""A few random calls of every op over the installed C++ kernels. `make sanitize` makes thousands."""

from __future__ import annotations

import os

import pytest

from random_calls.__main__ import make_call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_calls() -> None:
    wrong = [
        why
        for number in range(int(os.environ.get("TITOK_RANDOM_CALLS", "500")))
        if (why := make_call(0, number)[1])
    ]
    assert not wrong, "\n\n".join(wrong)


def test_a_call_depends_on_seed_and_number_alone() -> None:
    from random_calls.draw import Draw

    a, b, other = (Draw(*key).normal(3).tolist() for key in ((5, 1), (5, 1), (5, 2)))
    assert a == b != other
