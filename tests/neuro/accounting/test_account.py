"""An account against figures worked out here: counts by a loop over the neurons, joules from the published coefficients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hardware.latency.rates import load_rates
from hardware.placement import DoesNotFit
from neuro.accounting.account import EACH, ONCE, graph_account
from neuro.accounting.counts import dense_macs, sparse_where_it_pays
from neuro.accounting.running import counted_run
from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph.synapses import Convolution
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate

SYNAPSE, ACTIVE, INACTIVE, MESSAGE = 23.6, 81.0, 52.0, 1.7 + 2 * 3.5  # pJ: Davies et al. 2018, Table 2; two hops
STATIC_W = 0.104  # Frady et al. 2020
MAC = 0.3 + 2.5  # pJ: Horowitz 2014, an int8 MAC and the read of its weight
LIF = {"du": 4095, "dv": 0, "vth": 40}  # v <- v + sum; a spike and v = 0 above 40
W1 = np.array([[30, 20, 0, -8], [0, 44, 12, 6], [10, 10, 10, 10]])
W2 = np.array([[42, 0, 0], [0, 0, 50]])
SAMPLES, STEPS = 3, 9


def graph(second: str = "dense", loop: bool = False) -> SpikingGraph:
    projections = [Projection("fc1", "x", "a", "a_in", W1), Projection("fc2", "a", "b", "a_in", W2, kind=second)]
    projections += [Projection("back", "b", "b", "a_in", np.array([[-4, 2], [2, -4]]))] if loop else []
    populations = [Population("x", "input", 4), Population("a", "lif", 3, LIF), Population("b", "lif", 2, LIF)]
    return SpikingGraph(populations, projections, ["b"])


def spikes() -> np.ndarray:
    return (np.random.default_rng(4).random((SAMPLES, STEPS, 4)) < 0.5).astype(np.int64)


def layer(sent_BTN: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Integrate and fire, one step behind its source."""
    v = np.zeros((len(sent_BTN), len(weight)), dtype=np.int64)
    found = np.zeros((*sent_BTN.shape[:2], len(weight)), dtype=np.int64)
    for t in range(1, sent_BTN.shape[1]):
        v += sent_BTN[:, t - 1] @ weight.T
        found[:, t] = v > 40
        v[v > 40] = 0
    return found


def by_hand(stored: bool) -> dict[str, dict[str, int]]:
    """Counts of both layers; `stored`: the four zeros of the second one's six weights cost an operation each."""
    x, a = spikes(), layer(spikes(), W1)
    fan_out = [2, 2, 2] if stored else np.count_nonzero(W2, axis=0)
    updates = SAMPLES * STEPS
    first, second = int(a.sum()), int(layer(a, W2).sum())
    return {
        "a": {"events": int(x.sum()), "synops": 3 * int(x.sum()), "active": first, "inactive": 3 * updates - first},
        "b": {
            "events": first,
            "synops": int(a.sum(axis=(0, 1)) @ fan_out),
            "active": second,
            "inactive": 2 * updates - second,
        },
    }


@pytest.mark.parametrize("zeros", ["auto", "stored"])
def test_counts_and_joules_are_those_of_the_closed_form(zeros: str) -> None:
    found, want = graph_account(graph(), {"x": spikes()}, zeros=zeros), by_hand(zeros == "stored")
    assert want["b"]["active"] > 0
    for item in found.counts:
        assert want[item.layer] == {
            "events": item.events,
            "synops": item.synops,
            "active": item.neuron_updates_active,
            "inactive": item.neuron_updates_inactive,
        }
    sums = {key: sum(each[key] for each in want.values()) for key in ("events", "synops", "active", "inactive")}
    chip_pj = sums["synops"] * SYNAPSE + sums["events"] * MESSAGE
    neurons_pj = sums["active"] * ACTIVE + sums["inactive"] * INACTIVE
    energies = {(one.report.profile, one.dense): one for one in found.energies}
    davies = energies["loihi1_davies2018", ""]
    assert davies.per_sample_j[1] == pytest.approx(1e-12 * (chip_pj + neurons_pj) / SAMPLES)
    assert davies.report.kind == "modelled"
    macs = 12 + (6 if zeros == "stored" else 2)
    assert energies["digital45_int8_sram", ONCE].per_sample_j[1] == pytest.approx(1e-12 * macs * MAC)
    assert energies["digital45_int8_sram", EACH].per_sample_j[1] == pytest.approx(1e-12 * macs * MAC * STEPS)
    assert energies["loihi2, extrapolated from pilotnet_snn", ""].report.kind == "extrapolated"
    for often, evaluations in ((ONCE, SAMPLES), (EACH, SAMPLES * STEPS)):
        one = next(one for one in found.break_evens[often] if one.chip == "loihi1_davies2018")
        assert one.density == pytest.approx(sums["synops"] / (macs * evaluations))
        assert one.factor == pytest.approx((chip_pj + neurons_pj) / (macs * MAC * evaluations))
    assert found.total("synops") == sums["synops"] / SAMPLES


