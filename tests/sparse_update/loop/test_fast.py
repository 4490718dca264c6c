"""What `trainer=fast` chooses: by the budget alone, and only what was left open."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig, check_growth
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.fast import GROWS_BELOW, GROWS_UNTIL, LENGTHS_BELOW, choose, parameters
from sparse_update.loop.records import TrainerConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

MODEL = ModelConfig(width=16, layers=3, heads=2, context=64, vocab_size=64)
STEP_S, BATCH = 0.1, 8


def budget(tokens_per_parameter, **kw):
    """Settings whose budget buys so many tokens of plain training for each parameter."""
    tokens = tokens_per_parameter * sum(p.numel() for p in Transformer(MODEL).parameters())
    steps = tokens / (BATCH * MODEL.context)
    return TrainerConfig(budget_reference_s=steps * STEP_S, batch_windows=BATCH, fast=True, **kw)


def chosen(cfg, arm=None, model=MODEL, **kw):
    arm, cfg, choices = choose(arm or Arm(), cfg, model, STEP_S, **kw)
    return arm, cfg, {choice.part: choice for choice in choices}


def test_parameters_are_counted_without_making_them():
    for model in (MODEL, ModelConfig(width=32, layers=1, heads=4, context=16, vocab_size=256)):
        assert parameters(model) == sum(p.numel() for p in Transformer(model).parameters())


@given(ratio=st.floats(0.05, 200))
def test_the_model_grows_and_reads_short_sequences_below_the_bounds_and_nowhere_else(ratio):
    arm, cfg, found = chosen(budget(ratio))
    if ratio < 0.999 * LENGTHS_BELOW:
        assert cfg.length_schedule == "16@0.15,32@0.4"
    elif ratio > 1.001 * LENGTHS_BELOW:
        assert (cfg.length_schedule, f"{LENGTHS_BELOW:g}" in found["length_schedule"].why) == ("", True)
    numbers = found["growth"].record()
    assert numbers["tokens_per_parameter"] == pytest.approx(ratio)
    assert numbers["tokens"] / numbers["parameters"] == pytest.approx(ratio)
    if ratio < 0.999 * GROWS_BELOW:
        assert arm.optim.schedule == "wsd"
        assert (arm.growth.kind, arm.growth.start_layers, arm.growth.until) == ("depth", 1, GROWS_UNTIL)
    elif ratio > 1.001 * GROWS_BELOW:
        assert (arm.growth, arm.optim) == (GrowthConfig(), OptimConfig())
        assert f"{GROWS_BELOW:g}" in numbers["why"]
    assert arm.gate.unit == "auto"
    check_growth(arm.growth, MODEL.layers, arm.gate, arm.subset)


def test_what_is_set_stays_and_is_said_to_be_set():
    arm = Arm(GateConfig("mine", "sequence", "ngram", keep_fraction=0.7), growth=GrowthConfig("depth", "depth", until=0.8))
    got, cfg, found = chosen(budget(1, length_schedule="32@0.3"), arm)
    assert got == arm
    assert cfg.length_schedule == "32@0.3"
    assert {choice.why for choice in found.values()} == {"set by the user"}
    fixed = Arm(GateConfig("mine", "sequence", "ngram", keep_fraction=0.7))
    got, _, found = chosen(budget(1), fixed)
    assert got == fixed
    assert "gate.unit = sequence is set" in found["growth"].why
    options = Arm(GateConfig(pool_windows=64, ngram_bits=12))  # of the gate that is chosen
    assert (chosen(budget(50), options)[0].gate.pool_windows, chosen(budget(50), options)[0].gate.ngram_bits) == (64, 12)


@pytest.mark.parametrize(
    ("arm", "settings", "why"),
    [
        (Arm(), {"budget_offered_tokens": 10**6}, "the budget is one of tokens"),
        (Arm(subset=SubsetConfig(kind="blocks", active_fraction=0.5)), {}, "subset.kind = blocks"),
        (Arm(optim=OptimConfig(mask=MaskConfig(kind="random"))), {}, "optim.mask.kind = random"),
        (Arm(), {"bags": "2@0.3"}, "trainer.bags is set"),
    ],
)
def test_where_nothing_was_measured_nothing_is_chosen(arm, settings, why):
    got, cfg, found = chosen(budget(1, **settings), arm)
    assert (got, cfg.length_schedule) == (arm, "")
    assert all(why in choice.why for choice in found.values())


def test_models_and_starts_that_cannot_grow_do_not():
    assert (
        chosen(budget(1), model=ModelConfig(width=16, layers=1, heads=2, context=64, vocab_size=64))[0].growth.kind
        == "none"
    )
    arm, _, found = chosen(budget(1), from_weights=True)
    assert arm.growth.kind == "none"
    assert found["growth"].why == "it starts from weights"
    several, _, said = chosen(budget(1), processes=4)
    assert (several.gate.unit, several.growth.kind) == ("none", "depth")
    assert "several processes" in said["gate"].why
    assert arm.gate.unit == "auto"


def test_the_choice_is_settled_before_a_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"loop\.fast\.choose"):
        make_trainer(None, Arm(), TrainerConfig(fast=True), Text(None, {}), Prices(None), Place(tmp_path), 0)
    _, cfg, found = chosen(budget(1))
    assert not cfg.fast
    assert cfg.budget_reference_s == budget(1).budget_reference_s
    assert all(math.isfinite(value) for value in found["growth"].numbers.values())
