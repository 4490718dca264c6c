"""Times to the dense loss and the frontier, from runs at several budgets made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.comparison.collection import collect
from experiments.comparison.document import to_json
from experiments.comparison.statistics import paired_test
from experiments.comparison.targets import frontier, times_to_dense
from experiments.comparison.verdicts import verdicts
from experiments.runs.plain_json import plain
from experiments.views.figures import figure
from experiments.views.page import page
from experiments.views.tables import markdown, table

RunMaker = Callable[..., Path]


def test_time_to_the_dense_end_loss_is_interpolated_per_seed(tmp_path: Path, make_ladder: Callable[..., None]) -> None:
    make_ladder("dense", {20.0: [1.80, 1.82, 1.81], 10.0: [1.9, 1.9, 1.9]})
    make_ladder("surprise", {10.0: [1.84, 1.85, 1.82], 14.0: [1.80, 1.81, 1.79], 20.0: [1.7, 1.7, 1.7]})
    make_ladder("random", {14.0: [1.90, 1.90, 1.90], 20.0: [1.81, 1.80, 1.79]}, keep_fraction=0.51)
    comparison = collect([tmp_path])
    assert comparison.excluded == ()
    stream = comparison.streams["noisy"]
    assert {name: arm.loss.mean for name, arm in stream.arms.items()} == pytest.approx(
        {"dense": 1.81, "random": 1.80, "surprise": 1.7}
    )
    found = {item.arm: item for item in times_to_dense(stream)}
    # surprise: seed 0 reaches 1.80 at 14; seed 1: 1.82 three quarters of the way; seed 2: 1.81 a third of the way
    expected = {0: 14.0, 1: 13.0, 2: 10 + 4 / 3}
    assert dict(found["surprise"].times) == pytest.approx({s: 0.999 * t for s, t in expected.items()})
    share = found["surprise"].share
    shares = [t / 20 for t in expected.values()]
    sd = (sum((x - sum(shares) / 3) ** 2 for x in shares) / 2) ** 0.5
    assert (share.bound, share.censored) == (None, 0)
    assert share.mean == pytest.approx(sum(shares) / 3)
    assert share.high == pytest.approx(sum(shares) / 3 + 4.3027 * sd / 3**0.5, rel=1e-4)  # t for 2 degrees, by table
    assert set(found["surprise"].against) == {"dense", "random"}
    # random: seed 0 never gets to 1.80, so its largest budget stands for it
    assert found["random"].never == (0,)
    assert found["random"].share.bound == "more than"
    assert found["random"].share.mean == pytest.approx((20.0 + 18.8 + 14 + 6 * 9 / 11) / 60)
    assert found["surprise"].bounded == ("random",)
    # random's seed 0 is only known to need more than 20, so the test is of signs: 3 of 3, p = 2^-3
    test = found["surprise"].against["random"]
    assert (test.method, test.wins, test.n, test.p) == ("sign test", 3, 3, pytest.approx(0.125))
    against_dense = paired_test([0.999 * t for t in expected.values()], [0.999 * 20.0] * 3)
    assert found["surprise"].against["dense"].p == pytest.approx(against_dense.p)
    said = verdicts(comparison)
    assert any("noisy: surprise takes 0.639" in sentence and "(n = 3)" in sentence for sentence in said)
    assert any("random does not reach the dense end loss in 1 of 3 seeds (seed 0 not by 1.000, " in s for s in said)
    assert "10 s: 1.8367; 14 s: 1.8000; 20 s: 1.7000" in table(comparison)
    document = json.loads(json.dumps(to_json(comparison)))
    assert document["time_to_dense"]["noisy"]["surprise"]["share_of_dense"]["n"] == 3
    assert len(figure(comparison).axes) == 1


def test_seeds_that_only_bound_a_time_are_printed_as_a_bound(tmp_path: Path, make_ladder: Callable[..., None]) -> None:
    make_ladder("dense", {20.0: [1.80, 1.81, 1.82]})
    make_ladder("surprise", {11.4: [1.79, 1.80, 1.81], 20.0: [1.7, 1.7, 1.7]})
    comparison = collect([tmp_path])
    (found,) = times_to_dense(comparison.streams["noisy"])
    assert (found.at_most, found.never) == ((0, 1, 2), ())
    assert found.share.text() == "at most 0.570 in 3 of 3 seeds"
    (sentence,) = [s for s in verdicts(comparison) if "dense end loss" in s]
    assert sentence == (
        "noisy: surprise takes at most 0.570 of the dense time to the dense end loss in 3 of 3 seeds (the smallest budget "
        "reached it); less than dense in 3 of 3 seeds, which 3 seeds cannot prove (exact sign test, p = 0.12)."
    )
    document = json.loads(json.dumps(to_json(comparison)))["time_to_dense"]["noisy"]["surprise"]
    share = document["share_of_dense"]
    assert (share["bound"], share["censored"], share["n"], share["low"], share["high"]) == ("at most", 3, 3, None, None)
    assert (document["against"]["dense"]["method"], document["against"]["dense"]["p"]) == ("sign test", 0.125)
    html = page(comparison, plain(to_json(comparison)), {})
    for text in (table(comparison), markdown(comparison), markdown(comparison, most_columns=8), html):
        assert "at most 0.570 in 3 of 3 seeds" in text
        assert "[0.570" not in text
    make_ladder("surprise_b", {11.4: [1.79, 1.80, 1.81]})
    two = {item.arm: item.share for item in times_to_dense(collect([tmp_path]).streams["noisy"])}
    assert two["surprise_b"] == two["surprise"], "one budget bounds as two do"


def test_six_bounded_seeds_are_enough_for_a_sign_test(tmp_path: Path, make_ladder: Callable[..., None]) -> None:
    make_ladder("dense", {20.0: [1.8] * 6})
    make_ladder("surprise", {10.0: [1.7] * 6})
    sentence = next(s for s in verdicts(collect([tmp_path])) if "dense end loss" in s)
    assert "at most 0.500 of the dense time to the dense end loss in 6 of 6 seeds" in sentence
    assert sentence.endswith("less than dense: yes, exact sign test, Holm-adjusted p = 0.016.")  # 2^-6


def test_a_mean_of_measured_and_bounded_seeds_is_a_bound(tmp_path: Path, make_ladder: Callable[..., None]) -> None:
    make_ladder("dense", {20.0: [1.80, 1.80]})
    make_ladder("surprise", {10.0: [1.79, 1.85], 20.0: [1.7, 1.75]})
    comparison = collect([tmp_path])
    (found,) = times_to_dense(comparison.streams["noisy"])
    assert found.at_most == (0,)
    assert found.times == pytest.approx({0: 9.99, 1: 14.985})
    assert (found.share.bound, found.share.mean) == ("at most", pytest.approx((0.5 + 0.75) / 2))
    assert found.share.low is found.share.high is None
    assert found.share.text() == "mean at most 0.625 (bound in 1 of 2 seeds)"
    assert (
        "surprise takes on average at most 0.625 of the dense time to the dense end loss (n = 2: seed 0 at most 0.500, "
        in (" ".join(verdicts(comparison)))
    )


def test_bounds_from_above_and_from_below_have_no_mean(tmp_path: Path, make_ladder: Callable[..., None]) -> None:
    make_ladder("dense", {20.0: [1.80, 1.80]})
    make_ladder("surprise", {10.0: [1.79, 1.9], 16.0: [1.7, 1.85]})
    comparison = collect([tmp_path])
    (found,) = times_to_dense(comparison.streams["noisy"])
    assert (found.share.bound, found.share.mean, found.share.censored) == ("unknown", None, 2)
    assert found.against == {}
    said = " ".join(verdicts(comparison))
    assert "does not reach the dense end loss in 1 of 2 seeds (seed 1 not by 0.800, seed 0 by at most 0.500 of the" in said


def test_the_price_on_other_text_is_read_at_the_budget_of_the_time(
    tmp_path: Path, make_ladder: Callable[..., None]
) -> None:
    make_ladder("dense", {20.0: [1.80, 1.82]}, known={20.0: [1.70, 1.72]})
    make_ladder(
        "surprise",
        {10.0: [1.84, 1.86], 20.0: [1.76, 1.76]},
        known={10.0: [1.90, 1.90], 20.0: [1.80, 1.80]},
    )
    comparison = collect([tmp_path])
    (found,) = times_to_dense(comparison.streams["noisy"])
    # seed 0 reaches 1.80 half of the way from 10 to 20, seed 1 1.82 after 0.4 of it
    assert found.times == pytest.approx({0: 0.999 * 15, 1: 0.999 * 14})
    assert found.prices["known"] == pytest.approx({0: 1.85 - 1.70, 1: 1.86 - 1.72})
    (sentence,) = [s for s in verdicts(comparison) if "dense end loss" in s]
    assert "; at that budget +0.1450 [+0.0815, +0.2085] nats against dense on known (n = 2); " in sentence  # t: 12.706
    assert "known there, nats against dense" in markdown(comparison)
    assert "+0.1450 [+0.0815, +0.2085]" in table(comparison)
    assert to_json(comparison)["time_to_dense"]["noisy"]["surprise"]["price_nats"]["known"]["1"] == pytest.approx(0.14)
    assert "(+0.0900)" in table(comparison), "the price at the full budget stands in a table that says so"


def test_other_held_out_text_has_its_own_table(tmp_path: Path, make_run: RunMaker) -> None:
    for arm, known in (("dense", 1.9), ("surprise", 1.95)):
        for seed in range(2):
            sets = {"val": {"loss_nats": 1.7}, "known": {"loss_nats": known + 0.01 * seed}}
            make_run(arm, 1.7, seed=seed, result={"held_out": sets})
    comparison = collect([tmp_path])
    text = table(comparison)
    assert "other held-out text" in text
    assert "(+0.0500)" in text
    assert to_json(comparison)["streams"]["clean"]["surprise"]["held_out"]["known"]["loss_nats"] == pytest.approx(1.955)


def test_the_frontier_compares_with_random_at_equal_flops(tmp_path: Path, make_run: RunMaker) -> None:
    def arm(name: str, flops: float, losses: list[float]) -> None:
        for seed, loss in enumerate(losses):
            numbers = {"flops": flops, "prequential": {"loss_nats": loss}}
            make_run(name, 1.8, seed=seed, stream="drift", name=f"{name}-{seed}", result=numbers)

    arm("dense", 8e12, [2.00, 2.02])
    arm("random_50", 4e12, [2.10, 2.13])
    arm("surprise_50", 5e12, [2.05, 2.07])
    arm("surprise_25", 2e12, [2.20, 2.20])
    comparison = collect([tmp_path])
    found = {point.arm: point for point in frontier(comparison.streams["drift"])}
    test = found["surprise_50"].against_random
    assert test is not None
    line = [2.10 - 0.25 * 0.10, 2.13 - 0.25 * 0.11]
    assert test.difference == pytest.approx(((2.05 - line[0]) + (2.07 - line[1])) / 2)
    assert found["surprise_25"].against_random is None, "below the least random FLOPs nothing is extrapolated"
    assert [name for name, point in found.items() if point.on_frontier] == [
        "surprise_25",
        "random_50",
        "surprise_50",
        "dense",
    ]
    arm("worse", 6e12, [2.3, 2.3])
    again = {point.arm: point.on_frontier for point in frontier(collect([tmp_path]).streams["drift"])}
    assert again["worse"] is False
    assert any("surprise_50: +0.0500 nats prequential at 62% of the dense FLOPs" in s for s in verdicts(comparison))
    assert "prequential loss against FLOPs" in table(comparison)
    assert len(figure(comparison).axes) == 2