def test_the_table_says_which_zeros_are_taken_as_stored() -> None:
    x, a = spikes(), layer(spikes(), W1)
    on_first = int(x.sum(axis=(0, 1)) @ (W1 == 0).sum(axis=0))
    on_second = int(a.sum(axis=(0, 1)) @ (W2 == 0).sum(axis=0))
    table = graph_account(graph(), {"x": x}).table()
    stored = f"projection 'fc1': 2 of 12 weights are zero, assumed stored: {on_first / SAMPLES:,.4g} synaptic operations"
    left_out = f"'fc2': 4 of 6 weights are zero, assumed not stored (a sparse list): {on_second / SAMPLES:,.4g} synaptic"
    assert stored in table
    assert left_out in table
    assert on_first > 0 < on_second
    asked = graph_account(graph(), {"x": x}, zeros="stored").table()
    assert "'fc2': 4 of 6 weights are zero, assumed stored" in asked
    assert "zero" not in graph_account(graph("sparse"), {"x": x}).table().split("'fc1'")[1].split("\n", 1)[1]


def test_dropping_zeros_changes_no_spike(networks) -> None:
    changed = 0
    for seed in (1, 6, 12, 19, 35, 62):
        network = networks.network(seed)
        thinned = (replace(p, weight=np.where(p.weight % 4, 0, p.weight)) for p in network.projections)
        network = replace(network, projections=tuple(thinned))
        sparser = sparse_where_it_pays(network)
        changed += sum(a.kind != b.kind for a, b in zip(network.projections, sparser.projections, strict=True))
        given = networks.messages(network, seed, 2, 12)
        assert compare(simulate(network, given), simulate(sparser, given)).equal
        first, second = (graph_account(network, given, chip="loihi2", zeros=zeros) for zeros in ("stored", "auto"))
        assert first.activity.populations == second.activity.populations
        assert second.total("synops") <= first.total("synops")
    assert changed > 0


def test_loihi1_static_power_is_that_of_its_chips_over_the_modelled_time() -> None:
    found = graph_account(graph(), {"x": spikes()}, chip="loihi1")
    davies = next(one for one in found.energies if one.report.profile == "loihi1_davies2018")
    latency = next(one for one in found.latencies if one.rates == "loihi1_davies2018")
    steps = latency.depth + STEPS - 1  # the next sample waits for the last result
    seconds = steps * latency.step.to("s")[1]
    assert latency.depth == 2
    assert davies.report.by_group()["static"][1] / SAMPLES == pytest.approx(STATIC_W * seconds)
    static = 1e6 * davies.report.by_group()["static"][1] / SAMPLES
    assert f"{static:.4g}" in next(line for line in found.table().splitlines() if "of it static power" in line)
    # Both layers lie on a core of their own; the busiest updates three neurons a step, two of four kinds of time.
    want, rates = by_hand(False), load_rates("loihi1_davies2018").rates
    each = {name: rates[name].time.to("ns")[1] for name in ("neuron_active", "neuron_inactive")}
    runs = SAMPLES * STEPS
    slowest = want["a"]["active"] / runs * each["neuron_active"] + want["a"]["inactive"] / runs * each["neuron_inactive"]
    assert latency.terms["neuron"].to("ns")[1] == pytest.approx(slowest)


def test_samples_in_parts_give_the_counts_of_one_run(networks) -> None:
    for seed in (6, 33, 200):
        network = networks.network(seed)
        given = networks.messages(network, seed, 5, 8)
        whole, parts = counted_run(network, given), counted_run(network, given, most_messages=1)
        ours = simulate(network, given)
        assert parts.activity.batch == 5
        assert parts.activity.populations == whole.activity.populations == ours.populations
        assert parts.activity.projections == whole.activity.projections == ours.projections
        assert compare(parts.activity, ours).equal
        assert all(torch.equal(parts.sent[key], whole.sent[key]) for key in whole.sent)
        kept = simulate(network, given, record=("spikes",)).spikes
        assert all(torch.equal(whole.sent[name, "s_out"], (kept[name] != 0).sum((0, 1))) for name in kept)


def test_a_convolution_has_the_macs_that_torch_counts() -> None:
    layer = torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        layer(torch.zeros(1, 4, 7, 5))
    geometry = Convolution((7, 5, 4), (2, 1), (1, 0), (1, 1), 2)
    conv = Projection("c", "x", "y", "a_in", np.ones((6, 3, 2, 2), dtype=int), kind="conv", conv=geometry)
    assert dense_macs(conv) == counter.get_total_flops() // 2


def test_a_loop_has_no_dense_equivalent_that_runs_once_a_sample() -> None:
    found = graph_account(graph(loop=True), {"x": spikes()})
    assert list(found.break_evens) == [EACH]
    assert {one.dense for one in found.energies} == {"", EACH}


