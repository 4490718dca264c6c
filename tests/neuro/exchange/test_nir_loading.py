"""Files that older versions of nir wrote, or that leave something out: read where one meaning is left, else refused."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuro.exchange.nir import NirFileError, load_nir
from neuro.exchange.nir.loading import load_with_notes
from tests.published import published

h5py = pytest.importorskip("h5py")
nir = pytest.importorskip("nir")
made_ = import_module("tests.neuro.exchange.nir_made")
PUBLISHED = ("cnn_sinabs", "lif_norse", "braille_noDelay_bias_zero", "braille_noDelay_noBias_subtract")
KINDS = ("LIF", "IF", "CubaLIF", "LI", "CubaLI", "I", "Threshold")


def every_kind() -> Any:
    """One graph with a node of every type that nir has."""
    rng = np.random.default_rng(0)
    nodes: dict[str, Any] = {kind: made_.neurons(kind, rng, (6,)) for kind in KINDS}
    nodes |= {
        "Linear": nir.Linear(np.ones((6, 4))),
        "Affine": nir.Affine(np.ones((6, 4)), np.ones(6)),
        "Scale": nir.Scale(np.ones(6)),
        "Conv1d": nir.Conv1d(9, np.ones((4, 3, 3)), 2, 1, 1, 1, np.ones(4)),
        "Conv2d": made_.conv(rng, (2, 5, 5), 3),
        "same": made_.conv(rng, (2, 5, 5), 3, padding="same", stride=(1, 1)),
        "Flatten": nir.Flatten({"input": np.array([3, 5, 5])}, 0, -1),
        "SumPool2d": made_.pool("SumPool2d", 2),
        "AvgPool2d": made_.pool("AvgPool2d", 3, 2, 1),
        "Delay": nir.Delay(np.full(6, 1e-4)),
        "NIRGraph": made_.graph([("input", "n")], (6,), n=made_.neurons("LIF", rng, (6,))),
    }
    nodes["Input"], nodes["Output"] = nir.Input({"input": np.array([4])}), nir.Output({"output": np.array([6])})
    return nir.NIRGraph(nodes, [("Input", "Linear"), ("Linear", "LIF")], type_check=False)


def same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, nir.NIRGraph):
        assert sorted(first.edges) == sorted(second.edges)
        assert set(first.nodes) == set(second.nodes)
        for name, node in first.nodes.items():
            same(node, second.nodes[name])
        return
    ours, theirs = first.to_dict(), second.to_dict()
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        if key != "metadata":
            np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[key]), err_msg=key)


def test_every_node_is_read_as_nir_reads_it(tmp_path):
    whole = every_kind()
    library = {name for name in dir(nir) if isinstance(getattr(nir, name), type)}
    library = {name for name in library if issubclass(getattr(nir, name), nir.NIRNode)} - {"NIRNode"}
    assert {type(node).__name__ for node in whole.nodes.values()} == library
    nir.write(tmp_path / "all.nir", whole)
    loaded = load_with_notes(tmp_path / "all.nir")
    same(loaded.graph, nir.read(tmp_path / "all.nir", type_check=False))
    assert not loaded.notes


@pytest.mark.parametrize(
    "name", ["cnn_sinabs", "lif_norse", "braille_noDelay_bias_zero", "braille_noDelay_noBias_subtract"]
)
def test_published_files_are_read_as_nir_reads_them(name):
    path = published(f"nir_paper/{name}.nir")
    loaded = load_with_notes(path)
    same(loaded.graph, nir.read(path, type_check=False))
    assert not loaded.notes


def written(tmp_path: Path, **nodes: Any) -> Path:
    edges, named = made_.chain(*nodes.items())
    path = tmp_path / "x.nir"
    nir.write(path, made_.graph(edges, (4,), **named))
    return path


def neuron(kind: str = "CubaLIF") -> Any:
    return made_.neurons(kind, np.random.default_rng(1), (6,))


def test_what_has_one_meaning_is_read_and_said(tmp_path):
    rng = np.random.default_rng(2)
    path = written(tmp_path, fc=nir.Affine(rng.normal(size=(6, 4)), np.zeros(6)), n=neuron())
    expected = load_nir(path)
    with h5py.File(path, "a") as file:
        part = file["node/nodes/n"]
        tau = float(part["tau_mem"][0])
        for key in ("tau_mem", "v_reset", "w_in"):
            del part[key]
        part["tau_mem"] = tau
        del file["node/nodes/fc/bias"]
        part["input_type"] = [6]
        del file["node/nodes/input/shape"]
    loaded = load_with_notes(path)
    found = loaded.graph.nodes["n"]
    np.testing.assert_array_equal(found.tau_mem, expected.nodes["n"].tau_mem)
    np.testing.assert_array_equal(found.v_reset, np.zeros(6))
    np.testing.assert_array_equal(found.w_in, np.ones(6))
    assert type(loaded.graph.nodes["fc"]).__name__ == "Linear"
    assert loaded.graph.nodes["input"].input_type == {"input": None}
    assert sorted(loaded.notes) == [
        "node 'fc': an Affine without bias is a Linear",
        "node 'n': one tau_mem for all its neurons",
        "node 'n': without w_in, which is w_in 1",
    ]


def test_a_flatten_that_counts_the_samples_is_known_by_what_follows(tmp_path):
    flat = nir.Flatten({"input": np.array([2, 2, 3])}, start_dim=1, end_dim=-1)
    for width, expected in ((12, 0), (6, 1)):
        path = written(tmp_path, flat=flat, fc=nir.Linear(np.ones((6, width))), n=neuron())
        loaded = load_with_notes(path)
        assert int(loaded.graph.nodes["flat"].start_dim) == expected
        assert bool(loaded.notes) == (expected == 0)


def test_an_identity_which_nir_has_and_cannot_read_is_read(tmp_path):
    path = written(tmp_path, same=nir.Scale(np.ones(4)), fc=nir.Linear(np.ones((6, 4))), n=neuron())
    with h5py.File(path, "a") as file:
        part = file["node/nodes/same"]
        del part["type"], part["scale"]
        part["type"], part["shape"] = b"Identity", [4]
    with pytest.raises(AssertionError):
        nir.read(path, type_check=False)
    assert type(load_nir(path).nodes["same"]).__name__ == "Identity"


def _without(key: str):
    def change(file: Any) -> None:
        del file[key]

    return change


def _with(key: str, value: Any):
    def change(file: Any) -> None:
        if key in file:
            del file[key]
        file[key] = value

    return change


REFUSED = {
    "unknown node": (
        _with("node/nodes/fc/type", b"Transformer"),
        r"node 'fc' \(Transformer\): NIR has no such node; known: Aff",
    ),
    "no type": (_without("node/nodes/fc/type"), "node 'fc' has no type"),
    "no tau": (_without("node/nodes/n/tau_mem"), r"node 'n' \(CubaLIF\): tau_mem is missing, .* Write it into the file"),
    "no weight": (_without("node/nodes/fc/weight"), r"node 'fc' \(Linear\): weight is missing"),
    "another parameter": (_with("node/nodes/n/refractory", 3.0), r"node 'n' \(CubaLIF\): 'refractory' is no parameter"),
    "sizes": (_with("node/nodes/n/tau_mem", np.ones(5)), r"node 'n' \(CubaLIF\): nir does not take it: AssertionError"),
    "one axis": (_with("node/nodes/fc/weight", np.ones(5)), r"node 'fc' \(Linear\): nir does not take it"),
    "edges": (_with("node/edges", np.ones((2, 3))), r"edges have shape \(2, 3\)"),
    "no nodes": (_without("node/nodes"), "the graph '' has no nodes"),
    "no graph": (_without("node"), "holds no NIR graph"),
    "NaN": (_with("node/nodes/fc/weight", np.full((6, 4), np.nan)), r"node 'fc' \(Linear\): weight holds NaN or infinity"),
    "infinity": (_with("node/nodes/n/r", np.full(6, np.inf)), r"node 'n' \(CubaLIF\): r holds NaN or infinity"),
    "NaN threshold": (_with("node/nodes/n/v_threshold", np.full(6, np.nan)), r"v_threshold holds NaN"),
    "tau 0": (
        _with("node/nodes/n/tau_syn", np.zeros(6)),
        r"node 'n' \(CubaLIF\): tau_syn is 0 s; a time const",
    ),
    "one node": (_with("node/type", b"LIF"), "holds a single LIF node; a graph is needed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_mean_several_things_is_refused(case, tmp_path):
    change, message = REFUSED[case]
    path = written(tmp_path, fc=nir.Linear(np.ones((6, 4))), n=neuron())
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(NirFileError, match=message):
        load_nir(path)
