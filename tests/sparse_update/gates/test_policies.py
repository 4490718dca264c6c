"""Selections against sorting by hand, the papers' rules, and unbiasedness in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.gates.config import GateConfig
from sparse_update.gates.policies import (
    Selection,
    band,
    kept_count,
    make_policy,
    policy_names,
    register_policy,
    uniform,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 10, width=32), min_size=2, max_size=40), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_band_keeps_the_ranks_between_the_cuts(scores, keep, cut_share):
    cut = cut_share * (1 - keep)
    found = band(torch.tensor(scores), keep, cut).index.tolist()
    n, kept = len(scores), max(1, round(len(scores) * keep))
    ranked = sorted(range(n), key=lambda i: (scores[i], i))
    first = max(0, n - kept - round(n * cut))
    assert found == sorted(ranked[first : first + kept])
    assert len(found) == kept_count(n, keep)


def test_band_works_row_by_row_and_keeps_order():
    loss = torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert band(loss, 0.4, 0.2).index.tolist() == [[2, 4], [2, 3]]
    assert band(loss, 0.4, 0.0).index.tolist() == [[0, 4], [3, 4]]
    assert band(loss, 0.4, 0.6).index.tolist() == [[1, 3], [0, 1]]


def test_random_control_keeps_as_many_and_every_item_alike():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(2000):
        chosen = uniform((20,), 0.3, generator).index
        assert len(set(chosen.tolist())) == 6
        counts[chosen] += 1
    assert (counts / 2000 - 0.3).abs().max() < 0.05  # five standard errors


def test_top_and_threshold():
    score = torch.tensor([0.5, 3.0, 1.0, 2.0])
    draw = torch.Generator()
    assert make_policy("top", {}).select(score, 0.5, draw).index.tolist() == [1, 3]
    assert make_policy("threshold", {"at_least": 1.0, "at_most": 2.5}).select(score, 1.0, draw).index.tolist() == [2, 3]


UNBIASED = ["uniform", "soft", "importance"]


@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_is_the_dense_one(name):
    """Gradients of a regression, one per item, in float64: the mean estimate over many draws against the dense mean, as a
    Hotelling-like statistic of independent coordinates; and a policy without its weights must fail the same test."""
    torch.manual_seed(0)
    items, width, draws = 24, 5, 6000
    x = torch.randn(items, width, dtype=torch.float64) * torch.rand(items, 1, dtype=torch.float64) * 3
    y = torch.randn(items, dtype=torch.float64)
    gradients = 2 * (x @ torch.ones(width, dtype=torch.float64) - y)[:, None] * x
    score = gradients.norm(dim=1)
    dense = gradients.mean(0)
    policy = make_policy(name, {})
    assert policy.unbiased
    generator = torch.Generator().manual_seed(1)

    def z_scores(weighted):
        found = []
        for _ in range(draws):
            chosen = policy.select(score, 0.5, generator)
            picked = gradients[chosen.index]
            if chosen.weight is None or not weighted:
                found.append(picked.mean(0))
            else:
                found.append((chosen.weight.double()[:, None] * picked).sum(0) / chosen.offered)
        stacked = torch.stack(found)
        return ((stacked.mean(0) - dense) / (stacked.std(0) / math.sqrt(draws))).abs()

    assert z_scores(weighted=True).max() < 4.0
    if name != "uniform":
        assert z_scores(weighted=False).max() > 8.0


def test_soft_pruning_drops_half_of_what_lies_below_the_mean_and_doubles_the_rest():
    score = torch.cat((torch.zeros(1000), torch.full((1000,), 2.0), torch.tensor([math.inf])))
    found = make_policy("soft", {}).select(score, 1.0, torch.Generator().manual_seed(0))
    low = found.index < 1000
    assert 430 < int(low.sum()) < 570
    assert int((~low).sum()) == 1001  # nothing above the mean is dropped, nor what has no score
    assert set(found.weight[low].tolist()) == {2.0}
    assert set(found.weight[~low].tolist()) == {1.0}


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_selective_backprop_keeps_with_the_power_of_the_cdf(beta):
    policy = make_policy("cdf", {"beta": beta, "history": 1000})
    generator = torch.Generator().manual_seed(0)
    score = torch.arange(1000) / 1000.0
    counts = torch.zeros(1000)
    for _ in range(300):
        counts[policy.select(score, 0.5, generator).index] += 1
    by_tenth = counts.view(10, 100).mean(1) / 300
    expected = (((torch.arange(1000) + 1) / 1000) ** beta).view(10, 100).mean(1)
    assert (by_tenth - expected).abs().max() < 0.015
    assert float(counts.mean() / 300) == pytest.approx(1 / (beta + 1), abs=0.01)
    again = make_policy("cdf", {"beta": beta, "history": 1000})
    again.load_state_dict(policy.state_dict())
    assert torch.equal(again.seen, policy.seen)


def test_importance_sampling_switches_on_only_where_it_reduces_variance_enough():
    policy = make_policy("importance", {"keep": 0.5, "smoothing": 0.0})
    assert policy.threshold() == pytest.approx((1 / 0.5 + 3) / 3)
    policy.observe(torch.ones(100))
    assert policy.tau == pytest.approx(1.0)
    assert not policy.switched_on()
    skewed = torch.cat((torch.full((95,), 0.01), torch.full((5,), 10.0)))
    policy.observe(skewed)
    p = skewed.double() / skewed.double().sum()
    assert policy.tau == pytest.approx(float((1 - ((p - 0.01) ** 2).sum() / (p * p).sum()) ** -0.5))
    assert policy.switched_on()


def test_a_policy_of_ones_own_is_known_by_name_from_then_on():
    @register_policy("every_other_of_mine")
    def every_other(score, keep_fraction, generator, progress, first=0):
        return Selection(torch.arange(first, score.shape[-1], round(1 / keep_fraction)), score.numel())

    assert "every_other_of_mine" in policy_names()
    cfg = GateConfig(
        unit="sequence", signal="ngram", keep_fraction=0.5, policy="every_other_of_mine", policy_options={"first": 1}
    )
    policy = make_policy(cfg.policy, cfg.options_of_policy())
    assert policy.select(torch.zeros(6), 0.5, torch.Generator()).index.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="policy every_other_of_mine has first"):
        make_policy("every_other_of_mine", {"last": 1})


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("best", {}, "is not known: one of band"),
        ("soft", {"drop": 1.0}, r"drop = 1.0: must lie in \(0, 1\)"),
        ("top", {"cut": 1}, "policy top has no options"),
        ("threshold", {"at_least": 2.0, "at_most": 1.0}, "must be below"),
        ("cdf", {"beta": -1.0}, "beta = -1.0"),
        ("importance", {"smoothing": 1.0}, "smoothing = 1.0"),
    ],
)
def test_bad_policies_are_refused(name, options, word):
    with pytest.raises(ValueError, match=word):
        make_policy(name, options)
