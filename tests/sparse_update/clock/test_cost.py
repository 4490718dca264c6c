"""The clock of reference seconds: components times uses, extended without moving what was there."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_update.clock.component import Component
from sparse_update.clock.cost import (
    ComponentTimes,
    ComponentTimesError,
    Step,
    identity,
    locked,
    optimizer_tag,
    tagged_optimizer,
)
from sparse_update.clock.timing import extend, measure
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Subset, SubsetConfig

SMALL = {"width": 16, "layers": 3, "heads": 2, "context": 12, "vocab_size": 23, "attention": "explicit"}
CPU = torch.device("cpu")


def table(**ms):
    own = {"forward": 3.0, "backward_dx": 4.0, "backward_dw": 2.0, "optimizer": 1.0, **ms}
    model = identity(ModelConfig(**SMALL), OptimConfig())
    return ComponentTimes(own, {}, "explicit", "fp32", "autograd", False, 4, model, {})


def test_reference_seconds_are_components_times_uses():
    rows = Step(StepPlan(rows=6), None, 4, 12)
    times = table(**{"signal[ngram]": 0.5, rows.key: 6.0})
    assert times.key(Step(PLAIN, None, 4, 12)) == "dense"
    assert times.seconds({"dense": 2, "signal[ngram]": 6, rows.key: 3}) == pytest.approx(0.020 + 0.003 + 0.018)


def test_a_component_that_was_not_measured_is_never_free():
    with pytest.raises(ComponentTimesError, match=r"no entry 'step\[rows=6"):
        table().seconds({Step(StepPlan(rows=6), None, 4, 12).key: 1})
    with pytest.raises(ComponentTimesError, match="signal"):
        table().seconds({"signal[ngram]": 1})


def test_keys_tell_batches_lengths_plans_and_weights_apart():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL))
    half = Subset(model, SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4), 0).active
    steps = [
        Step(plan, active, batch, length)
        for plan in (PLAIN, StepPlan(rows=6), StepPlan(rows=6, rows_exact=True))
        for active in (None, half)
        for batch, length in ((4, 12), (8, 12), (8, 6))
    ]
    assert len({table().key(step) for step in steps}) == len(steps)


def test_a_table_is_measured_kept_and_refused_for_another_model(tmp_path):
    cfg, optim = ModelConfig(**SMALL), OptimConfig()
    times = measure(cfg, optim, CPU, 4, "fp32", rounds=3)
    assert set(times.ms) == {"forward", "backward_dx", "backward_dw", "optimizer"}
    assert times.variant in ("autograd", "engine")
    assert all(ms >= 0 for ms in times.ms.values())
    times.check(cfg, optim)
    times.save(tmp_path / "times.json")
    again = ComponentTimes.load(tmp_path / "times.json")
    assert again == times
    assert again.sha256 == times.sha256
    with pytest.raises(ComponentTimesError, match="measure again"):
        times.check(ModelConfig(**{**SMALL, "width": 32}), optim)


def test_another_optimizers_plain_step_is_an_entry_of_its_own():
    cfg, times = ModelConfig(**SMALL), table()
    times.check(cfg, OptimConfig(name="muon"))
    own, other = (Step(PLAIN, None, times.batch, cfg.context, tag) for tag in ("", "muon"))
    assert times.dense_key(own)
    assert not times.dense_key(other)
    with pytest.raises(ComponentTimesError, match="o=muon"):
        times.ms_of(times.key(other))
    torch.manual_seed(0)
    half = Subset(Transformer(cfg), SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4), 0).active
    strips = Step(PLAIN, half, times.batch, cfg.context, "muon")
    found = extend(times, cfg, OptimConfig(name="muon"), CPU, [other, strips, strips], {}, rounds=3)
    assert found.ms_of(times.key(other)) > 0
    assert found.ms_of(times.key(strips)) > 0
    assert found.sha256 == times.sha256


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(name="galore", galore_rank=3, galore_every_steps=7)])
def test_an_optimizers_tag_gives_it_back(optim):
    assert tagged_optimizer(optimizer_tag(optim)) == optim


def test_what_is_missing_is_measured_beside_the_plain_step_and_scaled(tmp_path):
    cfg, optim = ModelConfig(**SMALL), OptimConfig()
    times = table()
    used = []
    steps = [Step(PLAIN, None, 4, 12), Step(StepPlan(rows=6), None, 4, 12), Step(PLAIN, None, 8, 6)]
    more = extend(times, cfg, optim, CPU, steps, {"signal[mine]": Component(5, lambda: lambda: used.append(1))}, rounds=3)
    new = {steps[1].key, steps[2].key, "signal[mine]"}
    assert set(more.ms) - set(times.ms) == new == set(more.extensions)
    for key in new:
        note = more.extensions[key]
        assert more.ms[key] == pytest.approx(note["measured_ms"] * note["scaled_by"])
        assert note["scaled_by"] == pytest.approx(times.dense_ms / note["dense_ms"])
    assert len(used) == 5  # three rounds and two that warm up
    assert more.sha256 == times.sha256
    assert extend(more, cfg, optim, CPU, steps, {}) is more
    more.save(tmp_path / "t.json")
    assert ComponentTimes.load(tmp_path / "t.json").sha256 == times.sha256
    assert times.merged(more).ms == more.ms


def test_a_changed_table_has_another_hash():
    assert table().sha256 != table(forward=3.5).sha256
    assert table().sha256 != table(**{"signal[ngram]": 0.5}).sha256


def test_a_shared_table_is_held_by_one_at_a_time(tmp_path):
    import fcntl

    path = tmp_path / "times.json"
    with locked(path), (tmp_path / ".times.json.lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", json.dumps({"schema": 1}), json.dumps({"schema": 99}), json.dumps({"schema": 2, "ms": {}})],
)
def test_a_broken_table_is_named(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(ComponentTimesError, match=r"times\.json"):
        ComponentTimes.load(path)
    with pytest.raises(ComponentTimesError, match="no such table"):
        ComponentTimes.load(tmp_path / "missing.json")


def test_a_busy_machine_is_noticed():
    quiet = table()
    assert quiet.unsteady is None
    busy = ComponentTimes(quiet.ms, {"forward": 0.1, "backward_dx": 0.8}, "explicit", "fp32", "autograd", False, 4, {}, {})
    assert busy.unsteady == 0.8
