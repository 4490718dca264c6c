"""The place command: table, JSON as the last line, picture, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.commands.place import main
from experiments.views.chip_figure import chip_figure
from hardware.placement import Connection, LayerDemand, place
from neuro.graph import Population, SpikingGraph, save_graph
from neuro.graph.synapses import Projection
from tests.experiments.console import document as printed


@pytest.fixture
def graph(tmp_path):
    rng = np.random.default_rng(0)
    lif = {"du": 0, "dv": 0, "vth": 4}
    made = SpikingGraph(
        (Population("in", "input", 100), Population("h", "lif", 900, lif), Population("o", "lif", 10, lif)),
        (
            Projection("a", "in", "h", "a_in", 2 * rng.integers(-127, 127, (900, 100))),
            Projection("b", "h", "o", "a_in", 2 * rng.integers(-127, 127, (10, 900))),
        ),
        ("o",),
    )
    return save_graph(made, tmp_path / "net.graph.npz")


def command(*words: object) -> int:
    return main([str(word) for word in words])


def last(capsys) -> dict:
    return printed(capsys.readouterr().out)


def test_it_fits(graph, capsys):
    assert command(graph, "--chip", "loihi2") == 0
    out = capsys.readouterr().out
    assert "3 of 128 cores on 1 chip" in out
    assert "inferred from published compiler output" in out
    document = printed(out)
    assert document["fits"]
    assert document["cores_used"] == 3
    assert [len(layer["cores"]) for layer in document["layers"]] == [2, 1]


def test_json_alone(graph, capsys):
    assert command(graph, "--chip", "loihi1", "--budget", "nengo", "--json") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert json.loads(out)["budget"] == "nengo"


def test_measured_traffic(graph, tmp_path, capsys):
    np.savez(tmp_path / "run.npz", **{"in": np.random.default_rng(1).integers(0, 2, (2, 10, 100))})
    assert command(graph, "--input", tmp_path / "run.npz", "--json") == 0
    document = last(capsys)
    assert document["measured"]
    assert 0 < document["synops_per_step"] < 99_000


def test_a_folder_of_graphs(graph, capsys):
    (graph.parent / "two.graph.npz").write_bytes(graph.read_bytes())
    assert command(graph.parent, "--json") == 0
    document = last(capsys)
    assert document["cores_used"] == 6
    assert {layer["name"] for layer in document["layers"]} == {"net/h", "net/o", "two/h", "two/o"}


def test_it_does_not_fit(tmp_path, capsys):
    rng = np.random.default_rng(0)
    made = SpikingGraph(
        (Population("in", "input", 4), Population("x", "graded", 8, {"vth": 0}), Population("y", "graded", 8, {"vth": 0})),
        (
            Projection("a", "in", "x", "a_in", 2 * rng.integers(0, 9, (8, 4))),
            Projection("b", "x", "y", "a_in", 2 * rng.integers(0, 9, (8, 8)), num_message_bits=16),
        ),
        ("y",),
    )
    path = save_graph(made, tmp_path / "x.graph.npz")
    assert command(path, "--chip", "loihi1") == 1
    document = last(capsys)
    assert document["fits"] is False
    assert document["limit"] == {"resource": "payload_bits", "need": 16, "have": 1}  # the shape of compat's refusal
    assert "a chip with graded messages: loihi2" in document["remedies"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "place: nowhere: no such file or folder\n"),
        (["GRAPH", "--chip", "loihi3"], "shipped names: loihi1, loihi2"),
        (["GRAPH", "--chips", "0"], "chips is 0"),
        (["GRAPH", "--budget", "nengo"], "no budget 'nengo'"),
        (["GRAPH", "--input", "GRAPH"], "no array 'in'"),
        (["GRAPH", "--figure", "GRAPH.doc"], "doc"),
    ],
)
def test_wrong_commands(graph, capsys, words, message):
    assert command(*(word.replace("GRAPH", str(graph)) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_a_truncated_file(graph, capsys):
    graph.write_bytes(graph.read_bytes()[:200])
    assert command(graph) == 2
    assert "not a readable graph file" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure(graph, tmp_path, capsys, ending):
    assert command(graph, "--figure", tmp_path / f"chip.{ending}") == 0
    assert (tmp_path / f"chip.{ending}").stat().st_size > 5000
    assert last(capsys)["fits"]


def test_the_figure_draws_every_core_with_its_layer():
    demands = [LayerDemand("in", 1024, on_chip=False), LayerDemand("l", 7000, (Connection("in", 1024),))]
    placement = place(demands, "loihi2")
    assert placement.chips == 2
    picture = chip_figure(placement)
    first, second = picture.axes[:2]
    assert [len(ax.patches) for ax in (first, second)] == [128, 128]
    assert len(first.texts) + len(second.texts) == len(placement.cores)
    assert {text.get_text() for text in first.texts} == {"A"}
    fills = {patch.get_facecolor() for patch in first.patches}
    assert len(fills) > 1 or len(first.texts) == 128
