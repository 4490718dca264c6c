"""Runs networks in xylosim: a script for an interpreter that has xylosim and numpy, and nothing of ours.

Called as PYTHON worker.py FOLDER. FOLDER/jobs.json says how many networks there are, and which weight shifts they have;
N.npz holds integer arrays of one. What xylosim recorded goes to N-out.npz, one array (steps, neurons) for each sample and
variable. The makers' simulator has no batch: samples run one after another, each from rest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

POOLS = ("in", "rec", "out")
RECORDS = {
    "hidden/i_syn": "rec_i_syn",
    "hidden/i_syn2": "rec_i_syn2",
    "hidden/v_mem": "rec_v_mem",
    "readout/i_syn": "rec_i_syn_out",
    "readout/v_mem": "rec_v_mem_out",
}


def main(folder: Path) -> None:
    """Run every job of the folder, and print xylosim's version as one line of JSON."""
    xylosim: Any = importlib.import_module("xylosim.v2")  # here and nowhere else
    for number, shifts in enumerate(json.loads((folder / "jobs.json").read_text(encoding="utf-8"))):
        with np.load(folder / f"{number}.npz", allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        np.savez(folder / f"{number}-out.npz", **run(xylosim, arrays, shifts))
    print(json.dumps({"xylosim": importlib.metadata.version("xylosim")}))


def run(xylosim: Any, arrays: dict[str, np.ndarray], shifts: dict[str, int]) -> dict[str, Any]:
    """Every variable of every sample of one network."""
    hidden = {key[7:]: value.tolist() for key, value in arrays.items() if key.startswith("hidden/")}
    readout = {key[8:]: value.tolist() for key, value in arrays.items() if key.startswith("readout/")}
    sizes = {"in": int(arrays["inputs"].shape[2]), "rec": len(hidden["vth"]), "out": len(hidden["vth"])}
    synapses = {pool: synapse_lists(xylosim, arrays[f"synapses/{pool}"], sizes[pool]) for pool in POOLS}
    layer = xylosim.XyloLayer(  # holds bare pointers into `synapses`, which this function keeps alive
        synapses_in=synapses["in"],
        synapses_rec=synapses["rec"],
        synapses_out=synapses["out"],
        aliases=[[target] if target >= 0 else [] for target in hidden["alias"]],
        threshold=hidden["vth"],
        threshold_out=readout["vth"],
        has_bias=any(hidden["bias"]) or any(readout["bias"]),
        bias=hidden["bias"],
        bias_out=readout["bias"],
        weight_shift_inp=shifts["in"],
        weight_shift_rec=shifts["rec"],
        weight_shift_out=shifts["out"],
        dash_mem=hidden["dash_mem"],
        dash_mem_out=readout["dash_mem"],
        dash_syns=[list(pair) for pair in zip(hidden["dash_syn"], hidden["dash_syn2"], strict=True)],
        dash_syns_out=[[dash] for dash in readout["dash_syn"]],
        name="network",
    )
    found: dict[str, Any] = {}
    for sample, spikes in enumerate(arrays["inputs"].tolist()):
        layer.reset_all()
        layer.evolve(spikes)
        steps = len(spikes)
        found[f"{sample}/hidden/spikes"] = np.array(layer.rec_recurrent_spikes, dtype=np.int32).reshape(steps, -1)
        found[f"{sample}/readout/spikes"] = np.array(layer.rec_out_spikes, dtype=np.int32).reshape(steps, -1)
        for name, record in RECORDS.items():
            values = np.array(getattr(layer, record), dtype=np.int32)  # (neurons, steps)
            found[f"{sample}/{name}"] = values.reshape(-1, steps).T
    return found


def synapse_lists(xylosim: Any, rows: np.ndarray, sources: int) -> list[list[Any]]:
    """For each source its synapses, in the order of the rows (source, target, synapse, weight)."""
    found: list[list[Any]] = [[] for _ in range(sources)]
    for source, target, synapse, weight in rows.tolist():
        found[source].append(xylosim.XyloSynapse(target, synapse, weight))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
