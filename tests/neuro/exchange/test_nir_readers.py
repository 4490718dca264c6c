"""Our NIR files in norse and snnTorch, spike for spike, and snnTorch's own exporter beside ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuro.exchange.nir import NotInNir, load_nir, nir_from_snntorch, to_nir, write_nir
from neuro.exchange.nir.readers import READERS, problems
from neuro.exchange.nir.synapse_nodes import grids, ours_at
from neuro.graph import SpikingGraph
from neuro.simulators.fixed_point import simulate
from tests.neuro.exchange import nir_networks as networks_
from tests.neuro.exchange import nir_reader as reader_
from tests.neuro.exchange import nir_reference as reference

pytest.importorskip("nir")
pytest.importorskip("snntorch")
ROOT = Path(__file__).resolve().parents[3]
SAMPLES = 2


def run_jobs(python: Path, folder: Path, jobs: list[dict[str, Any]]) -> dict[str, str]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(python), str(Path(__file__).with_name("nir_reader.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


# Graphs of ours


def on_the_chip(graph: SpikingGraph, x_BTN: np.ndarray) -> np.ndarray:
    """Messages of the output in NIR's order, without the steps that the chip is behind."""
    (name,) = graph.outputs
    ahead = json.loads(to_nir(graph).metadata["spikegate"]["ahead"])[name]
    padded = np.concatenate([x_BTN, np.zeros((len(x_BTN), ahead, x_BTN.shape[2]), dtype=x_BTN.dtype)], axis=1)
    spikes = simulate(graph, {"x": padded}, mode="chip").spikes[name].numpy()[:, ahead:]
    grid = grids(graph).get(name)
    return spikes if grid is None else spikes[:, :, ours_at(grid)]


def as_sample(graph: SpikingGraph, x_BTN: np.ndarray) -> np.ndarray:
    grid = grids(graph).get("x")
    if grid is None:
        return x_BTN.astype(np.float64)
    return x_BTN[:, :, ours_at(grid)].reshape(*x_BTN.shape[:2], grid[2], grid[0], grid[1]).astype(np.float64)


@pytest.fixture(scope="module")
def ran(readers_python, tmp_path_factory):
    """Graphs that go to both readers: (reader, seed, spikes of the chip, spikes of the reader or its error, node types)."""
    folder = tmp_path_factory.mktemp("readers")
    jobs, found = [], []
    for seed in range(48):
        graph = networks_.network(seed, portable_only=seed % 3 == 0)
        try:
            made = to_nir(graph)
        except NotInNir:
            continue
        x = np.stack([networks_.messages(graph, 100 * seed + i) for i in range(SAMPLES)])
        write_nir(made, folder / f"{seed}.nir")
        np.save(folder / f"{seed}_in.npy", as_sample(graph, x))
        for reader in READERS:
            if not problems(load_nir(folder / f"{seed}.nir"), reader):
                name = f"{seed}_{reader}"
                jobs.append({"name": name, "reader": reader, "file": f"{seed}.nir", "input": f"{seed}_in.npy"})
                found.append((reader, name, on_the_chip(graph, x), made))
    errors = run_jobs(readers_python, folder, jobs)
    return [
        (reader, name, ours, errors[name] or np.load(folder / f"{name}.npy"), made) for reader, name, ours, made in found
    ]


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_spikes_as_the_chip_does(ran, reader):
    compared, spikes, nodes = 0, 0, set()
    for which, name, ours, theirs, made in ran:
        if which != reader:
            continue
        assert not isinstance(theirs, str), f"{name}: {theirs}"
        np.testing.assert_array_equal(theirs, ours, err_msg=name)
        compared, spikes = compared + 1, spikes + int(np.count_nonzero(ours))
        nodes |= {type(node).__name__ for node in made.nodes.values()}
    assert compared >= 16
    assert spikes > 100
    assert nodes >= {"LIF", "CubaLIF", "Linear", "Conv2d", "Flatten"}
    assert "NIRGraph" in nodes
    assert reader != "norse" or "IF" in nodes


# Models of snnTorch


def model(*layers: dict[str, Any]) -> list[dict[str, Any]]:
    return list(layers)


def linear(n_in: int, n_out: int, seed: int, **more: Any) -> dict[str, Any]:
    return {"kind": "Linear", "in_features": n_in, "out_features": n_out, "seed": seed, **more}


