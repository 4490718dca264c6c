"""Prompt gates, predictions of pass rates, outputs a prompt and kept tokens, against closed forms and properties."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.objectives.reinforcement.outputs import accepted, allocate, best_of
from sparse_update.objectives.reinforcement.prompts import GATES, Candidates, Greso, make_prompt_gate
from sparse_update.objectives.reinforcement.rates import PassRates, Predicted, sigmoid, signal, surprise_logit
from sparse_update.objectives.reinforcement.settings import PromptGateConfig, ReinforcementError, TokenGateConfig
from sparse_update.objectives.reinforcement.tokens import kept_tokens


def cells_of(rates: np.ndarray, generator: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
    """Prompts of cells with these pass rates: names, and each prompt's own rate."""
    drawn = generator.integers(0, len(rates), size=count)
    return [f"level {d}" for d in drawn], rates[drawn]


def test_surprise_is_the_pass_rate() -> None:
    surprise = np.array([1e-6, 0.1, np.log(2), 3.0, 11.0])
    np.testing.assert_allclose(sigmoid(surprise_logit(surprise)), np.exp(-surprise), atol=1e-5, rtol=1e-5)
    found = PassRates(spread=1e-6).predict(["a"] * 5, range(5), surprise)
    np.testing.assert_allclose(sigmoid(found.mean_P), np.exp(-surprise), atol=1e-5, rtol=1e-5)


@given(st.floats(0, 1), st.integers(2, 32))
def test_signal_is_a_binomials_chance_of_a_mixed_group(rate: float, n: int) -> None:
    assert 0 <= float(signal(np.array(rate), n)) <= 1 - 2 * 0.5**n + 1e-12
    known = Predicted(np.array([np.log(3.0)]), np.array([0.0]))
    assert float(known.signal(n)[0]) == pytest.approx(1 - 0.75**n - 0.25**n, abs=1e-12)
    assert float(known.variance()[0]) == pytest.approx(0.1875)


def test_a_wide_belief_is_the_mean_over_its_logits() -> None:
    """Quadrature against a sum over many logits."""
    logits = np.random.default_rng(0).normal(1.0, 2.0, size=400_000)
    found = Predicted(np.array([1.0]), np.array([4.0]))
    assert float(found.rate()[0]) == pytest.approx(float(sigmoid(logits).mean()), abs=3e-3)
    assert float(found.signal(8)[0]) == pytest.approx(float(signal(sigmoid(logits), 8).mean()), abs=2e-2)


@pytest.mark.parametrize("known", [False, True])
def test_levels_of_cells_are_found_and_followed(known: bool) -> None:
    """Rates of three cells, then other rates, from groups of fresh prompts; with and without a surprise that misleads."""
    generator = np.random.default_rng(1)
    rates, model = np.array([0.03, 0.5, 0.95]), PassRates(half_life=60, spread=1.0)
    for turn, truth in enumerate((rates, rates[::-1])):
        for step in range(60):
            cells, true = cells_of(truth, generator, 16)
            ids = range((turn * 60 + step) * 16, (turn * 60 + step + 1) * 16)
            surprise = -np.log(sigmoid(np.log(true / (1 - true)) - 1.0)) if known else None  # one nat too pessimistic
            model.observe(cells, ids, generator.binomial(8, true), np.full(16, 8), surprise)
        surprise = -np.log(sigmoid(np.log(truth / (1 - truth)) - 1.0)) if known else None
        found = model.predict(["level 0", "level 1", "level 2"], [-1, -2, -3], surprise).rate()
        np.testing.assert_allclose(found, truth, atol=0.12)


def test_a_prompts_own_outcomes_outweigh_its_cell() -> None:
    model = PassRates()
    for _ in range(6):
        model.observe(["a", "a"], [7, 8], np.array([8, 0]), np.array([8, 8]))
    easy, hard, fresh = model.predict(["a"] * 3, [7, 8, 9]).rate()
    assert easy > 0.85
    assert hard < 0.15
    assert 0.2 < fresh < 0.8
    one_way = model.predict(["a"] * 3, [7, 8, 9]).signal(8)
    assert one_way[2] > one_way[0]
    assert one_way[2] > one_way[1]


@pytest.mark.parametrize("kind", sorted(GATES))
def test_a_gate_goes_on_from_its_state_to_the_bit(kind: str) -> None:
    cfg = PromptGateConfig(kind=kind)

    def run(gate, first: int, last: int) -> list[list[int]]:
        found = []
        for step in range(first, last):
            generator = np.random.default_rng(step)
            count = gate.candidates(6)
            cells, true = cells_of(np.array([0.0, 0.4, 1.0]), generator, count)
            shown = Candidates(list(generator.integers(0, 40, size=count)), cells, -np.log(np.clip(true, 1e-3, 0.999)))
            index = gate.choose(shown, 6, 8, generator)
            assert len(index) == len(set(index.tolist()))
            assert (np.diff(index) > 0).all()
            assert len(index) <= 6
            taken = shown.of(index)
            gate.observe(taken, generator.binomial(8, true[index]), np.full(len(index), 8))
            found.append(index.tolist())
        return found

    whole = make_prompt_gate(cfg)
    first = run(whole, 0, 10)
    saved = json.loads(json.dumps(whole.state_dict()))
    second = run(whole, 10, 20)
    again = make_prompt_gate(cfg)
    again.load_state_dict(saved)
    assert run(again, 10, 20) == second
    assert len(first) == 10