def test_a_message_through_two_projections_is_sent_once() -> None:
    pieces = [Projection(f"fc1{i}", "x", "a", "a_in", W1, weight_exp=-i) for i in (0, 1)]
    twice = SpikingGraph([Population("x", "input", 4), Population("a", "lif", 3, LIF)], pieces, ["a"])
    found = graph_account(twice, {"x": spikes()}, zeros="stored").counts[0]
    assert (found.events, found.synops) == (spikes().sum(), 2 * 3 * spikes().sum())


def test_neurons_that_their_biases_drive_have_an_account_without_break_even() -> None:
    alone = SpikingGraph([Population("a", "lif", 3, {**LIF, "bias_mant": 64 * 21})], [], ["a"])
    found = graph_account(alone, {}, steps=8)
    # v rises by 21 a step in units of 64: above 40 at every second step
    assert (found.counts[0].neuron_updates_active, found.counts[0].neuron_updates_inactive) == (12, 12)
    assert found.break_evens == {}
    assert "no break-even: 0 dense MACs and 0 synaptic operations" in found.table()
    davies = next(one for one in found.energies if one.report.profile == "loihi1_davies2018")
    assert davies.per_sample_j[1] == pytest.approx(1e-12 * 12 * (ACTIVE + INACTIVE))


def test_wrong_words_and_networks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="zeros is 'some'; known: auto, stored"):
        graph_account(graph(), {"x": spikes()}, zeros="some")
    with pytest.raises(ValueError, match="reference 'loihi1_sanafe' prices a chip; a dense profile is needed"):
        graph_account(graph(), {"x": spikes()}, reference="loihi1_sanafe")
    wide = SpikingGraph(
        [Population("x", "input", 1), Population("a", "graded", 2, {"vth": 0})],
        [Projection("w", "x", "a", "a_in", np.array([[2], [2]]), num_message_bits=8)],
        ["a"],
    )
    with pytest.raises(DoesNotFit):
        graph_account(wide, {"x": np.ones((1, 2, 1), dtype=int)}, chip="loihi1")


def test_zeros_of_a_kernel_are_named_and_counted() -> None:
    kernel = np.array([[[[4, 2]], [[0, 6]]]])  # one channel, 2 x 1, of two channels
    conv = Projection("c", "x", "a", "a_in", kernel, kind="conv", conv=Convolution((3, 1, 2)))
    network = SpikingGraph([Population("x", "input", 6), Population("a", "lif", 2, LIF)], [conv], ["a"])
    x = np.ones((1, 2, 6), dtype=int)
    found = graph_account(network, {"x": x})
    assert "projection 'c': 1 of 4 weights are zero, in the kernel, assumed stored" in found.table()
    assert found.counts[0].synops == 2 * 2 * 4  # steps, positions, weights; the zero costs as much as the others


def test_a_graph_of_xylo_is_counted_and_priced_by_no_profile_of_another_maker() -> None:
    params = {"dash_mem": 2, "dash_syn": 2, "vth": 20}
    network = SpikingGraph(
        [Population("x", "input", 3), Population("h", "xylo", 4, params), Population("y", "xylo_out", 2, params)],
        [
            Projection("w", "x", "h", "a_in", np.full((4, 3), 30), num_message_bits=5),
            Projection("v", "h", "y", "a_in", np.full((2, 4), 30), num_message_bits=6),
        ],
        ["y"],
    )
    x = np.ones((2, 6, 3), dtype=int)
    found = graph_account(network, {"x": x})
    ours = simulate(network, {"x": x}, mode="xylo")
    assert found.activity.populations == ours.populations
    assert found.counts[1].neuron_updates_active > 0
    assert {one.dense for one in found.energies} == {ONCE, EACH}
    assert "not placed: population 'h' (xylo) is of Xylo" in graph_account(network, {"x": x}, chip="loihi2").table()
    assert found.pools is not None
    assert found.pools.used["hidden"].used == 4
    text = found.table()
    assert "no constants per operation of Xylo are published, and one measured network scales to no other" in text
    rows = [line for line in text.splitlines() if "of another network: keyword spotting" in line]
    assert [(row.split("XyloAudio 2")[1].split()[:3], "arXiv:2406.15112" in row) for row in rows] == [
        (["291", "uW", "measured"], True),
        (["6.6", "uJ", "measured"], True),
    ]
    assert found.to_dict()["published"][0]["measured"] == {"dynamic_power": "291 uW", "dynamic_energy": "6.6 uJ"}
    wide = Population("x", "input", 17)
    into = Projection("w", "x", "h", "a_in", np.full((4, 17), 30), num_message_bits=5)
    large = SpikingGraph([wide, *network.populations[1:]], [into, network.projections[1]], ["y"])
    with pytest.raises(DoesNotFit, match="inputs 17 of 16"):
        graph_account(large, {"x": np.ones((1, 3, 17), dtype=int)})
    with pytest.raises(ValueError, match=r"XyloAudio 3 .* holds one network"):
        graph_account(network, {"x": x}, chip="xylo_audio3", chips=2)
