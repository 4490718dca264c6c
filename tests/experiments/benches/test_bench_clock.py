"""What `bench clock` writes down and `bench clock_fit` reads: ratios with intervals, on made-up times."""

from __future__ import annotations

import random
from typing import Any

import pytest

from experiments.benches import clock, clock_fit
from sparse_update.transformer import ModelConfig

CFG = ModelConfig(vocab_size=256, width=32, heads=2, layers=2, context=32)
SECONDS = {"plain": 1.0, "bag_2": 0.8, "bag_4": 0.75, "mask_random": 1.1, "mask_agreement": 1.2, "mask_surprise": 1.3}
SECONDS |= {f"vocabulary_1/{share}": 0.9 for share in (8, 2)}


@pytest.fixture
def document(monkeypatch: Any) -> dict[str, Any]:
    """Steps that take so long, with noise that doubles some rounds of all of them."""
    generator = random.Random(0)
    monkeypatch.setattr(clock, "step_probe", lambda setting, step, key: key)
    monkeypatch.setattr(clock, "cpu_seconds", lambda key: SECONDS[key] * generator.choice([0.99, 1.0, 1.0, 1.01, 2.0]))
    monkeypatch.setattr(clock_fit, "load_model", lambda name, vocab: CFG)
    found = clock.measure_setting(CFG, 2, clock.CHANGES, "explicit", False, 60.0, lambda text: None)
    key = {"model": "tiny", "vocab": 256, "batch": 2, "mode": "eager", "attention": "explicit", "which": clock.CHANGES}
    return {"settings": [{**key, **found}]}


def test_what_was_measured_is_read_again_with_its_interval(document: dict[str, Any]) -> None:
    found = {item.timed.name: item for item in clock_fit.read_measured(document)}
    assert found.keys() == SECONDS.keys()
    for name, seconds in SECONDS.items():
        assert found[name].ratio == pytest.approx(seconds, rel=0.03)
        assert found[name].ms == pytest.approx(1000 * seconds, rel=0.04)
        assert (found[name].half_width == 0) == (name == "plain")


def test_a_ratio_without_an_interval_is_refused_by_name(document: dict[str, Any]) -> None:
    document["settings"][0]["ratios"]["bag_4"]["low"] = None
    with pytest.raises(ValueError, match=r"tiny b2 v256, bag_4: too few rounds .* larger --limit-s"):
        list(clock_fit.read_measured(document))
