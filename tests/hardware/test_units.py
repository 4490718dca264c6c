"""Units: what may be added, multiplied and read, and what is refused."""

from __future__ import annotations

import math

import pytest

from hardware import Quantity, UnitError


def test_picojoule_plus_nanosecond_is_refused() -> None:
    # keras-spiking's 27.1 pJ per synaptic operation on Loihi is 23.6 pJ + 3.5 ns.
    with pytest.raises(UnitError, match=r"cannot add 23\.6 pJ \(energy\) and 3\.5 ns \(time\)"):
        Quantity(23.6, "pJ") + Quantity(3.5, "ns")
    with pytest.raises(UnitError, match="cannot subtract"):
        Quantity(23.6, "pJ") - Quantity(3.5, "ns")
    with pytest.raises(UnitError, match="has no unit"):
        Quantity(23.6, "pJ") + 3.5


def test_same_dimension_adds_in_the_first_unit() -> None:
    total = Quantity(1.5, "nJ") + Quantity(500, "pJ")
    assert total.unit == "nJ"
    assert total.value == pytest.approx(2.0)
    assert (Quantity(1, "ms") - Quantity(250, "us")).to("ms") == pytest.approx(0.75)


def test_power_times_time_is_energy_and_nothing_else_multiplies() -> None:
    assert (Quantity(104, "mW") * Quantity(2, "s")).to("J") == pytest.approx(0.208)
    assert (Quantity(2, "s") * Quantity(104, "mW")).to("mJ") == pytest.approx(208)
    assert (3 * Quantity(2, "pJ")).to("pJ") == 6
    for other in (Quantity(1, "pJ"), "2", True):
        with pytest.raises(UnitError, match="cannot multiply"):
            Quantity(1, "pJ") * other


def test_reading_in_another_dimension_and_unknown_units() -> None:
    with pytest.raises(UnitError, match="energy, not time"):
        Quantity(1, "pJ").to("ns")
    with pytest.raises(UnitError, match="unknown unit 'kcal'"):
        Quantity(1, "pJ").to("kcal")
    with pytest.raises(UnitError, match="unknown unit 'pj'"):
        Quantity(1, "pj")
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            Quantity(value, "pJ")
