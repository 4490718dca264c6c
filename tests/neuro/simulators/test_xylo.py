"""Xylo's arithmetic: every spike and state equal to its makers' simulator, and to a plain evaluation of its equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware import interpreters
from neuro.graph import GraphError, Population, Projection, SpikingGraph, load_graph, save_graph
from neuro.graph.xylo import synapses, xylo_network
from neuro.simulators import fixed_point
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import FixedPointOverflow, InputError, run_pipelined, simulate
from neuro.simulators.xylo import client
from tests.environments import python_of
from tests.neuro.simulators import xylo_networks as made


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 2000), marks=pytest.mark.soak)], ids=["100", "1,900"]
)
def test_every_spike_and_state_equals_xylosim(seeds: range) -> None:
    python = python_of(client.ENV_PYTHON, ".venv-xylo", "xylo")
    jobs = [(graph := made.network(seed), made.spikes(graph, seed)) for seed in seeds]
    values = saturating = sent = 0
    for seed, (graph, inputs), theirs in zip(seeds, jobs, client.run_all(jobs, python=python), strict=True):
        ours = simulate(graph, inputs, mode="xylo", record=RECORD_ALL)
        found = compare(theirs, ours)
        assert found.equal, f"network {seed}: {found}"
        assert all(name.endswith(("a_in", "a_in2", "x.spikes", "x2.spikes")) for name in found.skipped)
        values += found.values
        saturating += any(counts.saturations_v for counts in ours.populations.values())
        sent += int(theirs.spikes["y"].sum())
    assert values > 2_000 * len(seeds)
    assert len(seeds) // 4 < saturating < len(seeds)
    assert sent > 30 * len(seeds)
    assert theirs.ran_on == "xylosim 0.1.3 (v2)"


def limited(value: int) -> int:
    return max(-32768, min(32767, value))


def lost(value: int, dash: int) -> int:
    return (value >> dash) or (1 if value > 0 else 0)


def by_hand(graph: SpikingGraph, inputs: dict[str, np.ndarray], sample: int) -> dict[str, list[list[int]]]:
    """The equations of neuro/graph/xylo.py, one neuron, synapse and spike after another, in Python's integers."""
    net = xylo_network(graph)
    channels = np.concatenate([inputs[p.name][sample] for p, _ in net.inputs], axis=1)
    hidden, out = net.parameters["hidden"], net.parameters["readout"]
    count = net.sizes["hidden"]
    currents = [[0, 0] for _ in range(count)]
    v, sent = [0] * count, [0] * count
    v_out, current_out = [0] * net.sizes["readout"], [0] * net.sizes["readout"]
    trace: dict[str, list[list[int]]] = {"hidden": [], "v_mem": [], "readout": []}
    for arriving in [np.zeros_like(channels[0]), *channels[:-1]]:
        for pool, spikes in (("in", arriving.tolist()), ("rec", sent)):
            for source, target, synapse, weight in net.synapses[pool].tolist():
                for _ in range(spikes[source]):
                    currents[target][synapse] = limited(currents[target][synapse] + (weight << net.shifts[pool]))
        for source, target, _, weight in net.synapses["out"].tolist():
            for _ in range(sent[source]):
                current_out[target] = limited(current_out[target] + (weight << net.shifts["out"]))
        sent = [0] * count
        for i in range(count):
            dashes = int(hidden["dash_syn"][i]), int(hidden["dash_syn2"][i])
            currents[i] = [c - lost(c, d) for c, d in zip(currents[i], dashes, strict=True)]
            change = -lost(v[i], int(hidden["dash_mem"][i]))
            change = -32768 if change == 32768 else change
            v[i] = limited(v[i] + limited(limited(change + sum(currents[i])) + int(hidden["bias"][i])))
            while v[i] >= hidden["vth"][i] and sent[i] < 31:
                v[i] -= int(hidden["vth"][i])
                sent[i] += 1
            if (alias := int(hidden["alias"][i])) >= 0:
                sent[alias] = min(31, sent[alias] + sent[i])
        fired = [0] * len(v_out)
        for i in range(len(v_out)):
            current_out[i] -= lost(current_out[i], int(out["dash_syn"][i]))
            change = -lost(v_out[i], int(out["dash_mem"][i]))
            change = -32768 if change == 32768 else change
            v_out[i] = limited(v_out[i] + limited(limited(change + current_out[i]) + int(out["bias"][i])))
            if v_out[i] >= out["vth"][i]:
                v_out[i] -= int(out["vth"][i])
                fired[i] = 1
        for name, values in (("hidden", sent), ("v_mem", v), ("readout", fired)):
            trace[name].append(list(values))
    return trace


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 9, 10])
def test_the_equations_evaluated_one_spike_at_a_time_give_the_same(seed: int) -> None:
    graph = made.network(seed)
    inputs = made.spikes(graph, seed, batch=2, steps=15)
    ours = simulate(graph, inputs, mode="xylo", record=("spikes", "v_mem"))
    for sample in range(2):
        expected = by_hand(graph, inputs, sample)
        for population, first in xylo_network(graph).hidden:
            part = slice(first, first + population.size)
            assert ours.spikes[population.name][sample].tolist() == [row[part] for row in expected["hidden"]]
            assert ours.states[population.name]["v_mem"][sample].tolist() == [row[part] for row in expected["v_mem"]]
        assert ours.spikes["y"][sample].tolist() == expected["readout"]


