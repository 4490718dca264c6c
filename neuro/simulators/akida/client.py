"""BrainChip's akida package as a peer: runs graded graphs as networks of Akida 2.0, returns the same record.

akida 2.19.3 is proprietary software; it is never imported here, and nothing of it is part of this package. `make akida`
installs it in an environment of its own, for whoever accepts its licence, and `worker.py` beside this file is the only code
of ours that runs there. Its forward is the makers' software backend; no chip takes part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from neuro.graph import SpikingGraph
from neuro.graph.akida import akida_network
from neuro.simulators.activity import Activity
from neuro.simulators.akida.alignment import read, samples_of
from neuro.simulators.akida.process import ask, write
from neuro.simulators.inputs import Integers, checked_inputs

Job = tuple[SpikingGraph, Mapping[str, Integers]]


def run(
    graph: SpikingGraph, inputs: Mapping[str, Integers], *, python: Path | None = None, timeout_s: float = 120.0
) -> Activity:
    """One graph in the package's software backend; see `run_all`."""
    return run_all([(graph, inputs)], python=python, timeout_s=timeout_s)[0]


def run_all(jobs: Sequence[Job], *, python: Path | None = None, timeout_s: float = 120.0) -> list[Activity]:
    """Several graphs in one process of the package's software backend, an inference for each sample and step.

    Args:
        jobs: graphs of graded kinds in one line, as `neuro.graph.akida` describes, and their inputs as in
            `fixed_point.simulate`; constants must be what the graph's meta says.
        python: an interpreter with the package; default `find_python()`.
        timeout_s: limit on all of them together, in seconds of wall clock.

    Returns:
        for each job an Activity with `ran_on = "akida VERSION (software)"`: messages of each layer's population, int32
        (batch, steps, size), where step t is the inference of the input of step t (`alignment.ours` gives ours in the same
        order). No states and no counts.

    Raises:
        GraphError: a graph that is no network of Akida.
        InputError: as `fixed_point.simulate`, other constants, payloads beyond 8 bits.
        AkidaUnavailable, AkidaTimeout, AkidaRefused, AkidaError: no interpreter; over the limit; the package takes no such
            network; it crashed.
    """
    networks = [akida_network(graph) for graph, _ in jobs]
    samples = [
        samples_of(network, checked_inputs(graph, inputs, device="cpu"))
        for network, (graph, inputs) in zip(networks, jobs, strict=True)
    ]
    found = []
    with tempfile.TemporaryDirectory(prefix="spikegate-akida-", ignore_cleanup_errors=True) as name:
        folders = [
            write(network, Path(name, str(number)), inputs=value.reshape(-1, *network.shape))
            for number, (network, value) in enumerate(zip(networks, samples, strict=True))
        ]
        _, version = ask("run", folders, python, timeout_s)
        for network, value, folder in zip(networks, samples, folders, strict=True):
            batch, steps = value.shape[:2]
            spikes = {}
            with np.load(folder / "out.npz", allow_pickle=False) as archive:
                for number, layer in enumerate(network.layers):
                    sent = archive[str(number)]
                    messages = read(layer, sent) if layer.last else sent
                    spikes[layer.name] = torch.from_numpy(messages.astype(np.int32)).reshape(batch, steps, -1)
            found.append(Activity(spikes, {}, batch, steps, ran_on=f"akida {version} (software)", mode="akida"))
    return found
