"""NeuroBench's counts of networks: `python neurobench_job.py FOLDER`, in an environment with neurobench and snnTorch.

FOLDER/jobs.json lists {"name", "kind": of neurobench_networks.BUILD, "settings", "input"}; NAME.npz holds the parameters,
INPUT.npy the samples. Writes FOLDER/results.json: NAME -> what `Benchmark.run` returns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ParameterCount
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import SNNTorchModel, TorchModel
from neurobench_networks import BUILD
from torch.utils.data import DataLoader, TensorDataset


def main(folder: Path) -> None:
    results = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        network = BUILD[job["kind"]](**job["settings"])
        with np.load(folder / f"{job['name']}.npz") as arrays:
            own = network.state_dict()
            network.load_state_dict(own | {name: torch.from_numpy(arrays[name]) for name in arrays.files})
        samples = torch.from_numpy(np.load(folder / f"{job['input']}.npy")).to(next(network.parameters()).dtype)
        wrapped = SNNTorchModel(network) if job["kind"] == "spiking" else TorchModel(network)
        loader = DataLoader(TensorDataset(samples, torch.zeros(len(samples))), batch_size=len(samples))
        metrics = [[ParameterCount], [SynapticOperations, ActivationSparsity]]
        results[job["name"]] = Benchmark(wrapped, loader, [], [], metrics).run(quiet=True)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
