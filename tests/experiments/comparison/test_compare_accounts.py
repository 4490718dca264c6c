"""Joules by layer out of deployment records: as recorded, or priced again and checked against the stated sum."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experiments.comparison.accounts import LayerEnergy, folded, joules, layer_energies, token_times, utilisation
from experiments.views.layer_figure import layer_figure

TOKENS = 100
SYNOP_PJ, ACTIVE_PJ, INACTIVE_PJ, MESSAGE_PJ = 23.6, 81.0, 52.0, 8.7  # Davies et al. 2018


def layer(name: str, synops: float, **changes: Any) -> dict[str, Any]:
    return {
        "layer": name,
        "weight_bytes": 64,
        "graded": True,
        "payload_bits": 8,
        "host": False,
        "synops_per_token": synops,
        "events_per_token": 4.0,
        "neuron_updates_active_per_token": 2.0,
        "neuron_updates_inactive_per_token": 6.0,
        "dense_macs_per_token": 64.0,
    } | changes


def by_hand(synops: float) -> float:
    return 1e-12 * (synops * SYNOP_PJ + 2 * ACTIVE_PJ + 6 * INACTIVE_PJ + 4 * MESSAGE_PJ)


def record(**changes: Any) -> dict[str, Any]:
    mid = by_hand(16) + by_hand(40)
    energy = {"profile": "loihi1_davies2018", "kind": "modelled", "mid_j": mid, "tokens": TOKENS, "lower_bound": True}
    layers = [layer("a.q", 16.0), layer("a.k", 40.0), layer("host", 0.0, host=True)]
    return {"energy": [energy | {"labels": ["hypothetical: binary"]} | changes], "layers": layers, "val_tokens": TOKENS}


def test_two_layers_by_hand() -> None:
    (found,), missing = layer_energies(record())
    assert missing == []
    assert found.origin == "priced again from the counts"
    assert found.of("a.q")[1] == pytest.approx(by_hand(16))
    assert found.of("a.k")[1] == pytest.approx(by_hand(40))
    assert found.layers["a.k"]["synapse"][1] == pytest.approx(40 * SYNOP_PJ * 1e-12)
    assert found.groups == ["synapse", "neuron", "traffic"]
    assert set(found.layers) == {"a.q", "a.k"}
    assert found.hypothetical
    low, mid, high = found.total
    assert low < mid < high


def test_a_sum_that_is_not_the_records_is_not_shown() -> None:
    found, (reason,) = layer_energies(record(mid_j=1e-9))
    assert found == []
    assert "loihi1_davies2018: no joules by layer" in reason
    assert "the record says 1e-09" in reason
    found, (reason,) = layer_energies(record(profile="no_such_profile"))
    assert found == []
    assert "no_such_profile" in reason
    bare = record() | {"layers": []}
    assert layer_energies(bare)[1] == ["loihi1_davies2018: no joules by layer, the record has no counts by layer"]


def test_recorded_joules_are_taken_as_they_are() -> None:
    layers = {"x": {"synapse": [1.0, 2.0, 3.0], "static": [0.5, 0.5, 0.5]}}
    (found,), _ = layer_energies(record(by_layer=layers, mid_j=None))
    assert found.origin == "recorded"
    assert found.total == (1.5, 2.5, 3.5)
    assert found.groups == ["synapse", "static"]


def test_folding_joins_layers_and_keeps_the_sum() -> None:
    layers = {
        f"blocks.{i}.{part}": {"synapse": (1.0, 2.0 + i, 9.0)} for i in range(8) for part in ("attn.q", "attn.k", "mlp")
    }
    whole = LayerEnergy("p", "modelled", False, False, {**layers, "head": {"neuron": (1.0, 1.0, 1.0)}}, "recorded")
    few = folded(whole, 20)
    assert len(few.layers) <= 20
    assert few.total == pytest.approx(whole.total)
    assert few.layers["blocks.3.attn"]["synapse"] == (2.0, 10.0, 18.0)
    assert folded(whole, 1).total == pytest.approx(whole.total)


def test_the_figure_has_a_panel_per_profile_with_bars_that_add_up() -> None:
    (found,), _ = layer_energies(record())
    picture = layer_figure([found, found], "where each joule goes")
    shown = [ax for ax in picture.axes if ax.axison]
    assert len(shown) == 2
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["a.q", "a.k"]
    widths = [patch.get_width() for patch in shown[0].patches]
    assert math.fsum(widths) == pytest.approx(found.total[1] / 1e-9, rel=1e-6)  # nJ
    assert "at least" in shown[0].get_title(loc="left")
    assert layer_figure([], "nothing").axes == []


def test_cores_and_times_are_absent_where_they_were_not_recorded() -> None:
    assert utilisation(record()) is None
    assert utilisation({"placement": None}) is None
    assert token_times(record()) == []
    cores = [{"share": 0.2}, {"share": 0.6}]
    placed = {"placement": {"chip": "loihi1", "budget": "nxtf", "chips": 2, "cores_per_chip": 128, "cores": cores}}
    found = utilisation(placed)
    assert found is not None
    assert (found.cores, found.available, found.mean_share, found.highest_share) == (2, 256, pytest.approx(0.4), 0.6)


@pytest.mark.parametrize(("value", "text"), [(9.996e-7, "1 uJ"), (1.234e-6, "1.23 uJ"), (5e-10, "500 pJ"), (4000, "4 kJ")])
def test_joules_in_words(value: float, text: str) -> None:
    assert joules(value) == text
