"""Ratios of energies taken apart: by hand, and that the parts multiply to the whole."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.energy.factors import FACTORS, take_apart

SOME = st.floats(1e-3, 1e3)


def test_the_one_that_is_not_given_is_what_remains():
    split = take_apart((90, 100, 110), {"algorithm": (4, 5, 6), "precision": 2, "sparsity": 2})
    assert split.open == ("chip",)
    assert split.rest == pytest.approx((90 / 24, 5, 110 / 16))
    assert (
        split.sentence == "100 (90 to 110) times = algorithm 5 (4 to 6) x precision 2 x sparsity 2 x chip 5 (3.75 to 6.875)"
    )


def test_several_that_are_not_given_are_named_and_not_split():
    split = take_apart(149, {})
    assert split.rest == (149, 149, 149)
    assert "algorithm, precision, sparsity, chip cannot be told apart" in split.sentence
    assert "precision, chip cannot be told apart" in take_apart(8, {"algorithm": 2, "sparsity": 2}).sentence


def test_factors_that_do_not_make_the_ratio_are_said_so():
    split = take_apart(100, {"algorithm": 2, "precision": 2, "sparsity": 2, "chip": 2})
    assert not split.consistent
    assert "do not multiply to the ratio, 6.25 is left over" in split.sentence
    assert take_apart((15, 16, 17), {"algorithm": 2, "precision": 2, "sparsity": 2, "chip": 2}).consistent


@given(st.tuples(SOME, SOME, SOME, SOME), st.sampled_from(FACTORS))
def test_parts_multiply_to_the_whole(values, hidden):
    named = dict(zip(FACTORS, values, strict=True))
    split = take_apart(math.prod(values), {name: value for name, value in named.items() if name != hidden})
    assert split.rest == pytest.approx((named[hidden],) * 3, rel=1e-9)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "3", (1, 2), (3, 2, 1)])
def test_bad_numbers_are_refused_by_name(value):
    with pytest.raises(ValueError, match="ratio is"):
        take_apart(value, {})
    with pytest.raises(ValueError, match="factor chip is"):
        take_apart(2, {"chip": value})
    with pytest.raises(ValueError, match=r"'luck'.* is unknown"):
        take_apart(2, {"luck": 2})
