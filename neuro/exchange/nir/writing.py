"""An integer graph as a NIR graph, in one portable form; the integers ride along.

    lif, lif_reset     LIF: r = 1, v_reset = 0, weights x tau/dt              (u forgets at once: du = 4095)
                       IF: r = 1                                              (and v forgets nothing: dv = 0)
                       CubaLIF: r = tau_mem/dt, w_in = tau_syn/dt             (u decays)
                       LI, then IF                                            (u decays, v does not)
    graded, vth 0      no node where one edge reaches it, as the sum is the message; else Scale by 1
    dense, sparse      Linear, or Affine where it carries the target's bias
    delay_dense        one Linear and one Delay for each delay
    conv               Conv2d where both ends keep a grid, else Linear

v counts in units of vth, one value per neuron, v_leak = 0 unless nothing else can carry a bias; a reset is to 0, in the
step of the spike. Numbers are exact where 4096/dv and 4096/(du + 1) are powers of two. What has no node is refused by name:
other resets, signed spikes, thresholds and products of graded messages, sigma and delta, refractory steps.
NIR's arithmetic is that of real numbers: `notes` of the metadata say what the chip rounds.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hardware.text import quoted
from neuro.exchange.nir.library import DT_S, NirFileError, NotInNir, nir_library, numbered
from neuro.exchange.nir.synapse_nodes import Grid, conv_node, grids, keeps_grid, matrix, node_shape, ours_at
from neuro.exchange.nir.timing import bias_units, delays_used, node_delay, run_length, shifts
from neuro.graph import (
    FILE_SUFFIX,
    HEADER_KEY,
    GraphError,
    Population,
    Projection,
    SpikingGraph,
    load_graph,
    save_graph,
)
from neuro.graph.kinds import KINDS

KEY = "spikegate"  # of the metadata
FORM = 1
TIMINGS = ("portable", "literal")
VTH_UNIT = 64

# Kind of population -> why NIR has no node for it, and what to do.
REFUSED = {
    "ternary_lif": "NIR's spikes have no sign. Use kind lif, two populations for two signs",
    "lif_refractory": "NIR has no refractory steps. Use kind lif, or refractory=1, which is the same",
    "rf": "NIR has no resonate-and-fire neuron. Keep the graph file",
    "rf_iz": "NIR has no resonate-and-fire neuron. Keep the graph file",
    "lif_soft": "NIR resets to v_reset, not by subtraction. Use kind lif or lif_reset (reset='hard' in the rate route)",
    "lif_general": "NIR resets to v_reset at once. Use kind lif or lif_reset, or keep the graph file",
    "xylo": "NIR has no decay by a bit shift and no several spikes a step. Keep the graph file",
    "xylo_out": "NIR has no decay by a bit shift. Keep the graph file",
    "sigma": "NIR has no sigma-delta nodes. Use the rate route, or keep the graph file",
    "delta": "NIR has no sigma-delta nodes. Use the rate route, or keep the graph file",
    "sigma_delta": "NIR has no sigma-delta nodes. Use the rate route, or keep the graph file",
    "graded_relu": "NIR has no ReLU and no graded spikes behind a threshold. Use the rate route, or keep the graph file",
    "product": "NIR has no product of two signals. Use the rate route, or keep the graph file",
    "norm": "NIR has no normalisation. Keep the graph file",
}


def to_nir(graph: SpikingGraph, *, timing: str = "portable") -> Any:
    """A NIR graph that does the same from rest, with the integers of `graph` in its metadata.

    Args:
        graph: any graph; see above for the kinds that have a node.
        timing: "portable": a population's node is ahead of the chip by the steps of the shortest way to it, and an edge
            takes no time, as readers have it; Delay nodes stand where two ways differ in length. "literal": a Delay node
            for every step of every projection, and nothing is ahead.

    Returns:
        nir.NIRGraph. `metadata["spikegate"]` holds `form`, `timing`, `dt_s`, `ahead` (JSON: steps per population), `steps`
        (length of a sample; 0: any), `notes` and `graph`, the members of the graph file.

    Raises:
        NotInNir: names the first population or projection that NIR cannot say, with the remedy.
        NirUnavailable: nir is not installed.
        ValueError: an unknown timing.
    """
    if timing not in TIMINGS:
        raise ValueError(f"timing is {quoted(timing)}; known: {', '.join(TIMINGS)}")
    return _Writer(graph, timing).graph()


def write_nir(graph: SpikingGraph | Any, path: str | os.PathLike[str], *, timing: str = "portable") -> Path:
    """Write a graph (or a finished nir.NIRGraph) as HDF5; the file appears whole or not at all.

    Raises as `to_nir`, and NirFileError where the name does not end in `.nir`.
    """
    path = Path(path)
    if path.suffix != ".nir":
        raise NirFileError(f"{path}: a NIR file is named NAME.nir")
    library = nir_library()
    made = to_nir(graph, timing=timing) if isinstance(graph, SpikingGraph) else graph
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        library.write(str(temporary), made)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def refusals(graph: SpikingGraph) -> tuple[str, ...]:
    """Everything in a graph that has no NIR node, a sentence each; empty where only timing can still be in the way."""
    found = []
    for p in graph.populations:
        thresholded = p.kind == "graded" and np.any(np.asarray(p.params["vth"]) > 0)
        reason = REFUSED.get(p.kind)
        if p.kind == "lif_refractory" and p.params["refractory"] == 1:
            reason = None
        if thresholded:
            reason = "NIR has no threshold that lets graded messages through. Use vth=0, or keep the graph file"
        elif reason is None and p.kind not in _WRITTEN:
            reason = "NIR has no node for it. Keep the graph file"
        if reason:
            found.append(f"population {quoted(p.name)} ({p.kind}): {reason}")
    for w in graph.projections:
        graded = graph.population(w.source).kind == "graded"
        if graded and w.source == w.target:
            found.append(
                f"projection {quoted(w.name)}: a graded population that feeds itself has no form that readers agree on."
                " Use kind lif, or keep the graph file"
            )
        if graded and w.num_message_bits == 0:
            found.append(
                f"projection {quoted(w.name)}: it reads graded messages as 0 or 1, which NIR has no node for."
                " Give it the message bits of its source"
            )
    return tuple(found)


_WRITTEN = ("input", "lif", "lif_reset", "lif_refractory", "graded")


def notes(graph: SpikingGraph) -> tuple[str, ...]:
    """What the chip does that NIR's real numbers do not, a sentence each; beside the ends of registers."""
    found = []
    for p in graph.populations:
        if p.kind in _WRITTEN[1:4]:
            if p.params["du"] != 4095:
                found.append(f"{p.name}: the chip drops fractions of u at each decay by {p.params['du'] + 1}/4096")
            if p.params["dv"] != 0:
                found.append(f"{p.name}: the chip drops fractions of v at each decay by {p.params['dv']}/4096")
            if p.params["vth"] == KINDS[p.kind].parameters["vth"].high:
                found.append(f"{p.name}: its threshold is the highest there is: read its v, it hardly spikes")
    for w in graph.projections:
        if w.weight_exp < 0 and np.any(w.weight % (1 << -w.weight_exp)):
            found.append(f"{w.name}: the chip rounds its sums down after weight_exp {w.weight_exp}")
        if w.conv is not None and w.weight_exp:
            found.append(f"{w.name}: Lava's Conv ignores weight_exp {w.weight_exp}, which acts here")
    return tuple(found)


