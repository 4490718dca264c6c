"""The shipped table: budgets follow from settings alone, scale as the work does; no gate looks cheaper than measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.clock.component import SCORING_FORWARD, WATCHED_STEP, Component
from sparse_update.clock.cost import ComponentTimes, ComponentTimesError, Step
from sparse_update.clock.shipped import read_table, shipped_table
from sparse_update.clock.work import COUNTS, kinds, updated, work_of
from sparse_update.step.plan import PLAIN, StepPlan
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, Subset, SubsetConfig

CPU = torch.device("cpu")
SMALL = {"width": 16, "layers": 3, "heads": 2, "context": 12, "vocab_size": 23}
MUON = OptimConfig(name="muon")
models = st.builds(
    lambda heads, pairs, layers, context, vocab: ModelConfig(
        width=2 * heads * pairs, layers=layers, heads=heads, context=context, vocab_size=vocab
    ),
    st.integers(1, 4),
    st.integers(1, 16),
    st.integers(1, 6),
    st.integers(2, 256),
    st.integers(2, 3000),
)


def times_of(cfg=None, batch=4, compiled=False):
    return shipped_table().times(cfg or ModelConfig(**SMALL), MUON, batch, CPU, "auto", compiled)


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 64), st.integers(1, 1000), st.integers(1, 1000))
def test_reference_seconds_are_the_sum_of_components_and_linear_in_tokens(cfg, batch, few, more):
    times = times_of(cfg, batch)
    assert times.dense_ms == pytest.approx(sum(times.ms[name] for name in COUNTS))
    assert times.seconds({"dense": few + more}) == pytest.approx(
        times.seconds({"dense": few}) + times.seconds({"dense": more})
    )
    assert times.seconds({"dense": few}) == pytest.approx(few * times.dense_ms / 1000)
    # of the parts that grow with the batch, one more window costs the same wherever it is added
    whole = [times_of(cfg, batch * n).dense_ms for n in (1, 2, 3)]
    assert whole[2] - whole[1] == pytest.approx(whole[1] - whole[0], rel=1e-9)
    assert 0 < whole[1] - whole[0] <= whole[0] * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(models, st.integers(2, 32))
def test_every_price_times_its_count_is_in_the_step(cfg, batch):
    table, step = shipped_table(), Step(PLAIN, None, batch, cfg.context)
    work = work_of(cfg, step, MUON)
    by_hand = sum(table.prices_ps[name] * count for name, count in work.items()) * 1e-12
    assert table.work_s(cfg, step, MUON) == pytest.approx(by_hand)
    parts = table.step_s(cfg, MUON, step, "eager")
    assert sum(parts.values()) == pytest.approx(by_hand * table.factors["eager"]["plain"])
    assert all(value > 0 for value in parts.values())


def test_the_counts_are_those_of_the_model():
    cfg = ModelConfig(**SMALL)
    model = Transformer(cfg)
    assert sum(a * b for _, (a, b), _ in updated(cfg, None)) == sum(p.numel() for p in model.parameters())
    everything = Active.everything(model)
    assert sorted(updated(cfg, everything)) == sorted(updated(cfg, None))
    work = work_of(cfg, Step(PLAIN, None, 4, 12), MUON)
    assert work["forward_scores"] == work["backward_scores"] == 3 * 4 * 2 * 12 * 12
    assert work["forward_logits"] == 4 * 12 * 23
    inner = 3 * (4 * 16 * 16 + 2 * 16 * 64)
    assert work["muon_elements"] == inner
    assert work["adamw_elements"] == 2 * 23 * 16 + 7 * 16
    square, wide = 4 * 16**3 + 2 * 16**3, 4 * 16 * 16 * 64 + 2 * 16**3
    assert work["muon_flops"] == 3 * 5 * (4 * square + 2 * wide)
    rows = work_of(cfg, Step(StepPlan(rows=6), None, 4, 12), MUON)
    assert rows["backward_logits"] == work["backward_logits"] / 2
    assert rows["forward_flops"] == work["forward_flops"]


@pytest.mark.parametrize(
    ("plan", "found"),
    [
        (PLAIN, ()),
        (StepPlan(rows=6), ("rows",)),
        (StepPlan(rows=6, rows_exact=True), ("rows_exact",)),
        (StepPlan(bypass=6), ("bypass",)),
        (StepPlan(bypass=6, bypass_keys=True), ("bypass_keys",)),
        (StepPlan(sequences=2, dw_rows=0.5), ("sequences", "dw_rows")),
        (StepPlan(want=frozenset({"entropy"})), ("want",)),
        (StepPlan(sample=(0.5, 0.75, 1.0)), ("sample",)),
        (StepPlan(skip_rate=0.5), ("skip_rate",)),
        (StepPlan(bag=2), ("bag",)),
    ],
)
def test_kinds_of_steps_have_a_factor_each(plan, found):
    cfg = ModelConfig(**SMALL)
    assert kinds(cfg, Step(plan, None, 4, 12)) == found
    assert set(found) <= set(shipped_table().factors["eager"])


@pytest.mark.parametrize(
    ("subset", "found"),
    [
        (SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4), ("strips",)),
        (SubsetConfig(kind="block_columns", active_fraction=0.25, block_rows=4), ("columns",)),
        (SubsetConfig(kind="layers", active_fraction=0.34), ("layers",)),
        (SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4, inactive="sign"), ("signs",)),
    ],
)
def test_subsets_of_the_weights_have_a_factor_each(subset, found):
    cfg = ModelConfig(**SMALL)
    step = Step(PLAIN, Subset(Transformer(cfg), subset, 0).active, 4, 12)
    assert kinds(cfg, step) == found
    priced = sum(shipped_table().step_s(cfg, MUON, step, "eager").values())
    whole = sum(shipped_table().step_s(cfg, MUON, Step(PLAIN, None, 4, 12), "eager", engine=True).values())
    if found != ("signs",):  # those form the whole gradient and move it in more pieces
        assert 0 < priced < whole * shipped_table().factors["eager"][found[0]]


def test_no_kind_of_step_looks_cheaper_than_it_was_measured_to_be():
    """`about.check` holds the measured ratios to the plain step; the prices are recomputed here."""
    from experiments.benches.clock import steps
    from experiments.benches.gate import load_model

    table, seen = shipped_table(), set()
    for model, vocab, batch, which in {(m, v, b, w) for m, v, b, w, *_ in table.about["check"]}:
        cfg = load_model(model, vocab)
        measured = {row[4]: row[5] for row in table.about["check"] if row[:4] == [model, vocab, batch, which]}
        priced = {
            timed.name: sum(table.step_s(cfg, timed.optim, timed.step, "eager", timed.name == "engine").values())
            for timed in steps(cfg, batch, which, "explicit", compiled=False)
        }
        for name, ratio in measured.items():
            if name == "plain" or name.startswith("plain_"):
                continue
            seen.add(name)
            assert priced[name] / priced["plain"] > 0.985 * ratio, (model, batch, name)
            assert priced[name] / priced["plain"] < 1.35 * ratio, (model, batch, name)
    assert {"rows", "sequences", "bypass", "strips", "layers", "bag_2", "mask_agreement"} <= seen


def test_a_table_of_one_run_is_the_shipped_tables_clock(tmp_path):
    times = times_of()
    assert times.sha256 == shipped_table().sha256 == times_of(batch=8).sha256
    assert (times.attention, times.precision, times.variant) == ("explicit", "fp32", "autograd")
    assert times.busy == ""
    assert times.warnings == []
    assert "x86_1_thread" in times.source
    times.save(tmp_path / "times.json")
    assert ComponentTimes.load(tmp_path / "times.json") == times


def test_what_the_table_has_no_price_for_is_left_to_be_measured_and_said():
    cfg, times = ModelConfig(**SMALL), times_of()
    rows = Step(StepPlan(rows=6), None, 4, 12)
    never = Component(5, lambda: lambda: None)
    components = {
        "signal[ngram]": Component(10, never.make, 10 * 12 * 17),
        SCORING_FORWARD: Component(64, never.make),
        WATCHED_STEP: Component(1, never.make),
        "signal[mine]": never,
    }
    more = shipped_table().extended(times, cfg, MUON, [rows], components)
    assert set(more.ms) - set(times.ms) == {rows.key, "signal[ngram]", SCORING_FORWARD, WATCHED_STEP}
    assert more.ms_of("signal[ngram]") == pytest.approx(1e-9 * shipped_table().components_ps["signal[ngram]"] * 12 * 17)
    assert 0 < more.ms_of(SCORING_FORWARD) < times.dense_ms
    assert more.sha256 == times.sha256
    assert more.warnings == []
    measured = more.extended({"signal[mine]": 1.0}, 10.0)
    assert measured.sha256 == times.sha256
    assert "no price for signal[mine]" in measured.warnings[0]
    other = replace(times, shipped_sha256="0" * 64)
    with pytest.raises(ComponentTimesError, match="go on with the version"):
        shipped_table().extended(other, cfg, MUON, [rows], {})


def test_a_run_on_a_gpu_says_that_the_prices_are_a_cpus():
    assert "measured on a CPU" in replace(times_of(), machine={"device": "cuda"}).warnings[0]


def test_broken_and_unknown_tables_are_named(tmp_path):
    with pytest.raises(ComponentTimesError, match="no shipped table 'mine'"):
        shipped_table("mine")
    path = tmp_path / "t.json"
    for text in ("", "[]", "{}", json.dumps({"schema": 9}), json.dumps({"schema": 1, "name": "t"})):
        path.write_text(text)
        with pytest.raises(ComponentTimesError, match=r"t\.json"):
            read_table(path)
    with pytest.raises(ComponentTimesError, match="no such"):
        read_table(tmp_path / "none.json")
