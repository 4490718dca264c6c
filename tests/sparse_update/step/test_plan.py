"""Plans: what tells them apart, what they refuse; draws: fixed size, right probabilities, no bias."""

from __future__ import annotations

import pytest
import torch

from sparse_update.step.draw import draw, inclusion
from sparse_update.step.plan import PLAIN, StepPlan


def test_keys_tell_costs_apart_and_nothing_else():
    assert PLAIN.plain
    assert PLAIN.key == "plain"
    assert StepPlan(bypass_first=2, bypass_keys=True, rows_exact=True).plain  # no bypass, no rows: no effect
    assert not StepPlan(want=frozenset({"entropy"})).plain
    plans = [
        StepPlan(rows=4),
        StepPlan(rows=4, rows_exact=True),
        StepPlan(sequences=4),
        StepPlan(bypass=4),
        StepPlan(bypass=4, bypass_keys=True),
        StepPlan(bypass=4, bypass_first=2),
        StepPlan(dw_rows=0.5),
        StepPlan(sample=(0.5, 0.5)),
        StepPlan(sample=(0.25, 0.5)),
        StepPlan(skip_rate=0.5),
        StepPlan(want=frozenset({"update", "entropy"})),
    ]
    assert len({plan.key for plan in plans}) == len(plans) == len(set(plans))


def test_middle_layers_and_kept_sequences():
    assert list(StepPlan(bypass=4).middle(6)) == [1, 2, 3, 4]
    assert list(StepPlan(bypass=4, bypass_first=2, bypass_stop=0).middle(4)) == [2, 3]
    assert not PLAIN.middle(6)
    assert StepPlan(sample=(0.25, 0.5), sequences=8).kept_sequences(32) == [2, 4, 8]
    assert PLAIN.kept_sequences(32) == [32]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": -1}, "plan.rows = -1"),
        ({"dw_rows": 0.0}, "plan.dw_rows = 0"),
        ({"dw_rows": 1.5}, "plan.dw_rows = 1.5"),
        ({"sample": (0.5, 0.0)}, "plan.sample"),
        ({"sample": (0.9, 0.5)}, "must not fall"),
        ({"skip_rate": 1.0}, "plan.skip_rate"),
        ({"want": frozenset({"mood"})}, "mood"),
        ({"bypass_stop": 1}, "plan.bypass_stop"),
        ({"bypass": 4, "bypass_keys": True, "rows": 3}, "bypass_keys"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StepPlan(**values)


MASSES = [
    torch.ones(7),
    torch.arange(9.0),
    torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0]),
    torch.zeros(6),
    torch.tensor([5.0, 0.0, 5.0, 1e-12]),
]


@pytest.mark.parametrize("mass", MASSES, ids=str)
def test_inclusion_probabilities_sum_to_the_count_and_follow_the_mass(mass):
    for count in range(1, len(mass) + 1):
        p = inclusion(mass, count)
        assert p.sum().item() == pytest.approx(count, rel=1e-12)
        assert ((p > 0) & (p <= 1)).all()
        free = p < 1
        floor = mass.double() + 0.1 * mass.double().mean() + torch.finfo(torch.float64).tiny
        ratio = (p / floor)[free]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_draws_have_the_fixed_size_and_the_probabilities_that_they_say():
    mass = torch.tensor([8.0, 0.0, 1.0, 3.0, 2.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    seen, rounds = torch.zeros(6, dtype=torch.float64), 20_000
    p = inclusion(mass, 3)
    for _ in range(rounds // 10):
        index, inverse = draw(mass, 3, generator)
        assert len(index) == 3
        assert index.tolist() == sorted(set(index.tolist()))
        torch.testing.assert_close(inverse, 1 / p[index])
        seen[index] += 1
    share = seen / (rounds // 10)
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / (rounds // 10)).sqrt() + 1e-12).all()


def test_a_draw_repeats_from_its_generator_and_may_take_everything():
    mass = torch.rand(12)
    first, second = (draw(mass, 5, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    index, inverse = draw(mass, 12)
    assert index.tolist() == list(range(12))
    assert torch.equal(inverse, torch.ones(12, dtype=torch.float64))
