"""A few random calls of every op over the installed C++ kernels. `make sanitize` makes thousands."""

from __future__ import annotations

import os

import pytest

from random_calls.__main__ import make_call
from random_calls.draw import Draw
from titok.ops.core.available import why_no_cpp

CALLS = int(os.environ.get("TITOK_RANDOM_CALLS", "500"))


@pytest.mark.slow
@pytest.mark.skipif(why_no_cpp() is not None, reason=str(why_no_cpp()))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_calls() -> None:
    wrong = [why for number in range(CALLS) if (why := make_call(0, number)[1])]
    assert not wrong, "\n\n".join(wrong)


def test_a_call_depends_on_seed_and_number_alone() -> None:
    a, b, other = (Draw(*key).normal(3).tolist() for key in ((5, 1), (5, 1), (5, 2)))
    assert a == b != other
