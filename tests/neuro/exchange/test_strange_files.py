"""Graphs, results, inputs, plans and exported programs from any bytes: a value, or one typed error within bounded memory.

HDF5 (NIR, .net) is read by a library in C, in a process of its own for each file (`test_hdf5.py`), which costs a tenth of a
second: fewer changed files are tried of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuro
from neuro.conversion.plan import PlanFileError, load_plan, save_plan
from neuro.conversion.spiking.description import NotConvertible
from neuro.exchange.exported import ExportedError, read_exported
from neuro.exchange.netx.errors import NetxFileError, NotInNetx
from neuro.exchange.netx.records import read_layers
from neuro.exchange.nir.describing import describe
from neuro.exchange.nir.library import DT_S, NirFileError, NotInNir
from neuro.exchange.nir.loading import load_nir
from neuro.graph import ArchiveError, GraphError, GraphFileError, load_graph, save_graph
from neuro.graph.archive import read_array
from neuro.simulators import fixed_point
from neuro.simulators.inputs import InputError
from neuro.simulators.results import ResultFileError, load_inputs, load_result, save_result
from tests import mutations
from tests.neuro.exchange import nir_made
from tests.shared import once

Read = Callable[[Path], Any]
GRAPH = "lif_loop"


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(parts: dict[str, bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


@st.composite
def archive_of(draw: st.DrawFn, whole: bytes, document: str, method: int) -> bytes:
    """A zip archive changed as bytes, or one whose document (JSON) or one other member is changed and packed again."""
    way = draw(st.sampled_from(["bytes", "document", "document", "member"]))
    if way == "bytes":
        return draw(mutations.bytes_of(whole))
    parts = members(whole)
    if way == "member":
        name = draw(st.sampled_from(sorted(parts)))
        return packed({**parts, name: draw(mutations.bytes_of(parts[name]))}, method)
    if not document.endswith(".npy"):
        return packed({**parts, document: draw(mutations.json_of(json.loads(parts[document])))}, method)
    header = json.loads(np.lib.format.read_array(io.BytesIO(parts[document])).tobytes())
    file = io.BytesIO()
    np.lib.format.write_array(file, np.frombuffer(draw(mutations.json_of(header)), dtype=np.uint8))
    return packed({**parts, document: file.getvalue()}, method)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def make(folder: Path) -> None:
    """One lawful file of each kind."""
    golden = Path(__file__).parents[1] / "golden" / "graphs" / f"{GRAPH}.graph.npz"
    graph = load_graph(golden)
    save_graph(graph, folder / "whole.graph.npz")
    rng = np.random.default_rng(1)
    inputs = {name: rng.integers(0, 2, (2, 5, graph.population(name).size)) for name in graph.inputs}
    np.savez_compressed(folder / "inputs.npz", **inputs)
    save_result(fixed_point.simulate(graph, inputs), folder / "result.npz")
    np.save(folder / "array.npy", rng.random((2, 3, 4)))
    module, x = network(), torch.rand(16, 6)
    torch.export.save(torch.export.export(module, (x,)), folder / "program.pt2")
    plan = neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, (x,)))
    save_plan(plan, folder / "plan")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "strange_neuro", make)


def cases(folder: Path) -> dict[str, tuple[str, st.SearchStrategy[bytes], Read, tuple[type[Exception], ...]]]:
    """Reader -> (name of the file, changed bytes, how it is read, what it may raise)."""
    graph = load_graph(folder / "whole.graph.npz")
    data = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    deflated, stored = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
    program = "program/models/model.json"
    plan = json.loads((folder / "plan" / "plan.json").read_text())
    header = "header.npy"
    return {
        "graph": (
            "x.graph.npz",
            archive_of(data["whole.graph.npz"], header, deflated),
            load_graph,
            (GraphFileError,),
        ),
        "result": ("x.npz", archive_of(data["result.npz"], header, deflated), load_result, (ResultFileError,)),
        "inputs": ("x.npz", mutations.bytes_of(data["inputs.npz"]), lambda p: load_inputs(p, graph), (InputError,)),
        "array": ("x.npy", mutations.bytes_of(data["array.npy"]), read_array, (ArchiveError,)),
        "program": ("x.pt2", archive_of(data["program.pt2"], program, stored), read_exported, (ExportedError,)),
        "plan": ("plan.json", mutations.json_of(plan), lambda p: load_plan(p.parent), (PlanFileError, GraphError)),
    }


KINDS = ("graph", "result", "inputs", "array", "program", "plan")


def hold_all(kind: str, whole: Path, folder: Path, examples: int) -> int:
    """How many of so many changed files were refused."""
    name, changed, read, errors = cases(whole)[kind]
    if kind == "plan":
        for path in (whole / "plan").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return mutations.refusals(changed, read, folder / name, errors, examples)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_read_or_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    assert hold_all(kind, whole, tmp_path, 60) > 20


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(kind: str, whole: Path, tmp_path: Path) -> None:
    assert hold_all(kind, whole, tmp_path, 4000) > 1000


HDF5 = {"nir": (load_nir, NirFileError), "net": (read_layers, NetxFileError)}


def hdf5_file(kind: str, path: Path) -> bytes:
    """A lawful file of the kind."""
    if kind == "net":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for name, value in {"0/type": "input", "0/shape": [4], "1/type": "dense", "1/weight": np.ones((6, 4)),
                                "1/shape": [6], "1/neuron/type": "CUBA", "1/neuron/vThMant": 64}.items():  # fmt: skip
                file[f"layer/{name}"] = value
    else:
        nir, rng = pytest.importorskip("nir"), np.random.default_rng(1)
        edges, nodes = nir_made.chain(("fc", nir.Linear(np.ones((6, 4)))), ("n", nir_made.neurons("LIF", rng, (6,))))
        nir.write(path, nir_made.graph(edges, (4,), **nodes))
    return path.read_bytes()


def hold_hdf5(kind: str, folder: Path, examples: int) -> int:
    read, error = HDF5[kind]
    path = folder / f"x.{kind}"
    whole = hdf5_file(kind, path)
    read(path)
    return mutations.refusals(mutations.bytes_of(whole), read, path, (error, NotInNetx), examples)


@pytest.mark.parametrize("kind", HDF5)
def test_changed_hdf5_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    assert hold_hdf5(kind, tmp_path, 12) > 3


@pytest.mark.soak
@pytest.mark.parametrize("kind", HDF5)
def test_much_changed_hdf5(kind: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    refused = hold_hdf5(kind, tmp_path, 1000)
    record_property("soak", {"what": f"changed .{kind} files, {refused} refused", "tried": 1000})
    assert refused > 300


VALUES = (
    np.nan,
    0.0,
    -1.0,
    1e308,
    b"text",
    np.zeros((0,)),
    np.ones(3),
    np.ones((2, 2, 2)),
    np.array([1 + 1j]),
    True,
    2**62,
)


@pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_nir_file_with_strange_values_is_read_or_refused(soak: bool, tmp_path: Path) -> None:
    """Whole HDF5, other values at one or two of its places; what is read is described or refused by its node's name."""
    h5py, nir = pytest.importorskip("h5py"), pytest.importorskip("nir")
    rng = np.random.default_rng(1)
    spiking = [nir_made.neurons(kind, rng, (6,)) for kind in ("CubaLIF", "LIF")]
    edges, nodes = nir_made.chain(
        ("fc", nir.Affine(rng.normal(size=(6, 4)), np.zeros(6))), ("n", spiking[0]), ("m", spiking[1])
    )
    nir.write(tmp_path / "whole.nir", nir_made.graph(edges, (4,), **nodes))
    whole = (tmp_path / "whole.nir").read_bytes()
    places: list[str] = []
    with h5py.File(tmp_path / "whole.nir", "r") as file:
        file.visititems(lambda name, item: places.append(name) if isinstance(item, h5py.Dataset) else None)
    refused = []

    @mutations.few(1500 if soak else 40)
    @given(st.lists(st.tuples(st.sampled_from(places), st.sampled_from(VALUES)), min_size=1, max_size=2))
    def each(changes: list[tuple[str, Any]]) -> None:
        path = tmp_path / "x.nir"
        path.write_bytes(whole)
        with h5py.File(path, "a") as file:
            for place, value in changes:
                if place in file:
                    del file[place]
                    file[place] = value
        try:
            graph = load_nir(path)
        except NirFileError:
            refused.append(changes)
        else:
            with contextlib.suppress(NotInNir, NotConvertible):
                describe(graph, DT_S)

    each()
    assert len(refused) > 5