class _Writer:
    """One graph on its way; names are made fit for readers, which turn them into Python names and attributes."""

    def __init__(self, graph: SpikingGraph, timing: str) -> None:
        for problem in refusals(graph):
            raise NotInNir(problem)
        self._nir, self._graph, self._timing = nir_library(), graph, timing
        self._ahead = shifts(graph) if timing == "portable" else {p.name: 0 for p in graph.populations}
        self._steps = run_length(graph, self._ahead)
        self._grids = grids(graph)
        self._taken: set[str] = set()
        self._nodes: dict[str, Any] = {}
        self._edges: list[tuple[str, str]] = []
        self._name = {p.name: self._label(p.name) for p in graph.populations}
        self._flat: dict[str, str] = {}
        self._inside: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {}

    def graph(self) -> Any:
        """The whole graph."""
        self._carriers = {p.name: self._carrier(p) for p in self._graph.populations}
        for population in self._graph.populations:
            self._neurons(population)
        for projection in self._graph.projections:
            self._projection(projection)
        for name, (nodes, edges) in self._inside.items():
            # norse takes what runs last for the output, and follows edges in their order
            ordered = sorted(edges, key=lambda edge: edge[1] == "output")
            self._nodes[self._name[name]] = self._nir.NIRGraph(nodes, ordered)
        for name in self._graph.outputs:
            label = self._label("output" if len(self._graph.outputs) == 1 else f"{name}_output")
            shape = node_shape(self._graph.population(name), self._grids)
            self._nodes[label] = self._nir.Output({"output": np.array(shape)})
            self._edges.append((self._name[name], label))
        self._drop_scales()
        made = self._nir.NIRGraph(*numbered(self._nodes, self._edges))
        made.metadata = {
            KEY: {
                "form": FORM,
                "timing": self._timing,
                "dt_s": DT_S,
                "ahead": json.dumps(self._ahead),
                "steps": self._steps or 0,
                "notes": "\n".join(notes(self._graph)),
                "graph": members(self._graph),
            }
        }
        return made

    def _label(self, name: str) -> str:
        label = re.sub(r"\W", "_", name)
        if label[0].isdigit() or not label.isidentifier() or label in _attributes():
            label = f"n_{label}"
        while label in self._taken:
            label += "_"
        self._taken.add(label)
        return label

    def _drop_scales(self) -> None:
        """Take out the ones that stand for graded populations which a single edge reaches."""
        for p in self._graph.populations:
            label = self._name[p.name]
            before = [source for source, target in self._edges if target == label]
            if p.kind == "graded" and len(before) == 1:
                del self._nodes[label]
                kept = [edge for edge in self._edges if label not in edge]
                self._edges = kept + [(before[0], target) for source, target in self._edges if source == label]

    # Populations

    def _neurons(self, p: Population) -> None:
        label, shape = self._name[p.name], node_shape(p, self._grids)
        if p.kind == "input":
            self._nodes[label] = self._nir.Input({"input": np.array(shape)})
            return
        if p.kind == "graded":
            self._nodes[label] = self._nir.Scale(scale=np.ones(shape))
            return
        chain = self._chain(p, shape)
        looped = any(w.source == p.name for w in self._graph.incoming(p.name))
        if not looped and len(chain) == 1:
            self._nodes[label] = chain[0]
            return
        # Several nodes, or a loop: a graph of its own, which is how readers take one
        size = np.array(shape)
        nodes = {"input": self._nir.Input({"input": size})}
        nodes |= {f"neuron{i}" if i else "neuron": node for i, node in enumerate(chain)}
        nodes["output"] = self._nir.Output({"output": size})
        names = list(nodes)
        self._inside[p.name] = nodes, list(pairwise(names))

    def _chain(self, p: Population, shape: tuple[int, ...]) -> list[Any]:
        """Neuron nodes of a lif kind, in the order that a sum passes them."""
        du, dv, library = int(p.params["du"]), int(p.params["dv"]), self._nir

        def full(value: float) -> np.ndarray:
            return np.full(shape, float(value))

        leak = full(0)
        if np.any(bias_units(p)) and self._carriers[p.name] is None:
            if dv == 0:
                raise NotInNir(
                    f"population {quoted(p.name)} ({p.kind}): its bias needs a matrix of weights to ride on, "
                    "without a delay, and"
                    " u that forgets at once (du=4095), as NIR's IF has no leak. Give it a dense projection, or dv > 0"
                )
            leak = self._per_neuron(p, bias_units(p) / VTH_UNIT * 4096 / dv).reshape(shape)
        threshold = full(float(p.params["vth"]))
        rest = {"v_threshold": threshold, "v_reset": full(0)}
        if dv == 0:
            fire = library.IF(r=full(1), **rest)
            if du == 4095:
                return [fire]
            return [library.LI(tau=full(DT_S * 4096 / (du + 1)), r=full(1), v_leak=full(0)), fire]
        tau = full(DT_S * 4096 / dv)
        if du == 4095:
            return [library.LIF(tau=tau, r=full(1), v_leak=leak, **rest)]
        gains = {"r": full(4096 / dv), "w_in": full(4096 / (du + 1))}
        return [library.CubaLIF(tau_syn=full(DT_S * 4096 / (du + 1)), tau_mem=tau, v_leak=leak, **gains, **rest)]

    def _gain(self, name: str) -> float:
        """What the weights into a population are multiplied by."""
        p = self._graph.population(name)
        if p.kind in ("graded", "input"):
            return 1.0
        du, dv = int(p.params["du"]), int(p.params["dv"])
        if du == 4095:
            return 4096 / dv if dv else 1.0
        return 1.0 if dv else 4096 / (du + 1)

    def _per_neuron(self, p: Population, value_N: np.ndarray) -> np.ndarray:
        """Our order to NIR's."""
        return value_N[ours_at(self._grids[p.name])] if p.name in self._grids else value_N

    def _carrier(self, p: Population) -> str | None:
        """The projection whose node carries a population's bias; None: none can, or there is no bias."""
        bias = bias_units(p)
        if not np.any(bias) or p.params.get("du") != 4095:
            return None
        for w in self._graph.incoming(p.name):
            if w.source == p.name or node_delay(w, delays_used(w)[0], self._ahead):
                continue
            if not keeps_grid(w, self._grids) or np.array_equal(
                bias, np.tile(bias[: len(w.weight)], p.size // len(w.weight))
            ):
                return w.name
        return None

    # Projections

    def _projection(self, w: Projection) -> None:
        target = self._graph.population(w.target)
        gain = self._gain(w.target) * 2.0**w.weight_exp
        loop = w.source == w.target
        bias = None
        if self._carriers[w.target] == w.name:
            bias = bias_units(target) / VTH_UNIT * self._gain(w.target)
        for number, delay in enumerate(delays_used(w)):
            steps = node_delay(w, delay, self._ahead, self._timing == "literal")
            node, flat = self._synapses(w, delay, gain, bias if number == 0 else None)
            name = w.name if len(delays_used(w)) == 1 else f"{w.name}_{delay}"
            way: list[tuple[str, Any]] = [(self._label(name), node)]
            if steps:
                shape = node_shape(target, self._grids)
                way.append((self._label(f"{name}_delay"), self._nir.Delay(delay=np.full(shape, steps * DT_S))))
            if loop:
                self._loop(w, way)
                continue
            start = self._flattened(w.source) if flat else self._name[w.source]
            self._nodes |= dict(way)
            self._join([start, *(label for label, _ in way), self._name[w.target]], self._edges)

    def _loop(self, w: Projection, way: list[tuple[str, Any]]) -> None:
        nodes, edges = self._inside[w.source]
        neurons = [name for name in nodes if name.startswith("neuron")]
        output = nodes.pop("output")
        nodes |= dict(way) | {"output": output}
        self._join([neurons[-1], *(label for label, _ in way), neurons[0]], edges)

    def _synapses(self, w: Projection, delay: int, gain: float, bias_N: np.ndarray | None) -> tuple[Any, bool]:
        """The node, and whether it takes its source flattened."""
        target = self._graph.population(w.target)
        if keeps_grid(w, self._grids):
            return conv_node(w, gain, None if bias_N is None else bias_N[: len(w.weight)]), False
        grid: Grid | None = self._grids.get(w.source)
        weight = matrix(w, delay, grid) * gain
        if bias_N is None:
            return self._nir.Linear(weight=weight), grid is not None
        return self._nir.Affine(weight=weight, bias=self._per_neuron(target, bias_N)), grid is not None

    def _flattened(self, source: str) -> str:
        if source not in self._flat:
            label = self._flat[source] = self._label(f"{source}_flat")
            shape = node_shape(self._graph.population(source), self._grids)
            self._nodes[label] = self._nir.Flatten({"input": np.array(shape)}, start_dim=0, end_dim=-1)
            self._edges.append((self._name[source], label))
        return self._flat[source]

    @staticmethod
    def _join(labels: Iterable[str], edges: list[tuple[str, str]]) -> None:
        names = list(labels)
        edges += list(pairwise(names))


def _attributes() -> frozenset[str]:
    """Names that a torch.nn.ModuleDict has already; readers make one attribute per node."""
    return frozenset((*dir(torch.nn.ModuleDict()), "state"))


def members(graph: SpikingGraph) -> dict[str, Any]:
    """`header`, as text, and the integer arrays of the graph's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_graph(graph, Path(folder) / f"graph{FILE_SUFFIX}")
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {key: archive[key] for key in archive.files}
    return arrays | {HEADER_KEY: arrays[HEADER_KEY].tobytes().decode()}


def restored(carried: Mapping[str, Any], where: str) -> SpikingGraph:
    """The graph that `members` took apart, every check of a new graph made.

    Raises:
        NirFileError: not what `members` gives; `where` names the file.
    """
    try:
        header = np.frombuffer(carried[HEADER_KEY].encode(), dtype=np.uint8)
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in carried.items()} | {HEADER_KEY: header}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"graph{FILE_SUFFIX}"
            np.savez(path, allow_pickle=False, **arrays)
            try:
                return load_graph(path)
            except GraphError as error:
                raise NirFileError(f"{where}: {str(error).removeprefix(f'{path}: ')}") from error
    except NirFileError:
        raise
    except Exception as error:  # metadata of any other form than ours
        raise NirFileError(f"{where}: the integers beside the nodes are damaged: {quoted(error)}") from error
