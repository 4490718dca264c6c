"""Chips of fixed pools: the published limits, and what does not fit is named with its number, limit and remedy."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.commands import place as place_command
from experiments.commands import verify as verify_command
from hardware.chips.pooled import list_pooled, load_pooled
from hardware.datafile import DataFileError
from hardware.placement import DoesNotFit
from hardware.placement.pooled import place_pooled
from neuro.graph import Population, Projection, SpikingGraph, save_graph
from neuro.graph.demand import pooled_demand
from neuro.graph.xylo import synapses
from neuro.simulators.xylo import client
from tests.environments import python_of

NEURON = {"dash_mem": 4, "dash_syn": 2, "vth": 100}


def network(inputs: int = 4, hidden: tuple[int, ...] = (8,), readouts: int = 2, loop: bool = False) -> SpikingGraph:
    """Layers of ones; `loop`: the last hidden layer feeds itself."""
    layers = [Population("x", "input", inputs)]
    layers += [Population(f"h{n}", "xylo", size, NEURON) for n, size in enumerate(hidden)]
    layers.append(Population("y", "xylo_out", readouts, NEURON))
    wires = [synapses(f"w{n}", a, b, np.ones((b.size, a.size), dtype=int)) for n, (a, b) in enumerate(pairwise(layers))]
    if loop:
        wires.append(synapses("loop", layers[-2], layers[-2], np.ones((hidden[-1], hidden[-1]), dtype=int), second=True))
    return SpikingGraph(tuple(layers), tuple(wires), ("y",))


@pytest.mark.parametrize(
    ("name", "hidden", "readouts", "synapses_each", "fanout", "reach"),
    [
        ("xylo_audio2", 1000, 8, 2, 64, 1000),
        ("xylo_audio3", 992, 32, 2, 1024, 128),
        ("xylo_imu", 496, 16, 1, 512, 128),
    ],
)
def test_limits_are_those_of_the_makers_table(name, hidden, readouts, synapses_each, fanout, reach):
    chip = load_pooled(name)
    assert (chip.inputs, chip.hidden, chip.readouts) == (16, hidden, readouts)
    assert (chip.synapses_per_neuron, chip.fanout) == (synapses_each, fanout)
    assert (chip.input_reach, chip.output_reach) == (reach, reach)
    assert all(entry.source and entry.date for entry in chip.provenance.values())
    assert load_pooled("xylo").name == "xylo_audio2"
    assert name in list_pooled()


def test_a_network_that_fits_says_what_it_takes():
    found = place_pooled(pooled_demand(network(hidden=(8, 6), loop=True)), "xylo")
    used = {name: limit.used for name, limit in found.used.items()}
    assert used == {
        "inputs": 4,
        "hidden": 14,
        "readouts": 2,
        "synapses_per_neuron": 2,
        "fanout": 6,
        "recurrent_entries": 8 * 6 + 6 * 6,
        "input_reach": 8,
        "output_reach": 6,
    }
    assert str(found.binding) == "inputs 4 of 16 (25.00 %)"
    assert any("recurrent_entries is inferred" in note for note in found.notes)


@pytest.mark.parametrize(
    ("given", "chip", "message"),
    [
        ({"inputs": 17}, "xylo", r"does not fit: inputs 17 of 16\. .*fewer input channels"),
        ({"hidden": (1001,)}, "xylo", r"hidden 1,001 of 1,000\. .*smaller hidden layers"),
        ({"readouts": 10}, "xylo", r"readouts 10 of 8\. .*chip xylo_audio3; chip xylo_imu"),
        ({"hidden": (70, 70)}, "xylo", r"\(neuron 0 of population 'h0'\) .* fanout 70 of 64\. .*chip xylo_audio3"),
        ({"hidden": (8,), "loop": True}, "xylo_imu", r"synapses_per_neuron 2 of 1\. .*one synapse per hidden neuron"),
        (
            {"hidden": (200,)},
            "xylo_audio3",
            r"input_reach 200 of 128\. .*narrower first layer; chip xylo_audio2; a narrower last hidden layer \(output_re",
        ),
        ({"hidden": (600, 60)}, "xylo", r"recurrent_entries 36,000 of 32,000"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(given, chip, message):
    with pytest.raises(DoesNotFit, match=message):
        place_pooled(pooled_demand(network(**given)), chip)


def test_a_damaged_data_file_is_refused(tmp_path: Path):
    import hardware

    content = yaml.safe_load((Path(hardware.__file__).parent / "pools" / "xylo_imu.yaml").read_text())
    for change, message in (
        (lambda entry: entry["limits"]["fanout"].update(value=0), "fanout: expected a whole number above zero, got 0"),
        (lambda entry: entry["limits"]["fanout"].pop("source"), "missing key"),
        (lambda entry: entry["limits"].pop("inputs"), "missing key"),
        (lambda entry: entry["limits"].update(cores=1), "unknown key"),
    ):
        copy = yaml.safe_load(yaml.safe_dump(content))
        change(copy)
        path = tmp_path / "xylo_imu.yaml"
        path.write_text(yaml.safe_dump(copy))
        with pytest.raises(DataFileError, match=message):
            load_pooled(path)


def test_the_commands_place_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, wide = tmp_path / "good.graph.npz", tmp_path / "wide.graph.npz"
    save_graph(network(hidden=(8, 6), loop=True), good)
    save_graph(network(inputs=17), wide)
    assert place_command.main([str(good), "--chip", "xylo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["used"]["hidden"] == [14, 1000]
    assert place_command.main([str(wide), "--chip", "xylo"]) == 1
    assert "wide on XyloAudio 2 (SYNS61201) does not fit: inputs 17 of 16" in capsys.readouterr().err
    assert place_command.main([str(good), "--chip", "xylo", "--chips", "2"]) == 2
    assert "--chips goes with chips of cores" in capsys.readouterr().err
    assert place_command.main([str(good)]) == 2
    assert "is of Xylo" in capsys.readouterr().err
    lif = Population("l", "lif", 2, {"du": 0, "dv": 0, "vth": 1})
    loihi = SpikingGraph((Population("x", "input", 2), lif), (Projection("w", "x", "l", "a_in", [[2, 2], [2, 2]]),), ("l",))
    save_graph(loihi, tmp_path / "loihi.graph.npz")
    for main in (place_command.main, verify_command.main):
        assert main([str(tmp_path / "loihi.graph.npz"), "--chip", "xylo"]) == 2
        assert "population 'l' (lif) is no part of a Xylo network" in capsys.readouterr().err
    python_of(client.ENV_PYTHON, ".venv-xylo", "xylo")
    assert verify_command.main([str(good), "--steps", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["graphs"]["good"]
    assert found["equal"]
    assert found["expected"].startswith("xylosim 0.1.3")