def test_chunks_of_steps_and_a_file_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = made.network(4)
    inputs = made.spikes(graph, 4)
    whole = simulate(graph, inputs, mode="xylo", record=RECORD_ALL)
    save_graph(graph, tmp_path / "network.graph.npz")
    monkeypatch.setattr(fixed_point, "CHUNK_VALUES", 150)
    parts = simulate(load_graph(tmp_path / "network.graph.npz"), inputs, mode="xylo", record=RECORD_ALL)
    assert compare(whole, parts).equal
    assert parts.populations == whole.populations
    assert parts.projections == whole.projections
    assert whole.ran_on == "simulated (ours, xylo)"


def small(**changes: Any) -> SpikingGraph:
    """Two inputs, two hidden neurons, a read-out, with something changed."""
    x, h = Population("x", "input", 2), Population("h", "xylo", 2, {"dash_mem": 4, "dash_syn": 2, "vth": 100})
    y = Population("y", "xylo_out", 1, {"dash_mem": 4, "dash_syn": 2, "vth": 100})
    parts = {
        "in": synapses("in", x, h, [[100, 0], [0, 50]], shift=1),
        "out": synapses("out", h, y, [[60, 60]]),
        **changes,
    }
    return SpikingGraph((x, h, y), tuple(part for part in parts.values() if part is not None), ("y",))


def test_counts_are_of_spiking_neurons_and_stored_synapses() -> None:
    found = simulate(small(), {"x": [[[1, 0], [0, 0], [3, 3], [0, 0], [0, 0]]]}, mode="xylo", record=("spikes",))
    assert found.projections["in"].events == 3
    assert found.projections["in"].synops == 3  # of four weights two are 0 and not stored
    spikes = found.spikes["h"][0, :-1]
    assert found.projections["out"].events == int((found.spikes["h"] != 0).sum()) >= int((spikes != 0).sum()) > 0
    assert found.projections["in"].max_abs_payload == 3
    tokens = run_pipelined(small(), {"x": [[[1, 0], [0, 0], [3, 3]]]}, mode="xylo", record=("spikes",))
    assert tokens.spikes["h"][0].tolist() == found.spikes["h"][0, 1:4].tolist()


def test_a_saturated_register_is_counted_and_refused_in_strict() -> None:
    x = Population("x", "input", 1)
    h = Population("h", "xylo", 1, {"dash_mem": 15, "dash_syn": 15, "vth": 2**15 - 1})
    y = Population("y", "xylo_out", 1, {"dash_mem": 1, "dash_syn": 1, "vth": 10})
    graph = SpikingGraph((x, h, y), (synapses("in", x, h, [[127]], 7), synapses("out", h, y, [[1]])), ("y",))
    inputs = {"x": [[[1], [1], [0], [0]]]}
    found = simulate(graph, inputs, mode="xylo", record=("i_syn",))
    assert found.states["h"]["i_syn"][0, :, 0].tolist() == [0, 16255, 32510, 32509]
    assert found.populations["h"].saturations_v == 1
    with pytest.raises(FixedPointOverflow, match=r"'h', step 2, sample 0, neuron 0: v_mem is 48764, outside the 16 bits"):
        simulate(graph, inputs, mode="xylo", strict=True)