def neurons(kind: str, n: int, vectors: bool = True, **more: Any) -> dict[str, Any]:
    """Beta 0.75, threshold 1: exact in float32. `vectors`: a value per neuron, which snnTorch's exporter needs."""
    given = {"beta": 0.75, "threshold": 1.0} | ({"alpha": 0.5} if kind in ("Synaptic", "RSynaptic") else {}) | more
    return {"kind": kind} | {
        key: [value] * n if vectors and key in ("beta", "alpha", "threshold") else value for key, value in given.items()
    }


def two_layers(kind: str, **more: Any) -> list[dict[str, Any]]:
    recurrent = {"all_to_all": True, "linear_features": 12} if kind.startswith("R") else {}
    last = "Synaptic" if "Synaptic" in kind else "Leaky"
    return model(
        linear(8, 12, 1, bias=False), neurons(kind, 12, **recurrent, **more), linear(12, 5, 2), neurons(last, 5, **more)
    )


def saved(layers: list[dict[str, Any]], folder: Path, name: str) -> list[dict[str, Any]]:
    """Weights, multiples of 1/16 so that no sum is rounded, into files that both environments read."""
    written = []
    for number, layer in enumerate(layers):
        given = dict(layer)
        seed = given.pop("seed", None)
        rng = np.random.default_rng(number if seed is None else seed)
        arrays = {}
        if given["kind"] == "Linear":
            arrays["weight"] = rng.integers(-4, 9, (given["out_features"], given["in_features"])) / 16
            if given.get("bias", True):
                arrays["bias"] = rng.integers(-2, 3, given["out_features"]) / 16
        if given["kind"].startswith("R"):
            n = given["linear_features"]
            arrays = {"recurrent.weight": rng.integers(-4, 5, (n, n)) / 16, "recurrent.bias": rng.integers(-2, 3, n) / 16}
        if arrays:
            given["weights"] = f"{name}_{number}.npz"
            np.savez(folder / given["weights"], **{key: value.astype(np.float32) for key, value in arrays.items()})
        written.append(given)
    return written


HARD = {"reset_mechanism": "zero", "reset_delay": False}
# name -> (layers, whether ours reads them, mismatches of snnTorch's own way out and in: "none", "some" or "error")
MODELS = {
    "leaky": (two_layers("Leaky", **HARD), True, "none"),
    "leaky delayed": (two_layers("Leaky", reset_mechanism="zero"), True, "none"),
    "leaky scalar": (two_layers("Leaky", vectors=False, **HARD), True, "error"),
    "leaky subtract": (two_layers("Leaky"), False, "some"),
    "if": (two_layers("Leaky", **HARD, beta=1.0), True, "some"),
    "synaptic": (two_layers("Synaptic", **HARD), True, "none"),
    "synaptic delayed": (two_layers("Synaptic", reset_mechanism="zero"), False, "some"),
    "synaptic subtract": (two_layers("Synaptic"), False, "some"),
    "rleaky": (two_layers("RLeaky", **HARD), True, "error"),
    "rsynaptic": (two_layers("RSynaptic", reset_mechanism="zero"), False, "error"),
}


