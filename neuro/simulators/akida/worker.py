"""Runs or maps networks with BrainChip's akida package: a script for an interpreter that has it, and nothing of ours.

Called as PYTHON worker.py run|map FOLDER.. with a folder for each network. network.json in it lists the layers, arrays.npz
holds their integers and, to run, the samples `inputs` (N, width, height, channels). A run writes what every layer sends to
out.npz there, "0", "1", .. in order; the layers up to it are a model of their own. Mapping tries every virtual device that
network.json names, in the mode that takes the fewest processors. The answer is one line of JSON, refusals included.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

WHOLE_SUMS = 28  # bits of the last layer's output


def main(task: str, folders: list[Path]) -> None:
    """Do the task for every folder, and print one line of JSON."""
    akida: Any = importlib.import_module("akida")  # here and nowhere else
    print(json.dumps({"akida": str(akida.__version__), "jobs": [done(akida, task, folder) for folder in folders]}))


def done(akida: Any, task: str, folder: Path) -> dict[str, Any]:
    """One job: what the package refuses, or what devices take it."""
    description = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    with np.load(folder / "arrays.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    try:
        model = build(akida, description, arrays)
        if task == "map":
            return {"devices": {name: mapped(akida, model, name) for name in description["devices"]}}
        np.savez(folder / "out.npz", **run(akida, model, arrays["inputs"]))
    except (RuntimeError, ValueError, TypeError) as error:  # what its bindings raise
        return {"refused": str(error)}
    return {}


def build(akida: Any, description: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    """The model of all layers."""
    model = akida.Model()
    model.add(akida.InputData(tuple(description["shape"]), input_bits=8, name="input"))
    for number, layer in enumerate(description["layers"]):
        model.add(made(akida, layer, f"layer{number}"))
        added = model.layers[-1]
        for name in ("weights", "bias", "bias_shift"):
            added.set_variable(name, arrays[f"{number}/{name}"])
        shift = layer["shift"]  # positive: right; theirs is negative then
        added.set_variable("output_shift", np.full(len(arrays[f"{number}/bias"]), -shift, dtype=np.int8))
    return model


def made(akida: Any, layer: dict[str, Any], name: str) -> Any:
    """One layer without its integers."""
    kinds = akida.ActivationType
    common = {
        "activation": kinds.ReLU if layer["relu"] and not layer["last"] else kinds.NoActivation,
        "output_bits": WHOLE_SUMS if layer["last"] else layer["output_bits"],
        "weights_bits": layer["weight_bits"],
        "name": name,
    }
    if layer["kind"] == "dense":
        return akida.Dense1D(layer["units"], **common)
    paddings = {"same": akida.Padding.Same, "same_upper": akida.Padding.SameUpper, "valid": akida.Padding.Valid}
    common |= {"kernel_stride": layer["stride"], "padding": paddings[layer["padding"]]}
    if layer["kind"] == "depthwise":
        return akida.DepthwiseConv2D(layer["kernel"], **common)
    return akida.Conv2D(layer["units"], layer["kernel"], **common)


def run(akida: Any, model: Any, inputs: np.ndarray) -> dict[str, Any]:
    """What each layer sends for every sample, (N, neurons)."""
    found = {}
    for number in range(1, len(model.layers)):
        part = akida.Model(layers=model.layers[: number + 1])
        found[str(number - 1)] = np.asarray(part.forward(inputs)).reshape(len(inputs), -1).astype(np.int32)
    return found


def mapped(akida: Any, model: Any, name: str) -> dict[str, Any]:
    """The model on one virtual device: what it takes of it, or why it does not fit."""
    maker = getattr(akida, name, None)
    if maker is None:
        return {"refused": "the package has no such device"}
    own = akida.Model(layers=model.layers)
    try:
        device = maker()
        own.map(device, hw_only=True, mode=akida.MapMode.Minimal)
    except (RuntimeError, ValueError, TypeError) as error:
        return {"refused": str(error)}
    programs = [sequence.program for sequence in own.sequences if sequence.program is not None]
    return {
        "version": str(device.version),
        "program_bytes": sum(len(program) for program in programs),
        "passes": sum(len(sequence.passes) for sequence in own.sequences),
        "layers": [
            dict(Counter(part.type.name for part in layer.mapping.nps)) for layer in own.layers if layer.mapping is not None
        ],
    }


if __name__ == "__main__":
    main(sys.argv[1], [Path(name) for name in sys.argv[2:]])
