"""What the benches share: options, columns, the arithmetic of a conversion."""

from __future__ import annotations

import argparse
import random

import pytest

from experiments.benches import ratios
from hardware.meters.ratios import InTurn, Ratio, Until


def parsed(*words: str, **defaults: float) -> Until:
    parser = argparse.ArgumentParser()
    ratios.add_arguments(parser, **defaults)
    return ratios.until(parser.parse_args(words))


def test_the_defaults_are_those_of_the_meter():
    assert parsed() == Until()
    assert parsed(most_rounds=30, beside=4) == Until(most_rounds=30, beside=4)
    assert parsed("--rounds", "3", "--seconds", "9", "--interval", "0.5", "--seed", "4") == Until(0.5, 3, 3, 9.0, 2, 2, 4)
    with pytest.raises(ValueError, match="most_rounds = 0"):
        parsed("--rounds", "0")


def test_a_conversion_carries_the_interval_over():
    found = ratios.converted(Ratio("arm", "base", 0.7, 0.6, 0.68, 0.72, 12, True), 0.6)
    assert found == pytest.approx({"median": 0.75, "best": 1.0, "low": 0.7, "high": 0.8})
    noisy = ratios.converted(Ratio("arm", "base", 0.7, 0.6, 0.4, 0.9, 12, False), 0.6)
    assert noisy["median"] is None
    assert noisy["low"] == pytest.approx(0.25)
    assert set(ratios.converted(Ratio("arm", "base", 1.0, 1.0, 0.9, 1.1, 12, True), 1.0).values()) == {None}


def test_the_table_says_noisy_in_the_place_of_a_number():
    generator = random.Random(0)
    probes = {"base": lambda: 1.0, "calm": lambda: 0.5, "loud": lambda: generator.uniform(0.1, 1)}
    found = InTurn(probes, "base", Until(most_rounds=15)).run()
    assert ratios.columns(found.ratios["calm"]).split() == ["0.500", "0.500", "..", "0.500", "0.500", "10"]
    assert ratios.columns(found.ratios["loud"]).split()[0] == "noisy"
    assert "1 of 2 too noisy" in ratios.legend(found)
    assert "load" in ratios.legend(found)