X, H = Population("x", "input", 2), Population("h", "xylo", 2, {"dash_mem": 4, "dash_syn": 2, "vth": 100})
Y = Population("y", "xylo_out", 1, {"dash_mem": 4, "dash_syn": 2, "vth": 100})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rec": Projection("rec", "x", "y", "a_in", [[2, 2]], num_message_bits=5)}, "Put a hidden population in between"),
        ({"rec": Projection("rec", "y", "h", "a_in", [[2], [2]])}, "from 'y' .xylo_out. to 'h'"),
        ({"rec": Projection("rec", "h", "h", "a_in", [[2, 2], [2, 2]])}, r"0 message bits carry 0..1, .* up to 31 spikes"),
        ({"in2": synapses("in2", X, H, [[1, 1], [1, 1]], 3)}, r"weight shift is 3, that of 'in' 1; .* one weight_exp"),
        (
            {
                "rec": Projection(
                    "rec",
                    "h",
                    "h",
                    "a_in",
                    [[2, 2], [2, 2]],
                    -1,
                    num_message_bits=6,
                    kind="delay_dense",
                    delays=np.ones((2, 2), dtype=int),
                )
            },
            "no synaptic delays",
        ),
        (
            {"rec": Projection("rec", "h", "h", "a_in", [[1, 1], [1, 1]], sign_mode="excitatory", num_message_bits=6)},
            "weight 1 is not twice an integer of -128..127",
        ),
        ({"rec": Projection("rec", "h", "h", "a_in", [[2, 2], [2, 2]], 9, num_message_bits=6)}, "weight_exp is 9"),
    ],
)
def test_what_xylo_has_none_of_is_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        simulate(small(**changes), {"x": [[[0, 0]]]}, mode="xylo")


def test_kinds_ranges_and_inputs_of_another_chip_are_refused() -> None:
    with pytest.raises(GraphError, match="'h': xylo has the arithmetic of another chip than mode 'lava'; use mode 'xylo'"):
        simulate(small(), {"x": [[[0, 0]]]})
    lif = Population("l", "lif", 2, {"du": 0, "dv": 0, "vth": 1})
    loihi = SpikingGraph((X, lif), (Projection("w", "x", "l", "a_in", [[2, 2], [2, 2]]),), ("l",))
    with pytest.raises(GraphError, match="use mode 'lava' or 'chip'"):
        simulate(loihi, {"x": [[[0, 0]]]}, mode="xylo")
    for value in (16, -1):
        with pytest.raises(InputError, match=f"'x' is {value} at sample 0, step 1, neuron 1; .* carries (0|-16)..15"):
            simulate(small(), {"x": [[[0, 0], [0, value]]]}, mode="xylo")
    with pytest.raises(GraphError, match="alias is 2; neurons are numbered from 0 to 1"):
        Population("h", "xylo", 2, {"dash_mem": 4, "dash_syn": 2, "vth": 100, "alias": [2, -1]})
    with pytest.raises(GraphError, match=r"vth is 0; its register holds 1..32767"):
        Population("h", "xylo", 2, {"dash_mem": 4, "dash_syn": 2, "vth": 0})
    with pytest.raises(GraphError, match=r"weight 128 is beyond Xylo's 8 bits"):
        synapses("w", X, H, [[128, 0], [0, 0]])
    with pytest.raises(GraphError, match=r"shift is 8; 0..7"):
        synapses("w", X, H, [[1, 0], [0, 0]], shift=8)
    with pytest.raises(GraphError, match="feeds nothing on Xylo"):
        synapses("w", Y, H, [[1], [0]])


def test_a_missing_slow_or_dying_xylosim_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(text: str) -> Path:
        path = tmp_path / f"python{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    job = (small(), {"x": [[[1, 0]]]})
    monkeypatch.setenv(client.ENV_PYTHON, str(tmp_path / "none"))
    with pytest.raises(client.XyloSimUnavailable, match="which is no program; run `make xylo`"):
        client.run(*job)
    monkeypatch.delenv(client.ENV_PYTHON)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interpreters, "__file__", str(tmp_path / "hardware" / "interpreters.py"))
    with pytest.raises(client.XyloSimUnavailable, match="no xylosim environment at"):
        client.run(*job)
    with pytest.raises(client.XyloSimTimeout, match=r"still running after 0.2 s"):
        client.run(*job, python=script("exec sleep 20"), timeout_s=0.2)
    with pytest.raises(client.XyloSimError, match="ended by SIGSEGV; it wrote: half a sentence"):
        client.run(*job, python=script("echo half a sentence >&2; kill -SEGV $$"))
    with pytest.raises(client.XyloSimError, match="exit code 3: the last line"):
        client.run(*job, python=script("echo one >&2; echo the last line >&2; exit 3"))
    with pytest.raises(client.XyloSimUnavailable, match="has no xylosim; run `make xylo`"):
        client.run(*job, python=script("echo \"ModuleNotFoundError: No module named 'xylosim'\" >&2; exit 1"))
    with pytest.raises(client.XyloSimError, match="gave no answer that can be read; it wrote: hello"):
        client.run(*job, python=script("echo hello"))
    with pytest.raises(InputError, match=r"is 16 at sample 0"):
        client.run(small(), {"x": [[[16, 0]]]})
