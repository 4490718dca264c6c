"""`spikegate account`: the table and the document say what `graph_account` found; wrong commands are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from neuro.accounting.account import graph_account
from neuro.graph import Population, Projection, SpikingGraph, save_graph

LIF = {"du": 4095, "dv": 0, "vth": 20}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SpikingGraph, np.ndarray]:
    """net.graph.npz and in.npz in the working folder; a document that is too long for a line goes there too."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    graph = SpikingGraph(
        [Population("x", "input", 4), Population("h", "lif", 6, LIF)],
        [Projection("w", "x", "h", "a_in", 2 * rng.integers(-20, 30, (6, 4)))],
        ["h"],
    )
    save_graph(graph, tmp_path / "net.graph.npz")
    x = rng.integers(0, 2, (3, 10, 4))
    np.savez(tmp_path / "in.npz", x=x)
    return graph, x


def whole(line: str) -> dict:
    found = json.loads(line)
    return json.loads(Path(found["file"]).read_text()) if "file" in found else found


def test_the_document_is_the_account(files: tuple[SpikingGraph, np.ndarray], capsys: pytest.CaptureFixture) -> None:
    graph, x = files
    assert main(["account", "net.graph.npz", "in.npz", "--chip", "loihi1", "--json"]) == 0
    line = capsys.readouterr().out
    assert len(line.splitlines()) == 1
    document, want = whole(line), graph_account(graph, {"x": x}, chip="loihi1")
    assert document.items() >= json.loads(json.dumps(want.to_dict())).items()
    assert (document["chip"], document["chips"], document["cores"]) == ("loihi1", 1, 1)
    assert document["per_sample"]["events"] == x.sum() / 3
    assert {one["kind"] for one in document["energy"]} == {"modelled"}
    assert all(one["source"] for one in document["energy"] + document["latency"])
    assert json.loads(line)["energy_j"].keys() >= {"loihi1_davies2018", "digital45_int8_sram every step"}


def test_the_table_and_the_options(files: tuple[SpikingGraph, np.ndarray], capsys: pytest.CaptureFixture) -> None:
    _, x = files
    assert main(["account", "net.graph.npz", "in.npz", "--steps", "4", "--profile", "loihi1_sanafe"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("net.graph.npz: 3 samples of 4 steps, simulated (ours, lava)")
    assert "loihi1_davies2018" not in out.splitlines()[-1]
    assert whole(out.splitlines()[-1])["per_sample"]["events"] == x[:, :4].sum() / 3
    rows = [line for line in out.splitlines() if line.startswith("energy, ")]
    assert [row.split("  ")[0] for row in rows] == [
        "energy, loihi1_sanafe",
        "energy, digital45_int8_sram, dense once a sample",
        "energy, digital45_int8_sram, dense every step",
    ]
    assert main(["account", "net.graph.npz", "in.npz", "--profile", "all"]) == 0
    assert "gpu_h100_sheet, dense every step" in capsys.readouterr().out


def test_a_graph_without_inputs_needs_steps(tmp_path: Path, capsys: pytest.CaptureFixture, files: object) -> None:
    save_graph(
        SpikingGraph([Population("a", "lif", 2, {**LIF, "bias_mant": 700})], [], ["a"]), tmp_path / "alone.graph.npz"
    )
    assert main(["account", "alone.graph.npz", "--steps", "6"]) == 0
    capsys.readouterr()
    assert main(["account", "alone.graph.npz"]) == 2
    assert "nothing says how long to run; give --steps N" in capsys.readouterr().err
    assert main(["account", "alone.graph.npz", "in.npz"]) == 2
    assert "leave the file out and give --steps N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["net.graph.npz"], "no input file; name an .npz with an array for each input population: x"),
        (["net.graph.npz", "in.npz", "--steps", "11"], "--steps is 11, and array 'x' of in.npz has 10 steps"),
        (["net.graph.npz", "in.npz", "--steps", "0"], "--steps is 0; at least 1"),
        (["net.graph.npz", "in.npz", "--chips", "0"], "--chips is 0"),
        (["net.graph.npz", "in.npz", "--chip", "loihi3"], "loihi3"),
        (["net.graph.npz", "in.npz", "--profile", "nothing"], "nothing"),
        (["net.graph.npz", "in.npz", "--device", "tpu"], "--device is 'tpu', which is none"),
        (["no.graph.npz", "in.npz"], "no.graph.npz"),
        (["net.graph.npz", "net.graph.npz"], "is unknown; the graph's inputs are: x"),
    ],
)
def test_wrong_commands(files: object, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert main(["account", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_graph_that_does_not_fit(tmp_path: Path, files: object, capsys: pytest.CaptureFixture) -> None:
    graded = SpikingGraph(
        [Population("x", "input", 1), Population("a", "graded", 2, {"vth": 0})],
        [Projection("w", "x", "a", "a_in", np.array([[2], [2]]), num_message_bits=8)],
        ["a"],
    )
    save_graph(graded, tmp_path / "graded.graph.npz")
    np.savez(tmp_path / "one.npz", x=np.ones((1, 2, 1), dtype=int))
    assert main(["account", "graded.graph.npz", "one.npz", "--chip", "loihi1"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"] is False
