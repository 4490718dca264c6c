"""Runs one network in SANA-FE and prints one JSON line. A process of its own: SANA-FE is GPL-3.0 and stays outside.

Called by `experiments.studies.sanafe_check` as PYTHON sanafe_worker.py FILE, with a PYTHON that has `sanafe`, not ours.
FILE is JSON: {"steps", "layers": [{"name", "size", "core": [tile, core] per neuron, "threshold" or "spikes", "source",
"weight" (flat, by source neuron, then target neuron)}]}, layers in order.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    """Build, map, simulate, print."""
    sanafe: Any = importlib.import_module("sanafe")  # here and nowhere else
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    arch = sanafe.load_arch(str(Path(sanafe.__file__).parent / "examples" / "loihi.yaml"))
    net, groups = sanafe.Network(), {}
    next_input: dict[tuple[int, int], int] = {}
    for layer in job["layers"]:
        name, hidden = layer["name"], "threshold" in layer
        units = {"default_synapse_hw_name": "loihi_dense_synapse", "default_dendrite_hw_name": "loihi_dendrites"}
        model = {"threshold": layer["threshold"], "leak_decay": 1.0, "reset_mode": "hard"} if hidden else {}
        soma = {"soma_hw_name": "loihi_lif"} if hidden else {}
        group = net.create_neuron_group(name, layer["size"], model, log_spikes=True, **units, **soma)
        for number, (tile, core) in enumerate(layer["core"]):
            neuron = group.neurons[number]
            if not hidden:
                slot = next_input.get((tile, core), 0)
                next_input[tile, core] = slot + 1
                neuron.set_attributes(
                    soma_hw_name=f"loihi_inputs[{slot}]", model_attributes={"spikes": layer["spikes"][number]}
                )
            neuron.map_to_core(arch.tiles[tile].cores[core])
        groups[name] = group
    for layer in job["layers"]:
        if "source" in layer:
            groups[layer["source"]].connect_neurons_dense(groups[layer["name"]], {"weight": layer["weight"]})
    chip = sanafe.SpikingChip(arch)
    chip.load(net)
    result = chip.sim(job["steps"], spike_trace=True, perf_trace=True)
    fired = {layer["name"]: 0 for layer in job["layers"]}
    for step in result["spike_trace"]:
        for neuron in step:
            fired[str(neuron).rpartition(".")[0]] += 1
    keep = ("energy", "sim_time", "spikes", "packets_sent", "neurons_updated", "neurons_fired")
    found = {key: result[key] for key in keep}
    print(json.dumps(found | {"fired": fired, "hops": sum(result["perf_trace"]["hops"])}))


if __name__ == "__main__":
    main(sys.argv[1])
