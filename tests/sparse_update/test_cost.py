"""Counted FLOPs against torch's own counter, and the clock of reference seconds."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.backward import sparse_step
from sparse_update.cost import (
    ComponentTimes,
    ComponentTimesError,
    StepKind,
    measure_components,
    step_flops,
)
from sparse_update.gate import GateConfig
from sparse_update.optimizer import OptimConfig
from sparse_update.subset import SubsetConfig, choose
from sparse_update.transformer import ModelConfig, Transformer, token_loss

SMALL = {"width": 16, "layers": 3, "heads": 2, "context": 12, "vocab_size": 23, "attention": "explicit"}


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def setup(**kw):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, **kw}))
    tokens = torch.randint(0, 23, (4, 13))
    return model, tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("tie", [False, True])
def test_dense_step_equals_torchs_counter(tie):
    model, x, y = setup(tie_embeddings=tie)
    flops = step_flops(model.cfg, 4)
    assert counted(lambda: model(x)) == flops.forward
    assert counted(lambda: token_loss(model(x), y).mean().backward()) == flops.total


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_row_compacted_step_equals_torchs_counter(rows):
    model, x, y = setup()
    kept = torch.arange(rows).expand(4, rows)
    assert counted(lambda: sparse_step(model, x, y, lambda _: kept)) == step_flops(model.cfg, 4, rows=rows).total


@pytest.mark.parametrize(
    "subset",
    [
        SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4),
        SubsetConfig(kind="layers", active_fraction=0.34),
        SubsetConfig(kind="layers", active_fraction=0.34, train_embeddings=False),
    ],
)
@pytest.mark.parametrize("turn", [0, 2])
def test_subset_step_equals_torchs_counter(subset, turn):
    model, x, y = setup()
    active = choose(model, subset, turn, seed=0)
    expected = step_flops(model.cfg, 4, active=active)
    assert counted(lambda: sparse_step(model, x, y, active=active)) == expected.total
    assert expected.total < step_flops(model.cfg, 4).total


def table(**ms):
    return ComponentTimes(
        {"forward": 3.0, "backward_dx": 4.0, "backward_dw": 2.0, "optimizer": 1.0, **ms},
        {},
        "explicit",
        "fp32",
        False,
        4,
        {},
        {},
    )


def test_reference_seconds_are_components_times_uses():
    dense = StepKind.of(GateConfig(), SubsetConfig())
    assert table().step_s(dense) == pytest.approx(0.010)
    assert table(ngram_window=0.5).step_s(dense, windows_scored=6) == pytest.approx(0.013)
    rows = StepKind.of(GateConfig(unit="token", signal="random", keep_fraction=0.5), SubsetConfig())
    assert table(**{rows.key: 6.0}).step_s(rows) == pytest.approx(0.006)


def test_a_component_that_was_not_measured_is_never_free():
    rows = StepKind.of(GateConfig(unit="token", signal="random", keep_fraction=0.5), SubsetConfig())
    with pytest.raises(ComponentTimesError, match="no entry"):
        table().step_s(rows)
    with pytest.raises(ComponentTimesError, match="ngram_window"):
        table().step_s(StepKind.of(GateConfig(), SubsetConfig()), windows_scored=1)


def test_a_table_of_another_model_is_refused(tmp_path):
    cfg = ModelConfig(**SMALL)
    optim = OptimConfig()
    rows = StepKind.of(GateConfig(unit="token", signal="token_loss", keep_fraction=0.5), SubsetConfig())
    blocks = StepKind.of(GateConfig(), SubsetConfig(kind="blocks", active_fraction=0.5))
    ngram = StepKind.of(GateConfig(unit="sequence", signal="ngram", keep_fraction=0.5, pool_windows=8), SubsetConfig())
    times = measure_components(cfg, 4, [rows, blocks, ngram], optim, torch.device("cpu"), "fp32", rounds=3)
    assert set(times.ms) == {
        "forward", "backward_dx", "backward_dw", "optimizer", "ngram_window", rows.key, blocks.key
    }  # fmt: skip
    assert all(ms >= 0 for ms in times.ms.values())
    times.check(cfg, 4, optim)
    times.save(tmp_path / "times.json")
    again = ComponentTimes.load(tmp_path / "times.json")
    assert again == times
    assert again.sha256 == times.sha256
    with pytest.raises(ComponentTimesError, match="measure again"):
        times.check(ModelConfig(**{**SMALL, "width": 32}), 4, optim)
    with pytest.raises(ComponentTimesError, match="muon"):
        times.check(cfg, 4, OptimConfig(name="muon"))
    with pytest.raises(ComponentTimesError, match="batch 8"):
        times.check(cfg, 8, optim)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"schema": 99}), json.dumps({"schema": 1, "ms": {}})])
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
    busy = ComponentTimes(quiet.ms, {"forward": 0.1, "backward_dx": 0.8}, "explicit", "fp32", False, 4, {}, {})
    assert busy.unsteady == 0.8
