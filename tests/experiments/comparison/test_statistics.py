"""Statistics against closed forms, published tables and enumeration, not against the library underneath."""

from __future__ import annotations

import math
from itertools import product

import pytest

from experiments.comparison.statistics import (
    Span,
    StatisticsError,
    TooFewSeeds,
    holm,
    interval,
    mean_curve,
    paired_spans_test,
    paired_test,
    time_to_target,
    verdict,
    verdict_without_test,
)

# Two-sided 95 % points of Student's t, from the printed table.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("degrees", T_TABLE)
def test_interval_agrees_with_the_printed_t_table(degrees: int) -> None:
    values = [0.1 * i * (-1) ** i for i in range(degrees + 1)]
    n = len(values)
    mean = sum(values) / n
    sd = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    got = interval(values)
    assert got.n == n
    assert got.mean == pytest.approx(mean)
    assert got.high is not None
    assert got.high - got.mean == pytest.approx(T_TABLE[degrees] * sd / math.sqrt(n), rel=5e-4)


def test_one_value_has_a_mean_and_no_interval() -> None:
    got = interval([1.25])
    assert (got.mean, got.low, got.high, got.sd, got.n) == (1.25, None, None, None, 1)
    assert got.text() == "1.2500 (n = 1)"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_place(bad: float) -> None:
    with pytest.raises(StatisticsError, match=r"values\[1\]"):
        interval([1.0, bad])
    with pytest.raises(StatisticsError, match=r"baseline\[0\]"):
        paired_test([1.0, 2.0], [bad, 2.0])
    with pytest.raises(StatisticsError, match="empty"):
        interval([])


def test_one_degree_of_freedom_has_a_closed_form() -> None:
    # t with one degree of freedom is the Cauchy distribution: P(T < t) = 1/2 + atan(t) / pi.
    test = paired_test([1.0, 1.0], [1.3, 1.1])
    t = -0.2 / (math.sqrt(0.02) / math.sqrt(2))
    assert test.p == pytest.approx(0.5 + math.atan(t) / math.pi)
    assert test.difference == pytest.approx(-0.2)
    assert test.method == "paired t"


def test_two_degrees_of_freedom_have_a_closed_form() -> None:
    ours, theirs = [1.0, 1.1, 1.2], [1.05, 1.25, 1.21]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / 3
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    t = mean / (sd / math.sqrt(3))
    test = paired_test(ours, theirs)
    assert test.p == pytest.approx(0.5 * (1 + t / math.sqrt(2 + t * t)))  # P(T < t) for two degrees of freedom
    assert paired_test(theirs, ours).p == pytest.approx(1 - test.p)


@pytest.mark.parametrize("differences", [[-3.0, -1.0, 2.0, -4.0, -5.0], [-1.0, -1.0, 2.0, -2.0], [0.0, -1.0, -2.0, 3.0]])
def test_wilcoxon_equals_enumeration_of_all_signs(differences: list[float]) -> None:
    kept = [d for d in differences if d]
    sizes = sorted(abs(d) for d in kept)
    rank = {s: sum(i + 1 for i, x in enumerate(sizes) if x == s) / sizes.count(s) for s in sizes}
    observed = sum(rank[abs(d)] for d in kept if d > 0)
    sums = [
        sum(rank[abs(d)] for d, up in zip(kept, signs, strict=True) if up) for signs in product((0, 1), repeat=len(kept))
    ]
    expected = sum(s <= observed for s in sums) / len(sums)
    assert paired_test(differences, [0.0] * len(differences)).wilcoxon_p == pytest.approx(expected)


def test_equal_differences_fall_back_to_the_sign_test_and_say_so() -> None:
    test = paired_test([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (test.method, test.p, test.low) == ("sign test", 0.125, None)
    assert "equal" in test.reason
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_one_pair_is_no_test() -> None:
    with pytest.raises(TooFewSeeds, match="n = 1: no test possible"):
        paired_test([1.0], [2.0])
    with pytest.raises(StatisticsError, match="one of each per seed"):
        paired_test([1.0, 2.0], [2.0])


def test_holm_on_the_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, then made monotone.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0)
    assert holm([]) == ()
    with pytest.raises(StatisticsError, match=r"p_values\[0\]"):
        holm([1.5])


def test_time_to_target_interpolates_and_admits_never() -> None:
    curve = [(0.0, 5.0), (10.0, 3.0), (20.0, 2.0)]
    assert time_to_target(curve, 4.0) == pytest.approx(5.0)
    assert time_to_target(curve, 2.5) == pytest.approx(15.0)
    assert time_to_target(curve, 5.0) == 0.0
    assert time_to_target(curve, 1.0) is None
    with pytest.raises(StatisticsError, match="does not come after"):
        time_to_target([(0.0, 5.0), (0.0, 4.0)], 4.5)
    with pytest.raises(StatisticsError, match=r"losses\[1\]"):
        time_to_target([(0.0, 5.0), (1.0, math.nan)], 4.5)


def test_mean_curve_covers_the_common_time_only() -> None:
    first = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)]
    second = [(0.0, 2.0), (2.0, 0.0)]
    assert mean_curve([first, second]) == [(0.0, 3.0), (1.0, 1.5), (2.0, 0.5)]
    assert [t for t, _ in mean_curve([first, [(0.0, 2.0), (1.0, 1.0)]])] == [0.0, 1.0]
    assert mean_curve([first, []]) == []


def test_verdicts_are_plain_sentences() -> None:
    test = paired_test([1.0, 1.1, 1.2], [1.3, 1.41, 1.5])
    assert verdict("surprise", "random", test).startswith("surprise beats random: yes; 0.3033 nats lower")
    assert verdict("surprise", "random", test, adjusted_p=0.31).startswith("surprise beats random: no;")
    assert "Holm-adjusted p = 0.31" in verdict("surprise", "random", test, adjusted_p=0.31)
    assert "Holm-adjusted p < 0.0001)" in verdict("surprise", "random", test, adjusted_p=1e-6)
    equal = paired_test([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert verdict("surprise", "dense", equal, adjusted_p=0.25) == (
        "surprise against dense: 0.5000 nats lower; lower in 3 of 3 seeds, which 3 seeds cannot prove (exact sign test, "
        "p = 0.12)"
    )
    assert verdict_without_test("surprise", "dense", 0.02) == (
        "surprise against dense: 0.0200 nats higher; n = 1: no test possible"
    )


@pytest.mark.parametrize(("n", "wins"), [(3, 3), (5, 5), (5, 4), (6, 2)])
def test_bounds_are_tested_by_signs_with_every_doubt_against_the_candidate(n: int, wins: int) -> None:
    won, doubtful = (Span(0.0, 1.0), Span(2.0, 2.0)), (Span(0.0, 3.0), Span(2.0, math.inf))
    pairs = [won] * wins + [doubtful] * (n - wins)
    test = paired_spans_test([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    assert test.p == pytest.approx(sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n)
    assert (test.method, test.wins, test.low, test.high) == ("sign test", wins, None, None)


def test_spans_that_are_values_are_tested_as_values() -> None:
    ours, theirs = [1.0, 1.1, 1.2], [1.05, 1.25, 1.21]
    spans = paired_spans_test([Span(x, x) for x in ours], [Span(x, x) for x in theirs])
    assert spans == paired_test(ours, theirs)
    with pytest.raises(TooFewSeeds, match="n = 1"):
        paired_spans_test([Span(0.0, 1.0)], [Span(2.0, 2.0)])
    with pytest.raises(StatisticsError, match="one of each per seed"):
        paired_spans_test([Span(0.0, 1.0)] * 2, [Span(2.0, 2.0)])
