"""xylosim, the simulator of Xylo's makers, as a peer: runs graphs in a process of its own, returns the same record.

xylosim 0.1.3 is a small C++ extension without a stated licence; it is never imported here. `make xylo` builds it in an
environment of its own, and `worker.py` beside this file is the only code of ours that runs there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardware.interpreters import Worker, ask, find_interpreter
from neuro.graph import SpikingGraph
from neuro.graph.kinds import KINDS
from neuro.graph.xylo import XyloNetwork, xylo_network
from neuro.simulators.activity import Activity
from neuro.simulators.inputs import Integers, checked_inputs

ENV_PYTHON = "SPIKEGATE_XYLO_PYTHON"
RAN_ON = "xylosim"
WORKER = Path(__file__).with_name("worker.py")
Job = tuple[SpikingGraph, Mapping[str, Integers]]


class XyloSimError(RuntimeError):
    """xylosim failed; the message holds what it wrote to stderr."""


class XyloSimUnavailable(XyloSimError):
    """No interpreter with xylosim: says where one was looked for and how to get one."""


class XyloSimTimeout(XyloSimError):
    """xylosim was still running at the time limit and was ended."""


XYLOSIM = Worker(
    what="xylosim",
    needs=("xylosim", "numpy"),
    remedy="run `make xylo`",
    answers=("xylosim",),
    too_long="was still running after {seconds} s and was ended; raise the limit or run fewer",
    failed=XyloSimError,
    missing=XyloSimUnavailable,
    late=XyloSimTimeout,
)


def find_python() -> Path:
    """xylosim's interpreter: what SPIKEGATE_XYLO_PYTHON names, else `.venv-xylo/bin/python` here or in the repository.

    Raises:
        XyloSimUnavailable: there is none; says where it was looked for and the remedy.
    """
    remedy = f"run `make xylo` (it needs a C++ compiler), or set {ENV_PYTHON} to an interpreter that has xylosim 0.1.3"
    return find_interpreter(ENV_PYTHON, ".venv-xylo", "xylosim", remedy, XyloSimUnavailable)


def run(
    graph: SpikingGraph, inputs: Mapping[str, Integers], *, python: Path | None = None, timeout_s: float = 120.0
) -> Activity:
    """One graph in xylosim; see `run_all`."""
    return run_all([(graph, inputs)], python=python, timeout_s=timeout_s)[0]


def run_all(jobs: Sequence[Job], *, python: Path | None = None, timeout_s: float = 120.0) -> list[Activity]:
    """Several graphs of Xylo's kinds in one process of xylosim, each sample from rest.

    Args:
        jobs: graph, and its inputs as in `fixed_point.simulate`.
        python: an interpreter with xylosim; default `find_python()`.
        timeout_s: limit on all of them together, in seconds of wall clock.

    Returns:
        for each job an Activity with `ran_on = "xylosim VERSION"`, spikes and all states of every population but inputs,
        int32 (batch, steps, size), without counts. Step t is the graph's: xylosim gets its input a step later, because its
        input channels take no step and a graph's projections take one.

    Raises:
        GraphError: a graph that is no network of Xylo.
        InputError: as `fixed_point.simulate`, and negative or more than 15 spikes.
        XyloSimUnavailable, XyloSimTimeout, XyloSimError: no interpreter; over the limit; it crashed.
    """
    networks = [xylo_network(graph) for graph, _ in jobs]
    values = [_inputs(graph, inputs) for graph, inputs in jobs]
    interpreter = python or find_python()
    with tempfile.TemporaryDirectory(prefix="spikegate-xylo-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for number, (network, value) in enumerate(zip(networks, values, strict=True)):
            with (folder / f"{number}.npz").open("wb") as file:
                np.savez(file, **_arrays(network, value))
        (folder / "jobs.json").write_text(json.dumps([network.shifts for network in networks]), encoding="utf-8")
        version = str(ask(XYLOSIM, [str(interpreter), str(WORKER), str(folder)], timeout_s)["xylosim"])
        found = []
        for number, ((graph, _), network, value) in enumerate(zip(jobs, networks, values, strict=True)):
            with np.load(folder / f"{number}-out.npz", allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            found.append(_activity(graph, network, arrays, value.shape, version))
    return found


def _inputs(graph: SpikingGraph, inputs: Mapping[str, Integers]) -> np.ndarray:
    """All channels (batch, steps, channels), a step later."""
    given = checked_inputs(graph, inputs, device="cpu")
    whole = np.concatenate([value.numpy() for value in given.values()], axis=2).astype(np.int64)
    return np.concatenate([np.zeros_like(whole[:, :1]), whole[:, :-1]], axis=1)


def _arrays(network: XyloNetwork, inputs: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": inputs.astype(np.int32)}
    found |= {f"synapses/{pool}": rows for pool, rows in network.synapses.items()}
    for pool, parameters in network.parameters.items():
        found |= {f"{pool}/{name}": value for name, value in parameters.items()}
    return found


def _activity(
    graph: SpikingGraph, network: XyloNetwork, arrays: dict[str, np.ndarray], shape: tuple[int, ...], version: str
) -> Activity:
    spikes: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for pool, members in (("hidden", network.hidden), ("readout", network.readouts)):
        for population, first in members:
            part = slice(first, first + population.size)

            def whole(variable: str, pool: str = pool, part: slice = part) -> Tensor:
                samples = [arrays[f"{sample}/{pool}/{variable}"][:, part] for sample in range(shape[0])]
                return torch.from_numpy(np.stack(samples))

            spikes[population.name] = whole("spikes")
            states[population.name] = {variable: whole(variable) for variable in KINDS[population.kind].states}
    ran_on = f"{RAN_ON} {version} (v2)"
    return Activity(spikes, states, shape[0], shape[1], ran_on=ran_on, mode="xylo")