def inputs(name: str) -> np.ndarray:
    rng = np.random.default_rng(len(name))
    return (rng.random((4, 12, 8)) < 0.4).astype(np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_read_with_their_real_reset(name, tmp_path):
    layers, readable, _ = MODELS[name]
    modules = reader_.build(saved(layers, tmp_path, "m"), tmp_path)
    if not readable:
        with pytest.raises(NotInNir, match=r"layer 1 .*(reset_mechanism|reset_delay).*(Train with|Make it with|Use)"):
            nir_from_snntorch(modules, (8,))
        return
    x = inputs(name)
    theirs = reader_.run_layers(modules, x)
    made = nir_from_snntorch(modules, (8,))
    ours = np.stack([next(iter(reference.run(made, sample).values())) for sample in x])
    assert theirs.sum() > 20
    np.testing.assert_array_equal(ours, theirs)


def test_snntorchs_own_exporter_is_another_matter(readers_python, tmp_path):
    """Spikes of the model, of its own way through NIR, and of ours in the readers that take it."""
    jobs, own = [], {}
    for name, (layers, readable, _) in MODELS.items():
        label = name.replace(" ", "_")
        written = saved(layers, tmp_path, label)
        np.save(tmp_path / f"{label}_in.npy", inputs(name))
        jobs.append({"name": label, "exporter": "snntorch", "layers": written, "input": f"{label}_in.npy"})
        if not readable:
            continue
        made = nir_from_snntorch(reader_.build(written, tmp_path), (8,))
        write_nir(made, tmp_path / f"{label}_ours.nir")
        own[name] = [reader for reader in READERS if not problems(made, reader)]
        jobs += [
            {"name": f"{label}_{r}", "reader": r, "file": f"{label}_ours.nir", "input": f"{label}_in.npy"}
            for r in own[name]
        ]
    errors = run_jobs(readers_python, tmp_path, jobs)
    for name, (_, readable, expected) in MODELS.items():
        label = name.replace(" ", "_")
        if expected == "error":
            assert errors[label], name
        else:
            truth = np.load(tmp_path / f"{label}.model.npy")
            different = int((np.load(tmp_path / f"{label}.npy") != truth).sum())
            assert (different > 0) == (expected == "some"), f"{name}: {different} of {truth.size}"
        if readable:
            truth = reader_.run_layers(reader_.build(saved(MODELS[name][0], tmp_path, label), tmp_path), inputs(name))
            for reader in own[name]:
                assert errors[f"{label}_{reader}"] == ""
                np.testing.assert_array_equal(
                    np.load(tmp_path / f"{label}_{reader}.npy"), truth, err_msg=f"{name} {reader}"
                )
    assert own["leaky"] == ["snntorch", "norse"]
    assert own["synaptic"] == ["snntorch", "norse"]
    assert own["if"] == ["norse"]
    assert own["rleaky"] == ["snntorch", "norse"]


def test_a_convolutional_model_is_read(tmp_path):
    import snntorch

    torch.manual_seed(0)
    leaky = {"reset_mechanism": "zero", "init_hidden": True, "reset_delay": False}
    modules = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1),
        snntorch.Leaky(0.5, threshold=0.5, **leaky),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(12, 4),
        snntorch.Leaky(torch.tensor([0.5, 0.25, 0.75, 0.0]), threshold=0.25, output=True, **leaky),
    ).eval()
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.copy_(torch.round(parameter * 32 + 1) / 16)
    for module in modules.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            snntorch.SpikingNeuron.instances.remove(module)
    x = (np.random.default_rng(0).random((3, 10, 2, 4, 4)) < 0.5).astype(np.float64)
    theirs = reader_.run_layers(modules, x)
    made = nir_from_snntorch(modules, (2, 4, 4))
    ours = np.stack([next(iter(reference.run(made, sample).values())) for sample in x])
    assert theirs.sum() > 10
    np.testing.assert_array_equal(ours, theirs)


def leaky(**more: Any) -> Any:
    import snntorch

    return snntorch.Leaky(**{"beta": 0.5, "reset_mechanism": "zero", **more})


def changed_later() -> Any:
    neuron = leaky(reset_mechanism="subtract")
    neuron.reset_mechanism = "zero"
    return neuron


REFUSED = {
    "none": (lambda: leaky(reset_mechanism="none"), "reset_mechanism is 'none'"),
    "changed later": (changed_later, "says 'zero' and the neuron computes 'subtract'"),
    "graded": (lambda: leaky(graded_spikes_factor=2.0), "graded_spikes_factor is 2"),
    "quantised": (lambda: leaky(state_quant=lambda x: x), "state_quant is on"),
    "NaN": (lambda: leaky(beta=float("nan")), "beta holds NaN"),
    "sizes": (lambda: leaky(beta=torch.full((7,), 0.5)), "beta has 7 values, 3 neurons"),
    "mixed beta": (lambda: leaky(beta=torch.tensor([0.5, 1.0, 0.5])), "some beta are 1"),
    "another kind": (lambda: torch.nn.GELU(), r"layer 1 \(GELU\): NIR has no node"),
    "no neurons": (lambda: torch.nn.Identity(), "do not end in neurons"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nir_cannot_say_of_a_neuron_is_named(case):
    make, message = REFUSED[case]
    with pytest.raises(NotInNir, match=message):
        nir_from_snntorch([torch.nn.Linear(4, 3), make()], (4,))


def test_a_module_without_an_order_is_refused():
    class Net(torch.nn.Module):
        pass

    with pytest.raises(NotInNir, match="in which order"):
        nir_from_snntorch(Net(), (4,))
