"""`spikegate import NAME.nir`: the graph, its messages, and what is refused without leaving anything behind."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.commands import importing, place, simulate
from neuro.exchange.nir import from_nir, load_nir
from neuro.graph import load_graph
from tests.published import published

nir = pytest.importorskip("nir")
made_ = import_module("tests.neuro.exchange.nir_made")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shape = (2, 5, 4)
    node = made_.conv(rng, shape, 3, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    edges, nodes = made_.chain(
        ("c", node),
        ("n", made_.neurons("LIF", rng, (3, 5, 4))),
        ("flat", nir.Flatten({"input": np.array([3, 5, 4])}, 0, -1)),
        ("fc", nir.Affine(rng.normal(0, 0.3, (4, 60)), np.full(4, 0.1))),
        ("m", made_.neurons("CubaLIF", rng, (4,))),
    )
    whole = made_.graph(edges, shape, **nodes)
    nir.write(tmp_path / "net.nir", whole)
    np.save(tmp_path / "in.npy", (rng.random((3, 20, *shape)) < 0.3).astype(np.uint8))
    return tmp_path / "net.nir"


def test_a_file_goes_through_import_simulate_and_place(file, capsys):
    folder = file.parent
    options = ["--steps", "20", "--pieces", "auto", "--calibration", str(folder / "in.npy")]
    assert importing.main([str(file), *options, "--messages", str(folder / "m.npz")]) == 0
    out = capsys.readouterr().out
    assert "check: 3 given samples of 20 steps" in out
    assert "dense projections store their zeros" in out
    graph = load_graph(folder / "net.graph.npz")
    assert [p.kind for p in graph.projections if p.source == "x"] == ["conv"]
    assert graph.meta["nir"]["input"] == {"name": "input", "layer": "x", "shape": [2, 5, 4], "grid": True}
    assert simulate.main([str(folder / "net.graph.npz"), str(folder / "m.npz"), "--out", str(folder / "r.npz")]) == 0
    samples = torch.from_numpy(np.load(folder / "in.npy").astype(np.float64))
    network = from_nir(load_nir(file), steps=20, calibration=samples, pieces="auto")
    values, _ = network.run(samples)
    with np.load(folder / "r.npz") as result:
        sent = torch.from_numpy(result["m/spikes"])
    np.testing.assert_array_equal(network.collect(sent, "out_m").numpy(), values["out_m"].numpy())
    assert values["out_m"].sum() > 5
    assert place.main([str(folder / "net.graph.npz"), "--chip", "loihi2"]) == 0


REFUSED = {
    "steps": ([], 1, "convert with steps=T"),
    "calibration's shape": (["--steps", "20", "--calibration", "flat.npy"], 1, r"(samples, steps, 2, 5, 4) is needed"),
    "calibration is text": (["--steps", "20", "--calibration", "text.npy"], 2, "no array of numpy"),
    "calibration is absent": (["--steps", "20", "--calibration", "none.npy"], 2, "none.npy"),
    "calibration of NaN": (["--steps", "20", "--calibration", "nan.npy"], 2, "holds NaN"),
    "calibration is an archive cut short": (["--steps", "20", "--calibration", "cut.npy"], 2, "cut.npy: no array of numpy"),
    "headroom": (["--steps", "20", "--headroom-bits", "nan"], 1, "headroom_bits is nan"),
    "an option of .net": (["--steps", "20", "--reset-interval", "4"], 2, "--reset-interval belongs to .net files, and"),
    "messages of nothing": (["--steps", "20", "--messages", "m.npz"], 2, "--calibration"),
    "dt": (["--steps", "20", "--dt", "0.1"], 1, "shorter than the step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing_behind(case, file, capsys, monkeypatch):
    options, code, message = REFUSED[case]
    monkeypatch.chdir(file.parent)
    np.save("flat.npy", np.ones((3, 20, 40)))
    np.save("nan.npy", np.full((3, 20, 2, 5, 4), np.nan))
    Path("text.npy").write_text("no numbers")
    Path("cut.npy").write_bytes(b"PK\x03\x04 and no more")
    before = sorted(file.parent.iterdir())
    assert importing.main([str(file), *options]) == code
    assert message in capsys.readouterr().err
    assert sorted(file.parent.iterdir()) == before


@pytest.mark.parametrize(("key", "value"), [("fc/weight", np.nan), ("m/tau", 0.0)])
def test_a_file_with_values_that_nothing_computes_with_is_a_wrong_file(key, value, tmp_path, capsys):
    import h5py
    import nir

    rng = np.random.default_rng(1)
    edges, nodes = made_.chain(("fc", nir.Linear(rng.normal(size=(6, 4)))), ("m", made_.neurons("LIF", rng, (6,))))
    nir.write(tmp_path / "x.nir", made_.graph(edges, (4,), **nodes))
    assert importing.main([str(tmp_path / "x.nir"), "--steps", "5"]) == 0
    with h5py.File(tmp_path / "x.nir", "a") as file:
        file[f"node/nodes/{key}"][...] = value
    assert importing.main([str(tmp_path / "x.nir"), "--steps", "5"]) == 2
    assert key.replace("fc/", "").replace("m/", "") in capsys.readouterr().err


def test_the_published_network_takes_nine_cores(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "in.npy", rng.random((2, 100, 2, 34, 34)) < 0.02)
    graph = tmp_path / "cnn.graph.npz"
    given = [str(published("nir_paper/cnn_sinabs.nir")), "--steps", "100", "--out", str(graph)]
    assert importing.main([*given, "--calibration", str(tmp_path / "in.npy")]) == 0
    capsys.readouterr()
    assert place.main([str(graph), "--chip", "loihi2"]) == 0
    document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (document["cores_used"], document["chips"]) == (9, 1)
    assert document["synops_per_step"] == 843_296
