"""Runs NIR files in other tools: `python nir_reader.py FOLDER`, in an environment with norse, nirtorch and snnTorch.

FOLDER/jobs.json lists jobs. {"name", "reader": "snntorch" or "norse", "file", "input"}: read FILE with that tool and send
the samples of INPUT.npy (samples, steps, ...) through it. {"name", "exporter": "snntorch", "layers", "input"}: build the
layers (see `build`), send the samples through them, export them with snnTorch's own exporter, read that with its importer
and send the samples through the result. FOLDER/results.json says for each job what went wrong, "" if nothing; NAME.npy
holds the spikes (samples, steps, neurons), NAME.model.npy those of the layers themselves.
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


def run_graph(graph: Any, reader: str, x: np.ndarray) -> np.ndarray:
    if reader == "norse":
        import norse.torch

        make = lambda: norse.torch.from_nir(graph, dt=DT_S)  # noqa: E731
    else:
        from snntorch.import_nir import import_from_nir

        make = lambda: import_from_nir(graph)  # noqa: E731
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
        np.save(folder / f"{job['name']}.npy", run_graph(nir.read(str(folder / job["file"])), job["reader"], x))
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
