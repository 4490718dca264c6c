"""Placement: no limit is ever exceeded, everything is placed once, work is balanced, traffic is low, errors help."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hardware import load_chip
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, place
from hardware.placement.cost import axon_words
from hardware.placement.traffic import Edges, assign, crossing
from tests.hardware.placement.chains import CHIPS, chain, check


@st.composite
def networks(draw: st.DrawFn) -> list[LayerDemand]:
    found = [LayerDemand("in", draw(st.integers(1, 3000)), on_chip=False)]
    for number in range(draw(st.integers(1, 4))):
        source = found[-1]
        kind = draw(st.sampled_from(["dense", "sparse", "conv", "recurrent"]))
        bits = draw(st.integers(1, 8))
        delay = draw(st.sampled_from([0, 0, 5, 62]))
        name = f"l{number}"
        if kind == "conv":
            width, height, channels = draw(st.integers(3, 20)), draw(st.integers(3, 20)), draw(st.integers(1, 16))
            groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
            between = LayerDemand(
                f"{name}_in",
                width * height * channels,
                (Connection(source.name, source.neurons, bits),),
                draw(st.just((width, height, channels))),
            )
            conv = Convolution(
                between.name,
                between.box,
                groups * draw(st.integers(1, 12)),
                (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
                groups=groups,
                weight_bits=bits,
            )
            found += [between, LayerDemand(name, math.prod(conv.output_shape), (conv,))]
            continue
        size = draw(st.integers(1, 1500))
        mask = None
        if kind == "sparse":
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            rows = np.linspace(0, draw(st.floats(0.05, 1)), size)[:, None]
            mask = rng.random((size, source.neurons)) < rows
        connections = [Connection(source.name, source.neurons, bits, max_delay=delay, mask=mask)]
        if kind == "recurrent":
            connections.append(Connection(name, size, bits))
        found.append(LayerDemand(name, size, tuple(connections)))
    return found


@pytest.mark.parametrize(("chip", "budget"), CHIPS)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking would take minutes
@given(demands=networks(), share=st.booleans(), split=st.sampled_from(["fewest", "compiler"]))
def test_no_placement_exceeds_a_limit(chip, budget, demands, share, split):
    try:
        placement = place(demands, chip, budget=budget, share=share, split=split)
    except DoesNotFit as failure:
        refused = failure.binding
    else:
        check(placement, demands)
        return
    # Only output axons may be too few here: a recurrent layer needs neurons x cores of them.
    assert chip == "loihi1"
    assert refused.resource in ("axon_out", "axon_out_far")
    assert refused.used > refused.limit


def test_the_property_is_not_empty_some_networks_take_several_cores_and_chips():
    demands = chain(4096, 4096, 64)
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert len(placement.cores) == 456 + 8
    assert placement.chips == 4


# --- splits ----------------------------------------------------------------------------------------------------------


def test_outputs_are_split_evenly():
    placement = place(chain(784, 128), "loihi2")
    assert [part.neurons for core in placement.cores for part in core.parts] == [43, 43, 42]
    assert placement.layers[0].imbalance == pytest.approx(43 * 3 / 128)
    assert placement.layers[0].binding.resource == "synapse_words"
    assert (placement.layers[0].binding.used, placement.layers[0].binding.limit) == (32144, 16000)


def test_synaptic_operations_are_balanced_where_neurons_differ():
    rng = np.random.default_rng(0)
    mask = rng.random((1000, 1000)) < np.linspace(0.02, 1, 1000)[:, None]
    demands = [LayerDemand("in", 1000, on_chip=False), LayerDemand("l", 1000, (Connection("in", 1000, mask=mask),))]
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert len(placement.cores) > 5
    assert placement.layers[0].imbalance < 1.02
    sizes = [core.parts[0].neurons for core in placement.cores]
    assert sizes[0] > 3 * sizes[-1]  # even neurons would be 1.9 times the mean at the end
    assert placement.synops == mask.sum()


def test_measured_rates_give_synaptic_operations_and_traffic():
    rate = tuple(i / 100 for i in range(100))
    demands = [
        LayerDemand("in", 100, on_chip=False, rate=rate, measured=True),
        LayerDemand("a", 50, (Connection("in", 100),), rate=0.2, measured=True),
        LayerDemand("b", 10, (Connection("a", 50),), rate=0.5, measured=True),
    ]
    placement = place(demands, "loihi2")
    assert [layer.synops for layer in placement.layers] == pytest.approx([50 * sum(rate), 10 * 50 * 0.2])
    assert placement.messages_from_host == pytest.approx(sum(rate))
    assert placement.messages_between_cores == pytest.approx(50 * 0.2)
    assert placement.measured
    assert not any("not measured" in note for note in placement.notes)


def test_too_many_inputs_are_split_and_summed():
    demands = chain(40_000, 30)
    placement = place(demands, "loihi2")
    check(placement, demands)
    roles = Counter(part.role for core in placement.cores for part in core.parts)
    assert roles["partial"] >= 3 * roles["sum"] > 0
    assert placement.layers[0].partial_sums
    assert any("one step later" in note for note in placement.notes)
    sums = [core for core in placement.cores if core.parts[0].role == "sum"]
    assert {placement.core_of("l0")[n] for n in range(30)} == {core.number for core in sums}
    assert sum(core.synops for core in placement.cores if core.parts[0].role == "partial") == 40_000 * 30


def test_partial_sums_need_graded_messages():
    with pytest.raises(DoesNotFit, match=r"axon_in 5,000 of 4,096.*partial sums need graded messages"):
        place(chain(5000, 4), "loihi1")


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (LayerDemand("c", 16 * 512, (Convolution("in", (4, 4, 512), 512, (3, 3), padding=(1, 1)),)), 3 * 3 * 512),
        (LayerDemand("c", 16, (Connection("in", 8192, mask=np.arange(8192) < 300 * np.arange(16)[:, None]),)), 300 * 15),
    ],
)
def test_a_neuron_with_too_many_inputs_is_the_one_that_is_named(layer, inputs):
    with pytest.raises(DoesNotFit, match=f"even one neuron of it does not fit: axon_in {inputs:,} of 4,096") as caught:
        place([LayerDemand("in", 8192), layer], "loihi1")
    assert caught.value.binding.used == inputs


def test_a_wide_convolution_is_split_by_input_channels():
    conv = Convolution("in", (3, 3, 3000), 4, (3, 3))
    demands = [LayerDemand("in", 27_000, on_chip=False, shape=(3, 3, 3000)), LayerDemand("c", 4, (conv,))]
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert placement.layers[0].partial_sums
    assert sum(core.synops for core in placement.cores if core.parts[0].role == "partial") == 27_000 * 4


def test_a_tall_convolution_is_cut_along_height_and_channels_too():
    conv = Convolution("in", (2, 80, 1), 9000, (1, 1), weight_bits=1)
    demands = [LayerDemand("in", 160, on_chip=False), LayerDemand("c", 2 * 80 * 9000, (conv,))]
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert len(placement.cores) == math.ceil(2 * 80 * 9000 / 4095)  # fewer cannot hold the neurons; single rows took 480
    assert all(part.neurons <= 4095 for core in placement.cores for part in core.parts)


def test_recurrence_counts_its_own_axons():
    demands = [LayerDemand("in", 10, on_chip=False), LayerDemand("r", 300, (Connection("in", 10), Connection("r", 300)))]
    (core,) = place(demands, "loihi1").cores
    assert core.used["axon_in"].used == 310
    assert core.used["axon_out"].used == 300


def test_output_axons_split_the_sender():
    """1,000 neurons that 20 cores listen to need 20,000 entries: at most 204 of them on a core with 4,096."""
    demands = chain(16, 768, 3072)
    placement = place(demands, "loihi1", budget="nengo")
    check(placement, demands)
    receivers = len(placement.layers[1].cores)
    senders = placement.layers[0].cores
    assert receivers == 21
    assert all(placement.cores[n].used["axon_out"].used == placement.cores[n].parts[0].neurons * receivers for n in senders)
    assert len(senders) == math.ceil(768 / (4096 // receivers))


def test_convolution_on_loihi_1_shares_synapses():
    conv = Convolution("in", (20, 20, 2), 2, (3, 3))
    demands = [LayerDemand("in", 800, on_chip=False), LayerDemand("c", 648, (conv,))]
    (core,) = place(demands, "loihi1", budget="nengo").cores
    budget = load_chip("loihi1").budgets["nengo"]
    # Per input channel: 1 to 3 kernel positions along each axis, in 5 patterns (0; 0 1; 0 1 2; 1 2; 2).
    lengths = [1, 2, 3, 2, 1]
    expected = 2 * sum(axon_words(budget, x * y * 2, 8, "sparse", 648) for x in lengths for y in lengths)
    assert core.used["synapse_words"].used == expected
    assert core.used["axon_in"].used == 800
    assert core.synops == 18 * 18 * 9 * 2 * 2


# --- chips -----------------------------------------------------------------------------------------------------------


def test_chips_keep_talking_cores_together():
    """Two groups of three cores, interleaved: filled in order 5 of 6 links would cross; apart, none does."""
    links = [(a, b) for group in ((0, 2, 4), (1, 3, 5)) for a in group for b in group if a < b]
    between = Edges(
        np.array([a for a, _ in links]),
        np.array([b for _, b in links]),
        np.ones(6, dtype=np.int64),
        np.ones(6),
        0.0,
    )
    core_of = np.arange(6)
    assert crossing(np.arange(6) // 3, between, core_of) == 4
    chip_of = assign(6, 3, between, core_of)
    assert crossing(chip_of, between, core_of) == 0
    assert Counter(chip_of.tolist()) == {0: 3, 1: 3}


@pytest.mark.parametrize("seed", range(5))
def test_chips_against_the_best_of_all_assignments(seed):
    import itertools

    rng = np.random.default_rng(seed)
    pairs = list(itertools.combinations(range(8), 2))
    between = Edges(
        np.array([a for a, _ in pairs]),
        np.array([b for _, b in pairs]),
        np.ones(len(pairs), dtype=np.int64),
        rng.random(len(pairs)) ** 4,
        0.0,
    )
    core_of = np.arange(8)
    best = min(
        crossing(np.isin(core_of, chosen).astype(int), between, core_of) for chosen in itertools.combinations(range(8), 4)
    )
    found = crossing(assign(8, 4, between, core_of), between, core_of)
    start = crossing(core_of // 4, between, core_of)
    assert best <= found <= min(start, 1.15 * best)


def test_two_networks_on_two_chips_do_not_talk():
    demands = []
    for name in ("a", "b"):
        demands += [
            LayerDemand(f"{name}0", 1024, on_chip=False),
            LayerDemand(f"{name}1", 4096, (Connection(f"{name}0", 1024),)),
            LayerDemand(f"{name}2", 256, (Connection(f"{name}1", 4096),)),
        ]
    placement = place([demands[i] for i in (0, 3, 1, 4, 2, 5)], "loihi2")
    check(placement, demands)
    assert placement.chips == 2
    # 95 cores each: the second network cannot stay whole, the first can.
    assert placement.messages_between_chips < 0.2 * placement.messages_between_cores


# --- what does not fit ----------------------------------------------------------------------------------------------
