"""Sampling on the clock: its components have prices of the shipped table, whose own prices and hash stay."""

from __future__ import annotations

import pytest
import torch

from sparse_update.clock.cost import ComponentTimes
from sparse_update.clock.running import RunClock
from sparse_update.clock.shipped import added_factors, shipped_table
from sparse_update.clock.work import ALL
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.generation.uses import read_key, row_key
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig


def test_a_run_is_charged_for_what_it_samples():
    torch.manual_seed(0)
    cfg = ModelConfig(width=32, layers=2, heads=2, context=64, vocab_size=40)
    sampler = Sampler(Transformer(cfg), GenerateConfig(new_tokens=5, n=2))
    table = shipped_table()
    times = table.times(cfg, OptimConfig(), 4, torch.device("cpu"), "fp32", False)

    def extend(found, steps, components) -> ComponentTimes:
        return table.extended(found, cfg, OptimConfig(), steps, components)

    clock = RunClock(times, OptimConfig(), lambda: None, 4, extend)
    clock.add(sampler.components, sampler)
    assert clock.reference_s == 0
    sampler.sample([[1, 2, 3], [4]])
    assert dict(sampler.uses) == {read_key(3): 2, row_key(8): 16}  # the first token comes with the prompt
    used = clock.reference_s
    kinds = added_factors()
    by_hand = sum(
        count
        * 1e-12
        * kinds[component.kind]
        * sum(table.prices_ps[name] * value for name, value in component.work.items())
        / component.uses
        for key, component in sampler.components().items()
        for count in [sampler.uses[key]]
    )
    assert used == pytest.approx(by_hand)
    assert all(set(component.work) <= set(ALL) for component in sampler.components().values())
    assert clock.times.sha256 == times.sha256 == table.sha256
    assert clock.times.measured_here == []
    assert {key: clock.times.ms[key] for key in times.ms} == times.ms
    sampler.sample([[1, 2, 3], [4]])
    assert clock.reference_s == pytest.approx(2 * used)

    other = Sampler(sampler.model, sampler.cfg)
    other.load_state_dict(sampler.state_dict())
    assert other.uses == sampler.uses
    for component in other.components().values():  # a table measured here times a use
        component.make()()


def test_added_factors_are_not_of_the_table():
    assert set(added_factors()) & set(shipped_table().factors["eager"]) == set()
