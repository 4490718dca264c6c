"""Intervals keep their order and their units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import Interval, Quantity, UnitError
from hardware.interval import largest, total

NUMBER = st.floats(0, 1e12, allow_subnormal=False)


def intervals(unit: str) -> st.SearchStrategy[Interval]:
    return st.tuples(NUMBER, NUMBER, NUMBER).map(lambda t: Interval.of(*sorted(t), unit))  # type: ignore[misc]


@given(intervals("us"), intervals("ns"), intervals("mW"), st.floats(0, 1e6))
def test_sums_maxima_and_products_keep_the_order(a: Interval, b: Interval, power: Interval, factor: float) -> None:
    for found in (a + b, a * factor, largest([a, b], "s"), total([a, b], "us"), a.widened(0.243)):
        low, mid, high = found.to("s")
        assert low <= mid <= high
    low, mid, high = (power * a).to("J")
    assert low <= mid <= high
    assert all(x >= y for x, y in zip(largest([a, b], "us").to("us"), a.to("us"), strict=True))


def test_units_and_order_are_checked() -> None:
    time, energy = Interval.of(1, 2, 3, "us"), Interval.of(1, 2, 3, "pJ")
    with pytest.raises(UnitError, match="cannot add"):
        time + energy
    with pytest.raises(UnitError, match="cannot multiply"):
        time * energy
    with pytest.raises(UnitError, match="an interval is needed"):
        time + 3
    with pytest.raises(UnitError, match="a number from 0"):
        time * -1
    with pytest.raises(UnitError, match="energy, not time"):
        largest([energy], "us")
    with pytest.raises(UnitError):
        Interval(Quantity(1, "us"), Quantity(2, "pJ"), Quantity(3, "us"))
    with pytest.raises(ValueError, match="out of order"):
        Interval.of(2, 1, 3, "us")
    with pytest.raises(ValueError, match="share from 0 to 1"):
        time.widened(1)
    assert str(time) == "2 us (1 to 3)"
    assert Interval.exact(Quantity(1, "ms")).to("us") == pytest.approx((1000, 1000, 1000))
    assert total([], "us").to("us") == (0, 0, 0)
