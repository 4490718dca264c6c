"""Runs NIR files in other tools: `python nir_reader.py FOLDER`, in an environment with norse, nirtorch and snnTorch.

FOLDER/jobs.json lists jobs. {"name", "reader": "snntorch" or "norse", "file", "input"}: read FILE with that tool and
send the samples of INPUT.npy (samples, steps, ...) through it; with "reset": "subtract", its neurons reset by
subtraction. "reader": "snntorch_cells" builds snnTorch's modules node by node, one behind the other, with IF as `Leaky`
of beta 1 and SumPool2d as a pool without its division, for which its own reader has a wrong module or none. {"name",
"exporter": "snntorch", "layers", "input"}: build the layers (see `build`), send the samples through them, export them
with snnTorch's own exporter, read that with its importer and send the samples through the result. FOLDER/results.json
says for each job what went wrong, "" if nothing; NAME.npy holds the spikes (samples, steps, neurons), NAME.model.npy
those of the layers themselves.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

DT_S = 1e-4


def build(layers: list[dict[str, Any]], folder: Path) -> nn.Sequential:
    """{"kind", "weights": file with arrays or "", keyword arguments} each; neurons keep their state (init_hidden)."""
    import snntorch

    made = []
    for number, layer in enumerate(layers):
        given = dict(layer)
        kind, weights = given.pop("kind"), given.pop("weights", "")
        given = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in given.items()}
        if kind in ("Leaky", "Synaptic", "RLeaky", "RSynaptic"):
            last = number == len(layers) - 1
            module = getattr(snntorch, kind)(init_hidden=True, output=last, **given)
            snntorch.SpikingNeuron.instances.remove(module)
        else:
            module = getattr(nn, kind)(**given)
        if weights:
            with np.load(folder / weights) as archive:
                module.load_state_dict({key: torch.from_numpy(archive[key]) for key in archive.files}, strict=False)
        made.append(module)
    return nn.Sequential(*made)


def run_layers(model: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """Spikes of the last layer, samples one by one, from rest."""
    out = []
    with torch.no_grad():
        for sample in torch.from_numpy(x).float():
            for module in model:
                if hasattr(module, "reset_mem"):
                    module.reset_mem()
                    for key in ("mem", "syn", "spk"):
                        if hasattr(module, key):
                            setattr(module, key, torch.zeros(0))
            rows = []
            for step in sample:
                value = step[None]
                for module in model:
                    value = module(value)
                rows.append((value[0] if isinstance(value, tuple) else value).reshape(-1))
            out.append(torch.stack(rows))
    return torch.stack(out).numpy()


def snntorch_reader(graph: Any, reset: str) -> Any:
    """snnTorch's own import; it makes every neuron with reset to zero, so that the other reset is put in here."""
    import snntorch
    from snntorch import import_nir

    own = {name: getattr(snntorch, name) for name in ("Leaky", "Synaptic", "RLeaky", "RSynaptic")}
    try:
        for name, make in own.items():
            setattr(snntorch, name, lambda *a, _make=make, **k: _make(*a, **{**k, "reset_mechanism": reset}))
        return import_nir.import_from_nir(graph)
    finally:
        for name, make in own.items():
            setattr(snntorch, name, make)


class Cells(nn.Module):
    """Nodes of a chain as modules of snnTorch, one behind the other; neurons keep their own state."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        import snntorch
        from snntorch.import_nir import _nir_to_snntorch_module

        after = dict(graph.edges)
        name = next(name for name, node in graph.nodes.items() if type(node).__name__ == "Input")
        self.cells, self.state = nn.ModuleList(), {}
        while name in after:
            name = after[name]
            node, kind = graph.nodes[name], type(graph.nodes[name]).__name__
            if kind == "IF":
                (threshold,) = set(node.v_threshold.reshape(-1).tolist())
                cell = snntorch.Leaky(1.0, threshold=threshold, reset_mechanism="zero", reset_delay=False)
            elif kind == "SumPool2d":
                size = [int(n) for n in node.kernel_size]
                cell = nn.AvgPool2d(size, [int(n) for n in node.stride], divisor_override=1)
            elif kind != "Output":
                cell = _nir_to_snntorch_module(node)
            else:
                continue
            self.cells.append(cell)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[None]
        for at, cell in enumerate(self.cells):
            if isinstance(cell, nn.Flatten):
                x = x.flatten(1)
            elif hasattr(cell, "reset_mem"):
                out = cell(x, *self.state.get(at, cell.reset_mem() if hasattr(cell, "syn") else (cell.reset_mem(),)))
                x, self.state[at] = out[0], out[1:]
            else:
                x = cell(x)
        return x


def run_graph(graph: Any, reader: str, x: np.ndarray, reset: str = "zero") -> np.ndarray:
    if reader == "norse":
        import norse.torch
        from norse.torch.functional import reset as resets

        method = {"zero": resets.reset_value, "subtract": resets.reset_subtract}[reset]
        make = lambda: norse.torch.from_nir(graph, dt=DT_S, reset_method=method)  # noqa: E731
    elif reader == "snntorch_cells":
        make = lambda: Cells(graph)  # noqa: E731
    else:
        make = lambda: snntorch_reader(graph, reset)  # noqa: E731
    out = []
    for sample in torch.from_numpy(x).float():
        model, state, rows = make(), None, []
        for step in sample:
            value = model(step) if state is None else model(step, state)
            value, state = value if isinstance(value, tuple) else (value, state)
            value = value[0] if isinstance(value, tuple) else value
            rows.append(value.detach().reshape(-1))
        out.append(torch.stack(rows))
    return torch.stack(out).numpy()


def run_job(job: dict[str, Any], folder: Path) -> None:
    import nir

    x = np.load(folder / job["input"])
    if "reader" in job:
        np.save(
            folder / f"{job['name']}.npy",
            run_graph(nir.read(str(folder / job["file"])), job["reader"], x, job.get("reset", "zero")),
        )
        return
    from snntorch.export_nir import export_to_nir

    model = build(job["layers"], folder)
    np.save(folder / f"{job['name']}.model.npy", run_layers(model, x))
    graph = export_to_nir(build(job["layers"], folder), torch.from_numpy(x[0, 0]).float())
    nir.write(str(folder / f"{job['name']}.nir"), graph)
    np.save(folder / f"{job['name']}.npy", run_graph(nir.read(str(folder / f"{job['name']}.nir")), "snntorch", x))


def main(folder: Path) -> None:
    results = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_job(job, folder)
            results[job["name"]] = ""
        except Exception as error:
            results[job["name"]] = f"{type(error).__name__}: {error}"
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
