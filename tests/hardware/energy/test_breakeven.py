"""Break-even densities by hand, and published thresholds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import Counts, account, break_even, load_profile, standings

CHIP, INT8 = load_profile("loihi1_davies2018"), load_profile("digital45_int8_sram")
# 1000 dense MACs, 577 synaptic operations: density 57.7 %
MLP = Counts("mlp", 10, 577, 10, 4, 6, 1000, 1000, False, 1)


def test_by_hand_against_int8() -> None:
    found = break_even([MLP], CHIP, INT8)
    # 2.8 / 23.6; (0.23 + 1.25) / 39.6535; (0.3 + 12.5) / 20.8388
    assert found.simple == pytest.approx((1.48 / 39.6535, 2.8 / 23.6, 12.8 / 20.8388))
    # Reference 2800 pJ. Neurons 4 x 81 + 6 x 52 = 636 stay; 577 x 23.6 + 10 x 8.7 = 13704.2 fall with the density.
    assert found.whole[1] == pytest.approx(0.577 * (2800 - 636) / 13_704.2)
    assert found.chip_j[1] == pytest.approx(14_340.2e-12)
    assert found.reference_j[1] == pytest.approx(2800e-12)
    assert found.factor == pytest.approx(14_340.2 / 2800)
    assert found.verdict == "undecided"  # 12.8 pJ a MAC with 1 MB of SRAM overlaps the chip's low end
    assert found.sentence == (
        "loihi1_davies2018 against digital45_int8_sram: 5.12 times its energy at a density of 57.7 %; to break even the "
        "density would have to fall to 9.1 % (6.3 times fewer events), or a synaptic operation with its message to cost "
        "3.75 pJ"
    )


def test_wins_loses_and_can_never_win() -> None:
    assert break_even([MLP], CHIP, load_profile("digital45_int8_dram")).verdict == "chip wins"
    gpu = break_even([MLP], CHIP, load_profile("gpu_h100_sheet"))
    assert gpu.verdict == "reference wins"
    busy = dataclasses.replace(MLP, neuron_updates_inactive=1000)
    never = break_even([busy], CHIP, INT8)
    assert never.whole[1] == 0
    assert "neuron updates alone cost 18.69 times as much: fewer neurons or steps" in never.sentence


def test_host_layers_count_on_neither_side() -> None:
    host = Counts("head", 10, 0, 0, 0, 0, 10**9, 60, False, 0, host=True)
    assert break_even([MLP, host], CHIP, INT8) == break_even([MLP], CHIP, INT8)


@pytest.mark.parametrize(
    ("counts", "chip", "reference", "message"),
    [
        (dataclasses.replace(MLP, dense_macs=0), CHIP, INT8, "0 dense MACs and 577 synaptic operations"),
        (dataclasses.replace(MLP, synops=0), CHIP, INT8, "1000 dense MACs and 0 synaptic operations"),
        (MLP, INT8, CHIP, "a chip profile and a dense one are needed, in that order"),
    ],
)
def test_what_has_no_density_is_refused(counts: Counts, chip: object, reference: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        break_even([counts], chip, reference)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    synops=st.integers(1, 10**9), macs=st.integers(1, 10**9), updates=st.integers(0, 10**6), events=st.integers(0, 10**6)
)
def test_at_the_break_even_density_both_cost_the_same(synops: int, macs: int, updates: int, events: int) -> None:
    counts = Counts("x", 1, synops, events, 0, updates, macs, 0, False, 1)
    found = break_even([counts], CHIP, INT8)
    assert found.simple[0] <= found.simple[1] <= found.simple[2]
    assert found.whole[0] <= found.whole[1] <= found.whole[2]
    if found.whole[1] > 0:
        groups = account([counts], CHIP).by_group()
        scale = found.whole[1] / found.density
        there = scale * (groups["synapse"][1] + groups["traffic"][1]) + groups["neuron"][1]
        assert there == pytest.approx(found.reference_j[1], rel=1e-9)


def test_standings_by_hand() -> None:
    # T = 5: 10 of 100 updates sent a message: 0.1 per neuron and step, 0.5 per neuron; 300 / 1000 spikes per synapse
    spiking = Counts("x", 1, 300, 10, 10, 90, 1000, 0, False, 1, time_steps=5)
    found = {standing.quantity: standing for standing in standings([spiking])}
    assert found["spike_rate"].value == pytest.approx(0.1)
    assert (found["spike_rate"].verdict, found["spike_rate"].caution) == ("above", "")
    assert found["spikes_per_synapse"].value == pytest.approx(0.3)
    assert found["spikes_per_synapse"].verdict == "within"
    assert found["spikes_per_neuron"].value == pytest.approx(0.5)
    assert found["spikes_per_neuron"].verdict == "below"
    assert "2409.08290" in str(found["spike_rate"])
    graded = dataclasses.replace(spiking, graded=True, payload_bits=16, time_steps=1)
    cautions = {s.quantity: s.caution for s in standings([graded])}
    assert cautions["spike_rate"] == (
        "found for 5 to 10 steps, this network takes 1; found for binary spikes, these messages are graded"
    )
    with pytest.raises(ValueError, match="0 neuron updates"):
        standings([dataclasses.replace(spiking, neuron_updates_active=0, neuron_updates_inactive=0)])
