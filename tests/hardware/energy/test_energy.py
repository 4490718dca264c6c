"""Energy of a toy network worked out by hand, and the algebra that every report must obey."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import Counts, Quantity, UnitError, account, list_profiles, load_profile

ONE = Counts("one", 10, 1000, 10, 4, 6, 2000, 200, False, 1)
TWO = Counts("two", 10, 200, 5, 2, 3, 400, 40, False, 1)
HOST = Counts("head", 10, 0, 0, 0, 0, 600, 60, False, 0, host=True)


def test_two_layers_by_hand_on_loihi1() -> None:
    report = account([ONE, TWO], load_profile("loihi1_davies2018"))
    # pJ, middle. one: 1000 x 23.6 = 23600; 4 x 81 = 324; 6 x 52 = 312; 10 x 8.7 = 87
    #             two:  200 x 23.6 =  4720; 2 x 81 = 162; 3 x 52 = 156;  5 x 8.7 = 43.5
    by_hand = {
        ("one", "synapse"): 23600.0,
        ("one", "neuron_active"): 324.0,
        ("one", "neuron_inactive"): 312.0,
        ("one", "message"): 87.0,
        ("two", "synapse"): 4720.0,
        ("two", "neuron_active"): 162.0,
        ("two", "neuron_inactive"): 156.0,
        ("two", "message"): 43.5,
    }
    assert {(line.layer, line.term) for line in report.lines} == set(by_hand)
    for line in report.lines:
        assert line.mid_j == pytest.approx(by_hand[line.layer, line.term] * 1e-12)
    # sums: 24323 + 5081.5; low ends 21411.1606 + 4453.9403; high ends 42446.4468 + 9327.1734
    assert report.total_mid_j == pytest.approx(29404.5e-12)
    assert report.total_low_j == pytest.approx(25865.1009e-12)
    assert report.total_high_j == pytest.approx(51773.6202e-12)
    assert report.by_term()["synapse"][1] == pytest.approx(28320e-12)


def test_digital_reference_by_hand_prices_host_layers_too() -> None:
    report = account([ONE, TWO, HOST], load_profile("digital45_int8_sram"))
    # 3000 MACs x (0.3 + 2.5) pJ; low 0.23 + 1.25; high 0.3 + 12.5
    assert report.total_mid_j == pytest.approx(8400e-12)
    assert report.total_low_j == pytest.approx(4440e-12)
    assert report.total_high_j == pytest.approx(38400e-12)
    assert not any("host share" in entry for entry in report.unknown)
    fp32 = account([ONE], load_profile("digital45_fp32_sram"))
    assert fp32.total_mid_j == pytest.approx(2000 * 14.6e-12)
    dram = account([ONE], load_profile("digital45_int8_dram"))
    assert dram.total_low_j == pytest.approx(2000 * 162.73e-12)
    assert dram.total_high_j == pytest.approx(2000 * 325.3e-12)


def test_host_layers_are_named_not_costed_on_a_chip() -> None:
    profile = load_profile("loihi1_davies2018")
    with_host, without = account([ONE, TWO, HOST], profile), account([ONE, TWO], profile)
    assert with_host.total_mid_j == without.total_mid_j
    # 600 of 3000 MACs
    assert "host share: 600 MACs on the host are not costed (20.0 % of all MACs)" in with_host.unknown
    with pytest.raises(ValueError, match="prices nothing here: 1 of 1 layers run on the host"):
        account([HOST], profile)


def test_static_power_is_a_line_once_the_time_is_known() -> None:
    profile = load_profile("loihi1_davies2018")
    report = account([ONE], profile)
    assert report.lower_bound
    assert any(entry.startswith("static: 104 mW") for entry in report.unknown)
    timed = account([ONE], profile, powered=Quantity(2, "s"))
    static = timed.lines[-1]
    assert (static.layer, static.term) == ("chip", "static")
    assert static.mid_j == pytest.approx(0.208)  # 104 mW x 2 s
    assert not any(entry.startswith("static") for entry in timed.unknown)
    assert timed.total_mid_j == pytest.approx(report.total_mid_j + 0.208)
    with pytest.raises(UnitError, match="energy, not time"):
        account([ONE], profile, powered=Quantity(2, "pJ"))
    with pytest.raises(ValueError, match="above zero"):
        account([ONE], profile, powered=Quantity(0, "s"))


def test_graded_payloads_on_loihi1_are_hypothetical_and_elsewhere_not() -> None:
    graded = dataclasses.replace(ONE, graded=True, payload_bits=16)
    for name in list_profiles():
        labels = account([graded, TWO], load_profile(name)).labels
        marked = [label for label in labels if label.startswith("hypothetical:")]
        assert bool(marked) == name.startswith("loihi1")
        binary = account([ONE, TWO], load_profile(name)).labels
        assert not any(label.startswith("hypothetical:") for label in binary)
    first = account([graded, TWO], load_profile("loihi1_sanafe")).labels[0]
    assert first == ("hypothetical: binary-spike constants applied to graded payloads (1 of 2 layers, up to 16 bits)")


def test_json_form() -> None:
    report = account([ONE, TWO], load_profile("loihi1_sanafe"))
    form = json.loads(json.dumps(report.to_dict()))
    assert set(form) == {
        "profile", "low_j", "mid_j", "high_j", "kind", "source", "lower_bound", "unknown", "labels", "tokens",
    }  # fmt: skip
    assert (form["profile"], form["kind"], form["tokens"]) == ("loihi1_sanafe", "modelled", 10)
    assert form["lower_bound"] is True
    assert form["mid_j"] == report.total_mid_j


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("synops", -1, "layer 'one': synops is -1; a count cannot be negative"),
        ("events", float("nan"), "layer 'one': events is nan; a count must be finite"),
        ("dense_macs", float("inf"), "layer 'one': dense_macs is inf; a count must be finite"),
        ("tokens", 1.5, "layer 'one': tokens is 1.5; a count must be a whole number"),
        ("weight_bytes", "many", "layer 'one': weight_bytes is 'many'; a count must be a whole number"),
        ("payload_bits", 16, "layer 'one': graded is False, but payload_bits is 16; set graded=True"),
        ("layer", "", "Counts: layer must be a name, got ''"),
    ],
)
def test_bad_counts_name_layer_field_and_value(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(ONE, **{field: value})
    assert str(caught.value) == message


def test_numpy_integers_become_plain_ones() -> None:
    counts = dataclasses.replace(ONE, synops=np.int64(1000))
    assert type(counts.synops) is int
    assert counts == ONE


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([], "no counts to account for"),
        ([ONE, ONE], "layer 'one' appears twice"),
        ([ONE, dataclasses.replace(TWO, tokens=20)], "layer 'two' covers 20 tokens, layer 'one' 10"),
        ([dataclasses.replace(ONE, tokens=0)], "layer 'one': tokens is 0"),
    ],
)
def test_counts_that_do_not_belong_together(counts: list[Counts], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        account(counts, load_profile("loihi1_sanafe"))


NUMBER = st.integers(min_value=0, max_value=10**15)
LAYERS = st.lists(st.tuples(*[NUMBER] * 5), min_size=1, max_size=6)


def _layers(rows: list[tuple[int, ...]], start: int = 0) -> list[Counts]:
    return [
        Counts(f"layer{start + i}", 7, synops, events, active, inactive, macs, 0, False, 1)
        for i, (synops, events, active, inactive, macs) in enumerate(rows)
    ]


@settings(max_examples=60, deadline=None)
@given(rows=LAYERS, name=st.sampled_from(list_profiles()))
def test_interval_order(rows: list[tuple[int, ...]], name: str) -> None:
    report = account(_layers(rows), load_profile(name))
    for line in report.lines:
        assert 0 <= line.low_j <= line.mid_j <= line.high_j
    assert 0 <= report.total_low_j <= report.total_mid_j <= report.total_high_j


@settings(max_examples=60, deadline=None)
@given(first=LAYERS, second=LAYERS, name=st.sampled_from(list_profiles()))
def test_energy_adds_over_layers(first: list[tuple[int, ...]], second: list[tuple[int, ...]], name: str) -> None:
    profile = load_profile(name)
    a, b = _layers(first), _layers(second, start=len(first))
    whole, parts = account([*a, *b], profile), (account(a, profile), account(b, profile))
    for end in ("total_low_j", "total_mid_j", "total_high_j"):
        assert getattr(whole, end) == pytest.approx(sum(getattr(part, end) for part in parts), rel=1e-12)
    for index, end in enumerate(("total_low_j", "total_mid_j", "total_high_j")):
        assert sum(sums[index] for sums in whole.by_term().values()) == pytest.approx(getattr(whole, end), rel=1e-12)
