"""`spikegate import NAME.nir --chip xylo`, then verify, place and account of what it wrote."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments.commands import importing, place, verify
from neuro.graph import load_graph
from neuro.simulators.xylo import client
from tests.environments import python_of

nir = pytest.importorskip("nir")
made_ = import_module("tests.neuro.exchange.nir_made")


def written(folder: Path, channels: int = 4, hidden: int = 6) -> Path:
    """12 samples of a network with a current-based layer and a loop, whose steps are 1e-4 s."""
    rng = np.random.default_rng(0)

    def cuba(size: int, alpha: float, beta: float) -> object:
        tau_syn, tau_mem = 1e-4 / (1 - alpha), 1e-4 / (1 - beta)
        ones = np.ones(size)
        return nir.CubaLIF(
            tau_syn=tau_syn * ones, tau_mem=tau_mem * ones, r=tau_mem / 1e-4 * ones, v_leak=0 * ones, v_threshold=ones,
            w_in=tau_syn / 1e-4 * ones,
        )  # fmt: skip

    edges, nodes = made_.chain(
        ("fc", nir.Linear(rng.normal(0.08, 0.12, (hidden, channels)))),
        ("h", cuba(hidden, 0.5, 0.75)),
        ("out", nir.Linear(rng.normal(0.05, 0.2, (3, hidden)))),
        ("y", cuba(3, 0.5, 0.875)),
    )
    nodes["loop"] = nir.Linear(rng.normal(0, 0.05, (hidden, hidden)))
    ends = {"input": nir.Input({"input": np.array([channels])}), "result": nir.Output({"output": np.array([3])})}
    edges += [("h", "loop"), ("loop", "h"), ("y", "result")]
    nir.write(folder / "net.nir", nir.NIRGraph({**ends, **nodes}, edges, type_check=False))
    np.save(folder / "in.npy", (rng.random((6, 25, channels)) < 0.4).astype(np.uint8))
    return folder / "net.nir"


def last(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.filterwarnings("ignore::neuro.conversion.spiking.convert.PrecisionWarning")
def test_a_file_goes_onto_xylo_and_through_verify_and_place(tmp_path, capsys):
    file, messages, graph = written(tmp_path), tmp_path / "m.npz", tmp_path / "net.graph.npz"
    options = ["--chip", "xylo", "--reset", "subtract", "--calibration", str(tmp_path / "in.npy")]
    assert importing.main([str(file), *options, "--messages", str(messages)]) == 0
    out = capsys.readouterr().out
    assert "h (xylo): asked alpha 0.5, beta 0.75; there: currents keep 0.5, v keeps 0.75" in out
    assert "check: 6 given samples of 25 steps" in out
    assert {p.kind for p in load_graph(graph).populations} == {"input", "xylo", "xylo_out"}
    assert place.main([str(graph), "--chip", "xylo"]) == 0
    capsys.readouterr()
    python_of(client.ENV_PYTHON, ".venv-xylo", "xylo")
    assert verify.main([str(graph), str(messages), "--chip", "xylo"]) == 0
    out = capsys.readouterr().out
    assert "net: fits XyloAudio 2 (SYNS61201), nearest to its limit in" in out
    assert last(out)["graphs"]["net"]["equal"]


def test_what_does_not_fit_or_belongs_to_loihi_is_refused_and_nothing_is_written(tmp_path, capsys):
    wide = written(tmp_path, channels=17)
    assert importing.main([str(wide), "--chip", "xylo", "--reset", "subtract"]) == 1
    told = capsys.readouterr()
    assert "inputs 17 of 16" in told.err
    assert last(told.out)["limit"] == {"resource": "inputs", "need": 17, "have": 16}
    file = written(tmp_path)
    assert importing.main([str(file), "--chip", "xylo"]) == 1
    assert "its v goes to 0 with a spike" in capsys.readouterr().err
    assert importing.main([str(file), "--chip", "xylo", "--pieces", "2"]) == 2
    assert "--pieces belongs to Loihi, and the chip is xylo; leave it out" in capsys.readouterr().err
    assert importing.main([str(file), "--chip", "xylo", "--calibration", str(tmp_path / "in.npy"), "--dt", "-1"]) == 2
    assert not list(tmp_path.glob("*.graph.npz"))


def test_verify_says_which_chips_a_network_is_too_large_for(tmp_path, capsys):
    from neuro.graph import Population, SpikingGraph, save_graph
    from neuro.graph.xylo import synapses

    python_of(client.ENV_PYTHON, ".venv-xylo", "xylo")
    params = {"dash_mem": 2, "dash_syn": 2, "vth": 100}
    x, h, y = Population("x", "input", 2), Population("h", "xylo", 994, params), Population("y", "xylo_out", 1, params)
    into = synapses("in", x, h, np.eye(994, 2, dtype=int) * 50)
    graph = SpikingGraph((x, h, y), (into, synapses("out", h, y, np.eye(1, 994, dtype=int) * 50)), ("y",))
    save_graph(graph, tmp_path / "wide.graph.npz")
    assert verify.main([str(tmp_path / "wide.graph.npz"), "--steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "wide: fits XyloAudio 2" in out
    assert "wide: DOES NOT FIT XyloAudio 3 (SYNS65302): hidden 994 of 992" in out
    assert "hidden 994 of 496" in last(out)["graphs"]["wide"]["limits"]["xylo_imu"]
