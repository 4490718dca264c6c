"""The published networks of the NIR paper beside norse's and snnTorch's own run of the same files, layer by layer.

What the readers do otherwise is named and its cause shown: with that one change, the definitions give their spikes to the
last one.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuro.conversion.spiking.description import run_float
from neuro.exchange.nir import load_nir
from neuro.exchange.nir.describing import describe
from tests.published import published

nir = pytest.importorskip("nir")
reference = import_module("tests.neuro.exchange.nir_reference")
run_jobs = import_module("tests.neuro.exchange.test_nir_readers").run_jobs
DT_S = 1e-4
ZERO, SUBTRACT = "braille_noDelay_bias_zero", "braille_noDelay_noBias_subtract"
LAYERS = {"lif1": ["fc1", "lif1.lif", "lif1.w_rec"], "lif2": ["fc1", "lif1.lif", "lif1.w_rec", "fc2", "lif2"]}
SAMPLES, STEPS = 3, 256


def up_to(graph: Any, names: list[str]) -> Any:
    """The nodes of a Braille network up to a layer, with an Output there."""
    end = "lif1.lif" if names[-1] == "lif1.w_rec" else names[-1]
    keep = ["input", *names]
    nodes = {name: graph.nodes[name] for name in keep}
    nodes["output"] = nir.Output({"output": np.array(nodes[end].v_threshold.shape)})
    edges = [(a, b) for a, b in graph.edges if a in keep and b in keep]
    return nir.NIRGraph(nodes, [*edges, (end, "output")], type_check=False)


def for_snntorch(graph: Any) -> Any:
    """The same with the loop in a graph of its own and names that sort as data flows: snnTorch stops at the file itself."""
    inner = {"lif": graph.nodes["lif1.lif"], "w_rec": graph.nodes["lif1.w_rec"]}
    shape = np.array(inner["lif"].v_threshold.shape)
    inner |= {"input": nir.Input({"input": shape}), "output": nir.Output({"output": shape})}
    loop = nir.NIRGraph(inner, [("input", "lif"), ("lif", "w_rec"), ("w_rec", "lif"), ("lif", "output")])
    parts = [graph.nodes["input"], graph.nodes["fc1"], loop]
    parts += [graph.nodes[name] for name in ("fc2", "lif2", "output") if name in graph.nodes]
    names = [f"n{at}" for at in range(len(parts))]
    return nir.NIRGraph(dict(zip(names, parts, strict=True)), list(pairwise(names)), type_check=False)


def without_loop_bias(graph: Any) -> Any:
    """The bias of the loop moved to the layer before it, which is the same network."""
    loop, first = graph.nodes["lif1.w_rec"], graph.nodes["fc1"]
    nodes = dict(graph.nodes)
    nodes["lif1.w_rec"] = nir.Affine(loop.weight, np.zeros_like(loop.bias))
    nodes["fc1"] = nir.Affine(first.weight, first.bias + loop.bias)
    return nir.NIRGraph(nodes, graph.edges, type_check=False)


def touches(seed: int) -> np.ndarray:
    """Generated spikes of 12 channels: bursts at rates of their own, (SAMPLES, STEPS, 12)."""
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0.02, 0.25, (SAMPLES, 1, 12)) * (rng.random((SAMPLES, STEPS // 32, 12)).repeat(32, axis=1) < 0.7)
    return (rng.random((SAMPLES, STEPS, 12)) < rate).astype(np.float64)


@pytest.fixture(scope="module")
def ran(readers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """ "FILE LAYER READER" -> spikes (SAMPLES, STEPS, N) of the readers; "FILE" -> the input."""
    folder = tmp_path_factory.mktemp("peers")
    jobs, found = [], {}
    files = {ZERO: load_nir(published(f"nir_paper/{ZERO}.nir")), SUBTRACT: load_nir(published(f"nir_paper/{SUBTRACT}.nir"))}
    files["moved"] = without_loop_bias(files[ZERO])
    for file, whole in files.items():
        found[file] = touches(len(file))
        np.save(folder / f"{file}_in.npy", found[file])
        for layer, names in LAYERS.items():
            part = up_to(whole, names)
            for reader, made in (("norse", part), ("snntorch", for_snntorch(part))):
                name = f"{file} {layer} {reader}"
                nir.write(folder / f"{name}.nir", made)
                reset = "subtract" if file == SUBTRACT else "zero"
                jobs.append(
                    {"name": name, "reader": reader, "file": f"{name}.nir", "input": f"{file}_in.npy", "reset": reset}
                )
    errors = run_jobs(readers_python, folder, jobs)
    assert not any(errors.values()), errors
    return found | {job["name"]: np.load(folder / f"{job['name']}.npy") for job in jobs}


def ours(file: str, x: np.ndarray) -> dict[str, np.ndarray]:
    reset = "subtract" if file == SUBTRACT else "zero"
    described = describe(load_nir(published(f"nir_paper/{file}.nir")), DT_S, reset=reset)
    run = run_float(described.description, torch.from_numpy(x))
    return {"lif1": run.spikes["lif1.lif"].numpy(), "lif2": run.spikes["lif2"].numpy()}


@pytest.mark.parametrize("layer", LAYERS)
def test_soft_reset_spikes_as_norse_does(ran, layer):
    found = ours(SUBTRACT, ran[SUBTRACT])[layer]
    assert found.sum() > 50
    np.testing.assert_array_equal(ran[f"{SUBTRACT} {layer} norse"], found)


@pytest.mark.parametrize("layer", LAYERS)
def test_snntorch_subtracts_once_more_where_a_reset_leaves_v_above_the_threshold(ran, layer):
    theirs, found = ran[f"{SUBTRACT} {layer} snntorch"], ours(SUBTRACT, ran[SUBTRACT])[layer]
    part = up_to(load_nir(published(f"nir_paper/{SUBTRACT}.nir")), LAYERS[layer])
    explained = np.stack([next(iter(reference.run(part, x, reset="snntorch").values())) for x in ran[SUBTRACT]])
    np.testing.assert_array_equal(theirs, explained)
    assert 0 < (theirs != found).mean() < 0.1


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("reader", ["norse", "snntorch"])
def test_hard_reset_and_biases_spike_as_the_readers_do(ran, reader, layer):
    found = ours(ZERO, ran["moved"])[layer]
    assert found.sum() > 500
    np.testing.assert_array_equal(ran[f"moved {layer} {reader}"], found)


@pytest.mark.parametrize("reader", ["norse", "snntorch"])
def test_the_readers_leave_the_bias_of_a_loop_out_of_the_first_step(ran, reader):
    """A thirteenth input, on in the first step alone, takes the bias off again: then every spike is theirs."""
    x = ran[ZERO]
    theirs, found = ran[f"{ZERO} lif2 {reader}"], ours(ZERO, x)["lif2"]
    assert 0 < (theirs != found).mean() < 0.05
    assert (theirs.sum(1).argmax(1) == found.sum(1).argmax(1)).all()
    whole = load_nir(published(f"nir_paper/{ZERO}.nir"))
    first, loop = whole.nodes["fc1"], whole.nodes["lif1.w_rec"]
    whole.nodes["fc1"] = nir.Affine(np.concatenate([first.weight, -loop.bias[:, None]], axis=1), first.bias)
    whole.nodes["input"] = nir.Input({"input": np.array([13])})
    once = np.zeros((*x.shape[:2], 1))
    once[:, 0] = 1
    run = run_float(describe(whole, DT_S).description, torch.from_numpy(np.concatenate([x, once], axis=2)))
    for layer, name in (("lif1", "lif1.lif"), ("lif2", "lif2")):
        np.testing.assert_array_equal(ran[f"{ZERO} {layer} {reader}"], run.spikes[name].numpy())


def test_the_convolutional_network_spikes_as_both_do(readers_python, tmp_path):
    path = published("nir_paper/cnn_sinabs.nir")
    x = (np.random.default_rng(0).random((2, 60, 2, 34, 34)) < 0.1).astype(np.float64)
    np.save(tmp_path / "in.npy", x)
    whole = load_nir(path)
    jobs = []
    for layer in ("1", "3", "6", "10", "12"):
        keep = ["input", *sorted((n for n in whole.nodes if n.isdigit() and int(n) <= int(layer)), key=int)]
        nodes = {name: whole.nodes[name] for name in keep}
        nodes["output"] = nir.Output({"output": np.array(nodes[layer].v_threshold.shape)})
        edges = [*pairwise(keep), (layer, "output")]
        nir.write(tmp_path / f"{layer}.nir", nir.NIRGraph(nodes, edges, type_check=False))
        for reader in ("norse", "snntorch_cells"):
            name = f"{layer}_{reader}"
            jobs.append({"name": name, "reader": reader, "file": f"{layer}.nir", "input": "in.npy"})
    errors = run_jobs(readers_python, tmp_path, jobs)
    assert not any(errors.values()), errors
    described = describe(whole, DT_S)
    spikes = run_float(described.description, described.input.arranged(torch.from_numpy(x))).spikes
    for job in jobs:
        layer = job["name"].split("_")[0]
        wide = described.description.layer(layer).shape
        found = spikes[layer]
        if len(wide) == 3:
            found = found.reshape(2, 60, *wide).permute(0, 1, 4, 2, 3)
        found = found.reshape(2, 60, -1).numpy()
        assert found.sum() > 20
        np.testing.assert_array_equal(np.load(tmp_path / f"{job['name']}.npy"), found, err_msg=job["name"])
