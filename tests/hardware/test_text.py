"""Values in messages: one line, never longer than asked, and a cut says how much there was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.text import LIMIT, short

ANYTHING = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=200) | st.tuples(inner, inner),
)


@given(ANYTHING, st.integers(32, 400))
def test_no_value_is_longer_than_the_limit_or_has_a_line_break(value: object, limit: int) -> None:
    text = short(value, limit)
    assert len(text) <= limit
    assert len(text.splitlines()) <= 1


@given(st.lists(st.integers(0, 9), max_size=30))
def test_what_fits_stands_as_it_is(values: list[int]) -> None:
    assert short(values) == repr(values)


def test_a_cut_says_how_much_there_was() -> None:
    assert short([7] * 10_000, limit=40) == "[7, 7, 7, 7, 7, 7, 7, ... (10,000 items)"
    assert short("ab" * 1000).endswith("... (2,000 characters)")
    assert short(np.arange(10**6)) == "array([ 0, 1, 2, ..., 999997, 999998, 999999], shape=(1000000,))"
    assert short(np.ones((40, 30))).endswith("... (shape (40, 30))")
    assert short(np.ones(())) == "array(1.)"
    assert len(short({i: i for i in range(1000)})) <= LIMIT


def test_a_limit_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 8"):
        short("x", 8)
