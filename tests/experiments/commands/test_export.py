"""`spikegate export` and `spikegate import`: graphs, plans and files of other tools."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments import cli
from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import convert
from neuro.conversion.lif import convert_lif
from neuro.conversion.plan import save_plan
from neuro.graph import Population, Projection, SpikingGraph, identical, load_graph, save_graph
from neuro.modules.spiking import SpikingClassifier, predicted, rate_code
from neuro.simulators.fixed_point import simulate

nir = pytest.importorskip("nir")
pytest.importorskip("snntorch")
STEPS = 12


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = SpikingClassifier((8, 16, 3), beta=0.9, bias=False)
    with torch.no_grad():
        for layer in model.layers:
            layer.linear.weight.mul_(3)
    return model


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def test_a_spiking_classifier_goes_out_and_comes_back(classifier, tmp_path, capsys):
    network = convert_lif([(layer.linear, layer.neuron) for layer in classifier.layers], steps=STEPS)
    save_graph(network.graph, tmp_path / "net.graph.npz")
    assert run("export", tmp_path / "net.graph.npz", "--reader", "snntorch") == 0
    assert last(capsys)["written"] == {"net": str(tmp_path / "net.nir")}
    assert run("import", tmp_path / "net.nir", "--out", tmp_path / "back.graph.npz") == 0
    assert last(capsys)["from"] == "integers"
    assert identical(load_graph(tmp_path / "back.graph.npz"), network.graph)

    assert run("import", tmp_path / "net.nir", "--nodes", "--steps", STEPS, "--out", tmp_path / "nodes.graph.npz") == 0
    assert last(capsys)["from"] == "nodes"
    x = rate_code(torch.rand(200, 8, generator=torch.Generator().manual_seed(1)), STEPS)
    classes = [
        predicted(network.collect(simulate(graph, network.present(x)).spikes["layer2"]))
        for graph in (network.graph, load_graph(tmp_path / "nodes.graph.npz"))
    ]
    assert len(set(classes[0].tolist())) > 1
    assert (classes[0] == classes[1]).float().mean() > 0.95


@pytest.fixture
def plan_folder(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )
    x = torch.randn(1, 40, 6)
    report = analyse(model, x, "loihi2")
    calibration = calibrate(model, [x])
    save_plan(convert(model, calibration, report), tmp_path / "graded" / "plan")
    from neuro.conversion.rate import RateConfig
    from neuro.conversion.rate import convert as to_rate

    for reset in ("hard", "soft"):
        save_plan(to_rate(model, calibration, report, RateConfig(time_steps=8, reset=reset)), tmp_path / reset)
    return tmp_path


def test_a_plan_is_one_file_a_segment(plan_folder, capsys):
    assert run("export", plan_folder / "graded") == 1
    printed = capsys.readouterr()
    assert "graded_relu): NIR has no ReLU" in printed.err
    assert not (plan_folder / "graded" / "nir").exists()
    assert run("export", plan_folder / "graded", "--skip") == 0
    found = last(capsys)
    assert len(found["written"]) == len(found["refused"]) == 1
    (path,) = found["written"].values()
    made = nir.read(path)
    assert {type(node).__name__ for node in made.nodes.values()} == {"Input", "Linear", "Output"}
    assert json.loads(made.metadata["spikegate"]["segment"])["n_out"] == 2


def test_the_rate_route_goes_out_with_hard_reset_alone(plan_folder, capsys):
    assert run("export", plan_folder / "hard", "--out", plan_folder / "out", "--reader", "norse") == 0
    found = last(capsys)
    assert found["refused"] == {}
    for path in found["written"].values():
        made = nir.read(path)
        assert "IF" in {type(node).__name__ for node in made.nodes.values()}
        assert made.metadata["spikegate"]["steps"] == 8
    assert run("export", plan_folder / "soft", "--out", plan_folder / "soft_out") == 1
    assert "lif_soft): NIR resets to v_reset" in capsys.readouterr().err


def test_a_reader_that_would_not_do_is_named(tmp_path, capsys):
    graph = SpikingGraph(
        [Population("x", "input", 1), Population("n", "lif", 1, {"du": 4095, "dv": 0, "vth": 3})],
        [Projection("w", "x", "n", "a_in", np.array([[2]]))],
        ["n"],
    )
    path = save_graph(graph, tmp_path / "if.graph.npz")
    assert run("export", path, "--reader", "snntorch") == 1
    assert "'n' (IF): snntorch becomes Leaky" in capsys.readouterr().err
    assert run("export", path, "--reader", "norse") == 0


def test_wrong_words_and_files_are_answered(tmp_path, capsys):
    (tmp_path / "text.nir").write_text("nothing")
    (tmp_path / "empty").mkdir()
    cases = [
        (("export", tmp_path / "none.graph.npz"), "no such file"),
        (("export", tmp_path / "empty"), "neither a plan nor a training run"),
        (("import", tmp_path / "none.nir"), "no such file"),
        (("import", tmp_path / "empty"), "empty: is a folder; name a file"),
        (("import", tmp_path / "text.nir"), "not a readable NIR file"),
        (("import", tmp_path / "text.nir", "--dt", "0"), "longer than 0 s"),
        (("import", tmp_path / "text.nir", "--steps", "0"), "--steps is 0; a sample has at least 1 step"),
        (("import", tmp_path / "text.nir", "--input-scale", "nan"), "--input-scale is nan; a finite number above 0"),
        (("import", tmp_path / "text.nir", "--out", tmp_path / "x.npz"), "text.nir"),
    ]
    for words, message in cases:
        assert run(*words) == 2
        assert message in capsys.readouterr().err


def test_nodes_that_the_chip_lacks_are_named(tmp_path, capsys):
    li = nir.LI(tau=np.full(2, 1e-3), r=np.ones(2), v_leak=np.zeros(2))
    nir.write(str(tmp_path / "li.nir"), nir.NIRGraph.from_list(nir.Linear(weight=np.ones((2, 3))), li))
    assert run("import", tmp_path / "li.nir") == 1
    assert "no spiking neurons; LIF, IF" in capsys.readouterr().err  # a read-out alone
    assert not (tmp_path / "li.graph.npz").exists()