@pytest.mark.parametrize(("kind", "share"), [("predicted", 0.7), ("surprise", 0.85), ("random", 0.0)])
def test_predicted_prompts_give_a_signal_more_often_than_random_ones(kind: str, share: float) -> None:
    """A third of the cells give one; the share of the gap between a random third and all of them that a gate closes."""
    generator = np.random.default_rng(3)
    gate = make_prompt_gate(PromptGateConfig(kind=kind, keep_fraction=0.25, explore=0.05))
    mixed = []
    for step in range(80):
        count = gate.candidates(16)
        cells, true = cells_of(np.array([0.002, 0.5, 0.998]), generator, count)
        shown = Candidates(range(step * 1000, step * 1000 + count), cells, -np.log(true))
        index = gate.choose(shown, 16, 8, generator)
        right = generator.binomial(8, true[index])
        gate.observe(shown.of(index), right, np.full(16, 8))
        mixed.append(((right > 0) & (right < 8)).mean())
    found, chance = float(np.mean(mixed[20:])), 1 / 3
    assert found >= chance + share * (1 - chance) - 0.04
    if kind == "random":
        assert abs(found - chance) < 0.06


def test_greso_skips_by_its_rule() -> None:
    """A prompt with z groups without signal in a row is kept with chance p^z; p moves by a hundredth a step."""
    gate = Greso(PromptGateConfig(kind="greso", greso_start=0.5))
    one = Candidates([5], ["a"])
    for z in (1, 2):
        gate.observe(one, np.array([8]), np.array([8]))
        p = 0.5 - 0.01 * z  # all groups so far were all right: above the target
        assert gate.explore["easy"] == pytest.approx(p)
        assert gate.explore["hard"] == pytest.approx(0.5 + 0.01 * z)
        generator = np.random.default_rng(0)
        kept = np.mean([len(gate.choose(one, 1, 8, generator)) for _ in range(4000)])
        assert kept == pytest.approx(p**z, abs=0.025)
    gate.observe(one, np.array([3]), np.array([8]))
    assert len(gate.choose(one, 1, 8, np.random.default_rng(0))) == 1  # a signal: its row is over
    for _ in range(200):
        gate.observe(one, np.array([0]), np.array([8]))
    assert gate.explore["hard"] == Greso.LOWEST


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 4), st.integers(0, 12))
def test_allocation_keeps_total_bounds_and_order(seed: int, prompts: int, least: int, room: int) -> None:
    generator = np.random.default_rng(seed)
    most = least + room
    total = int(generator.integers(least * prompts, most * prompts + 1))
    weight = generator.random(prompts) * (generator.random(prompts) < 0.7)
    found = allocate(weight, total, least, most)
    assert found.sum() == total
    assert found.min() >= least
    assert found.max() <= most
    for a in range(prompts):
        for b in range(prompts):
            if weight[a] > weight[b]:
                assert found[a] >= found[b]


def test_allocation_in_proportion() -> None:
    assert allocate(np.array([1.0, 2.0, 5.0]), 16, 0, 16).tolist() == [2, 4, 10]
    assert allocate(np.array([0.0, 0.0]), 7, 1, 8).tolist() == [4, 3]
    with pytest.raises(ReinforcementError, match="2 to 4"):
        allocate(np.ones(3), 13, 2, 4)
    with pytest.raises(ReinforcementError, match="not negative"):
        allocate(np.array([1.0, -1.0]), 4, 1, 4)


def test_best_and_accepted_outputs() -> None:
    reward, group = np.array([0.0, 1.0, 1.0, 0.0, 0.0, 0.5]), np.array([0, 0, 0, 1, 1, 1])
    outputs = [b"a", b"b", b"b", b"c", b"d", b"e"]
    assert best_of(reward, group).tolist() == [1, 5]
    for keep, found in (("all", [1, 2]), ("distinct", [1]), ("best", [1])):
        assert accepted(reward, group, 1.0, keep, outputs).tolist() == found
    assert accepted(reward, group, 0.5, "best", outputs).tolist() == [1, 5]
    with pytest.raises(ReinforcementError, match="one of all, distinct, best"):
        accepted(reward, group, 1.0, "some", outputs)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["entropy", "advantage_surprise", "random"]), st.floats(0.05, 1.0))
def test_kept_tokens_are_the_highest_of_outputs_with_an_advantage(seed: int, kind: str, fraction: float) -> None:
    generator = np.random.default_rng(seed)
    mask = np.arange(6) < generator.integers(1, 7, size=5)[:, None]
    advantage = generator.choice([-1.0, 0.0, 2.0], size=5)
    logp, entropy = -generator.random((5, 6)), generator.random((5, 6))
    kept = kept_tokens(kind, fraction, mask, advantage, logp, entropy, generator)
    live = mask & (advantage != 0)[:, None]
    assert not (kept & ~live).any()
    count = int(live.sum())
    assert kept.sum() == (0 if not count else max(1, round(fraction * count)))
    if kind != "random" and kept.any() and (live & ~kept).any():
        score = entropy if kind == "entropy" else np.abs(advantage)[:, None] * -logp
        assert score[kept].min() >= score[live & ~kept].max()


def test_settings_out_of_range_are_refused() -> None:
    for make, says in (
        (lambda: PromptGateConfig(kind="best"), "one of none, random"),
        (lambda: PromptGateConfig(keep_fraction=0), "keep_fraction = 0"),
        (lambda: PromptGateConfig(explore=2), "explore = 2"),
        (lambda: TokenGateConfig(keep_fraction=1.5), "keep_fraction = 1.5"),
        (lambda: TokenGateConfig(kind="long"), "one of none, entropy"),
    ):
        with pytest.raises(ReinforcementError, match=says):
            make()
