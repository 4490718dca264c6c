"""Intervals of shares against scipy and a published table, and of errors against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from experiments.comparison.proportions import bootstrap, paired_shares, wilson
from experiments.comparison.statistics import StatisticsError


@pytest.mark.parametrize(("right", "samples"), [(0, 5), (5, 5), (1, 1), (438, 450), (7, 50), (9123, 10000)])
def test_wilson_is_scipys(right: int, samples: int) -> None:
    found, theirs = wilson(right, samples), binomtest(right, samples).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert found.value == right / samples


@pytest.mark.parametrize(
    ("both", "ours", "theirs", "none", "expected"),
    [
        (36, 12, 2, 0, (0.2000, 0.0569, 0.3404)),
        (36, 14, 0, 0, (0.2800, 0.1528, 0.4167)),
    ],
)  # Newcombe, Statistics in Medicine 17:2635 (1998), method 10
def test_paired_shares_as_published(both: int, ours: int, theirs: int, none: int, expected: tuple[float, ...]) -> None:
    a = np.repeat([True, True, False, False], [both, ours, theirs, none])
    b = np.repeat([True, False, True, False], [both, ours, theirs, none])
    found = paired_shares(a, b)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=5e-5)
    turned = paired_shares(b, a)
    assert (-turned.value, -(turned.high or 0), -(turned.low or 0)) == pytest.approx((found.value, found.low, found.high))


def test_models_that_agree_wholly_differ_by_nothing_with_an_interval_that_is_not_nothing() -> None:
    same = np.arange(450) % 40 > 0
    found = paired_shares(same, same)
    assert found.value == 0
    assert found.low is not None
    assert found.high is not None
    assert -0.02 < found.low < 0 < found.high < 0.02


def test_the_bootstrap_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(400, lambda rows: values[rows].mean(axis=1))
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap(1, lambda rows: values[rows].mean(axis=1)).low is None


def test_nothing_is_refused() -> None:
    for call in (lambda: wilson(1, 0), lambda: wilson(3, 2), lambda: bootstrap(0, lambda rows: rows.mean(axis=1))):
        with pytest.raises(StatisticsError):
            call()
    with pytest.raises(StatisticsError):
        paired_shares(np.ones(3, bool), np.ones(4, bool))
