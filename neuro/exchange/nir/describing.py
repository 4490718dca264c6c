"""Any NIR graph as a description of a spiking network in real numbers: layers of neurons, and synapses between them.

Linear nodes between two layers are multiplied into one set of synapses for each way (`linear_maps`), so that branches may
part and meet again; biases are what reaches a layer when nothing is sent. A way from a layer back to itself takes the step
that every loop takes; a longer loop, or a Delay of another length, is refused by name. An Output fed by linear nodes is a
layer without memory whose value is the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardware.text import listed, quoted
from neuro.conversion.spiking.description import INPUT, Description, Neurons, Synapses
from neuro.exchange.nir.library import NotInNir, nir_library, values
from neuro.exchange.nir.linear_maps import LINEAR, LinearMap, Node, Shape, grid_of, linear_map, sizes, through
from neuro.exchange.nir.nesting import flattened
from neuro.exchange.nir.node_neurons import NEURONS, SPIKING, VALUED, PooledLayer, Step, declared_shape, pooled, step_of
from neuro.exchange.nir.ports import Described, Port
from neuro.exchange.nir.synapse_nodes import Grid, ours_at

MOST_WAYS = 64
"""Ways of linear nodes between layers that may end in one layer."""

RESETS = ("zero", "subtract")
POOLING = ("fold", "own", "auto")
PASSING = ("Output", "Flatten", "Identity")

MOST_INPUTS = 2**22
"""Values of one step's input, twice those of an event camera of 1280 x 720: shapes are found by running zeros through."""


def describe(graph: Any, dt_s: float, *, reset: str = "zero", pools: str = "fold") -> Described:
    """A nir.NIRGraph in real numbers; graphs within it are taken apart (`nesting.flattened`).

    Args:
        graph: of any tool.
        dt_s: seconds of a step of Euler's rule.
        reset: what a spike does to v: "zero" sets it to v_reset, as NIR has it; "subtract" takes the threshold off, for
            files of networks that were trained so, which NIR cannot say.
        pools: "fold" puts a pool into the kernel or matrix behind it; "own" makes a layer of sums of one right behind
            neurons; "auto" does so where it saves half the synapses of that way.

    Raises:
        NotInNir: names the node that has no counterpart, with the remedy.
        NotConvertible: a loop over several layers, or a layer that nothing reaches.
    """
    if not dt_s > 0:
        raise NotInNir(f"dt_s is {dt_s}; a step is longer than 0 s")
    if reset not in RESETS:
        raise NotInNir(f"reset is {quoted(reset)}; it is one of {', '.join(RESETS)}")
    if pools not in POOLING:
        raise NotInNir(f"pools is {quoted(pools)}; it is one of {', '.join(POOLING)}")
    return _Reader(graph, dt_s, reset, pools).described()


@dataclass
class _Layer:
    """A layer as it is read: where its values are in the file."""

    name: str
    shape: Shape
    grid: Grid | None


@dataclass
class _Way:
    """Linear nodes from a layer or input to another layer, and the Delays among them in steps."""

    source: str
    nodes: list[Node]
    delay: int = 0
    delayed_by: str = ""


class _Reader:
    """One graph."""

    def __init__(self, graph: Any, dt_s: float, reset: str, pools: str) -> None:
        self.nodes, edges = flattened(graph)
        self.dt_s, self.reset, self.pools = dt_s, reset, pools
        self.pooled: dict[tuple[str, str], PooledLayer] = {}
        self.kinds = {name: type(node).__name__ for name, node in self.nodes.items()}
        self.before: dict[str, list[str]] = {name: [] for name in self.nodes}
        self.after: dict[str, list[str]] = {name: [] for name in self.nodes}
        for source, target in sorted(edges):
            self.before[target].append(source)
            self.after[source].append(target)
        self.labels = _labels(self.nodes)
        self.layers: dict[str, _Layer] = {}
        self.open: list[str] = []
        self.notes: list[str] = []
        self._check_kinds()
        self.joined = self._thresholds()

    def described(self) -> Described:
        entry = self._input()
        names = [name for name in self.nodes if self._is_layer(name) and name not in self.joined]
        neurons, synapses, starts = [], [], {}
        for name in names:
            layer, ways, start = self._made(name)
            neurons.append(layer)
            synapses += ways
            if np.any(start):
                starts[self.labels[name]] = start
        outputs = []
        for name in sorted(name for name, kind in self.kinds.items() if kind == "Output"):
            port, made, ways = self._output(name)
            outputs.append(port)
            neurons += made
            synapses += ways
        if not outputs:
            raise NotInNir("the NIR graph has no node of type Output; add one behind the layer that is the result")
        self._check_used(names)
        neurons += [found.neurons for found in self.pooled.values()]
        synapses += [found.synapses for found in self.pooled.values()]
        if starts:
            self.notes.append(f"v starts at v_reset, not at 0, in {listed(map(quoted, starts))}")
        if not any(np.isfinite(layer.threshold).all() for layer in neurons):
            raise NotInNir("the NIR graph has no spiking neurons; LIF, IF, CubaLIF or Threshold are needed")
        shape = entry.grid or (math.prod(entry.shape),)
        described = Description(
            shape, tuple(neurons), tuple(synapses), tuple(dict.fromkeys(p.layer for p in outputs)), tuple(self.notes)
        )
        return Described(described, entry, tuple(outputs), starts)

    def _check_kinds(self) -> None:
        known = (*LINEAR, *NEURONS, "Input", "Output", "Delay")
        for name, kind in self.kinds.items():
            if kind not in known:
                raise NotInNir(
                    f"node {quoted(name)} ({kind}): it has no counterpart on the chip; known: {', '.join(known)}"
                )

    def _is_layer(self, name: str) -> bool:
        return self.kinds[name] in NEURONS

    def _thresholds(self) -> dict[str, str]:
        """LI, CubaLI or I -> the Threshold behind it, where it leads to nothing else: together they are one layer."""
        found = {}
        for name, kind in self.kinds.items():
            if kind in VALUED and [self.kinds[n] for n in self.after[name]] == ["Threshold"]:
                (behind,) = self.after[name]
                if self.before[behind] == [name]:
                    found[behind] = name
        return {inner: outer for outer, inner in found.items()}

    def _input(self) -> Port:
        names = [name for name, kind in self.kinds.items() if kind == "Input"]
        if len(names) != 1:
            raise NotInNir(
                f"the NIR graph has {len(names)} nodes of type Input ({listed(map(quoted, names))}); one is needed. Join"
                " several into one, and part them behind it by Linear nodes"
            )
        (name,) = names
        shape = self._input_shape(name)
        self.layers[name] = _Layer(INPUT, shape, grid_of(shape))
        return Port(name, INPUT, shape, grid_of(shape))

    def _input_shape(self, name: str) -> Shape:
        """Sizes of one step's input; of an Input without any (NIRTorch writes such) those that the node behind it takes."""
        given = (self.nodes[name].input_type or {}).get("input")
        if given is None:
            takes = [getattr(self.nodes[n], "input_type", None) or {} for n in self.after[name]]
            given = next((found for t in takes if (found := t.get("input")) is not None), None)
        numbers = np.asarray(given if given is not None else []).reshape(-1).tolist()
        shape = tuple(int(n) for n in numbers if isinstance(n, int) or (isinstance(n, float) and n == int(n)))
        if not shape or len(shape) != len(numbers) or min(shape) < 1:
            raise NotInNir(
                f"node {quoted(name)} (Input) has the shape {quoted(given)}; the sizes of the layers follow from it, so"
                " give it whole numbers from 1"
            )
        if math.prod(shape) > MOST_INPUTS:
            raise NotInNir(
                f"node {quoted(name)} (Input) has the shape {quoted(shape)}, more than {MOST_INPUTS:,} values a step; give"
                " it the sizes of the input"
            )
        return shape

    def _layer(self, name: str) -> _Layer:
        """Shape of a layer: that of what reaches it from others; its parameters' own where only it reaches itself."""
        if name in self.layers:
            return self.layers[name]
        node = self.nodes[name]
        if name in self.open:
            shape = declared_shape(node)
            return _Layer(self.labels[name], shape, grid_of(shape))
        self.open.append(name)
        shapes: dict[tuple[Shape, Grid | None], str] = {}
        for way in self._ways(name):
            if way.source != name:
                source = self._layer(way.source)
                shapes[self._reached(way, source)] = way.nodes[-1][0] if way.nodes else way.source
        self.open.pop()
        declared = declared_shape(node)
        if not shapes:
            shapes[declared, grid_of(declared)] = name
        if len({shape for shape, _ in shapes}) > 1:
            different = ", ".join(f"{shape} from {quoted(by)}" for (shape, _), by in shapes.items())
            raise NotInNir(f"node {quoted(name)} ({self.kinds[name]}): what reaches it has different shapes: {different}")
        grids = {grid for _, grid in shapes}
        shape = next(iter(shapes))[0]
        self.layers[name] = _Layer(self.labels[name], shape, grids.pop() if len(grids) == 1 else grid_of(shape))
        return self.layers[name]

    def _reached(self, way: _Way, source: _Layer) -> tuple[Shape, Grid | None]:
        """Shape behind a way, and the grid that its last nodes flatten, if they do."""
        shape, grid = source.shape, source.grid
        for node in way.nodes:
            behind = sizes(node, shape)
            kept = type(node[1]).__name__ == "Flatten" and len(behind) == 1
            shape, grid = behind, (grid if kept and len(shape) != 1 else grid_of(behind))
        return shape, grid

    def _ways(self, name: str) -> list[_Way]:
        """Every way of linear nodes that ends in a layer or an Output."""
        found: list[_Way] = []

        def back(at: str, nodes: list[Node], delay: int, by: str, seen: tuple[str, ...]) -> None:
            for source in self.before[at]:
                kind = self.kinds[source]
                if kind == "Input" or self._is_layer(source):
                    if self.joined.get(source) != name:
                        found.append(_Way(source, nodes, delay, by))
                elif source in seen:
                    raise NotInNir(
                        f"node {quoted(source)} ({kind}) is at a loop without neurons, in which a sum would wait for"
                        " itself. Put neurons, or a Delay, into it"
                    )
                elif kind == "Delay":
                    back(source, nodes, delay + self._steps(source), source, (*seen, source))
                else:
                    back(source, [(source, self.nodes[source]), *nodes], delay, by, (*seen, source))
                if len(found) > MOST_WAYS:
                    raise NotInNir(f"node {quoted(name)}: more than {MOST_WAYS} ways lead to it; put neurons between them")

        entry = self.joined_from(name)
        back(entry, [], 0, "", (entry,))
        return found

    def joined_from(self, name: str) -> str:
        """The LI, CubaLI or I before a Threshold that makes its spikes; else the name."""
        return next((inner for inner, outer in self.joined.items() if outer == name), name)

    def _steps(self, name: str) -> int:
        delay = values(self.nodes[name], name, "delay").reshape(-1)
        steps = np.rint(delay / self.dt_s)
        if np.ptp(steps) > 0 or np.any(np.abs(delay / self.dt_s - steps) > 1e-3) or steps[0] < 0:
            raise NotInNir(
                f"node {quoted(name)} (Delay): {delay.min():g} to {delay.max():g} s are no whole number of steps of"
                f" {self.dt_s:g} s, the same for all. Give the step it was made with (dt_s, --dt), or split the layer"
            )
        return int(steps[0])

    def _made(self, name: str) -> tuple[Neurons, list[Synapses], np.ndarray]:
        layer, node = self._layer(name), self.nodes[name]
        inner = self.joined_from(name)
        if inner == name:
            step = step_of(name, node, layer.shape, self.dt_s, self.reset)
        else:
            step = step_of(inner, self.nodes[inner], layer.shape, self.dt_s, self.reset, (name, node))
        drive = step.gain * self._constant(inner, layer.shape)
        return self._neurons(layer, step, drive), self._synapses(name, layer, step.gain), step.start

    def _neurons(self, layer: _Layer, step: Step, drive: np.ndarray) -> Neurons:
        """`drive` is what reaches the current at each step; one that forgets at once hands it on to v."""
        into_v = np.where(step.alpha == 0, drive, 0)
        given = (step.alpha, step.beta, step.threshold, step.bias + into_v, drive - into_v)
        alpha, beta, threshold, bias, current = (_ordered(value, layer.grid) for value in given)
        shape = layer.grid or (math.prod(layer.shape),)
        return Neurons(layer.name, shape, alpha, beta, threshold, bias, reset=step.reset, current_bias=current)

    def _synapses(self, name: str, layer: _Layer, gain: np.ndarray) -> list[Synapses]:
        found: list[Synapses] = []
        gains: list[Node] = []
        if np.any(gain != 1):
            gains = [(name, nir_library().Scale(gain.reshape(layer.shape)))]
        for way in self._ways(name):
            self._check_delay(way, name)
            source = self._layer(way.source)
            nodes = [*way.nodes, *gains]
            made = linear_map(nodes, source.shape, source.grid, layer.grid)
            if self.pools != "fold" and self._is_layer(way.source):
                source, made = self._pooled(source, nodes, layer, made)
            label = f"{layer.name}.{self.labels[way.nodes[0][0] if way.nodes else way.source]}"
            taken = [item.name for item in found]
            label = next(at for n in range(1, MOST_WAYS + 2) if (at := label if n == 1 else f"{label}.{n}") not in taken)
            found.append(Synapses(label, source.name, layer.name, made.weight, made.conv))
        return found

    def _pooled(self, source: _Layer, nodes: list[Node], target: _Layer, folded: LinearMap) -> tuple[_Layer, LinearMap]:
        """The way as it is, or from a layer of sums of its own where the pool comes first and `pools` says so."""
        found = pooled(source.name, source.shape, source.grid, nodes)
        if found is None:
            return source, folded
        grid = found.neurons.shape
        made = linear_map(found.rest, found.shape, (grid[0], grid[1], grid[2]), target.grid)
        if self.pools == "auto" and 2 * (made.synapses + found.count) > folded.synapses:
            return source, folded
        known = self.pooled.setdefault((source.name, nodes[found.at][0]), found.named(self.labels[nodes[found.at][0]]))
        return _Layer(known.neurons.name, found.shape, grid_of(found.shape)), made

    def _check_delay(self, way: _Way, target: str) -> None:
        if way.delay and not (way.source == target and way.delay == 1):
            raise NotInNir(
                f"node {quoted(way.delayed_by)} (Delay): {way.delay} steps between {quoted(way.source)} and"
                f" {quoted(target)}; layers one behind the other have none here, and a loop has one. Take it out, or train"
                " with one step in loops; only a file with our integers (write_nir, `spikegate export`) keeps other delays"
            )

    def _constant(self, name: str, shape: Shape) -> np.ndarray:
        """What reaches a layer when nothing is sent: biases of the nodes on the ways, float64 (N,) in NIR's order."""
        done: dict[str, Tensor] = {}

        def out(at: str) -> Tensor | None:
            if at in done:
                return done[at]
            kind = self.kinds[at]
            if kind == "Input" or self._is_layer(at):
                done[at] = torch.zeros((1, *self._layer(at).shape), dtype=torch.float64)
            else:
                arrived = [value for source in self.before[at] if (value := out(source)) is not None]
                if not arrived:
                    return None
                total = sum(arrived[1:], arrived[0])
                done[at] = total if kind == "Delay" else through((at, self.nodes[at]), total)
            return done[at]

        found = torch.zeros(math.prod(shape), dtype=torch.float64)
        for source in self.before[name]:
            if (value := out(source)) is not None:
                found = found + value.reshape(-1)
        return found.numpy()

    def _output(self, name: str) -> tuple[Port, list[Neurons], list[Synapses]]:
        """The result that a node names: a layer's spikes or value, or what linear nodes make of spikes."""
        ways = self._ways(name)
        if not ways:
            raise NotInNir(f"node {quoted(name)} (Output): nothing leads to it; join it to the layer that is the result")
        direct = [way for way in ways if all(type(node).__name__ in PASSING for _, node in way.nodes)]
        if len(ways) == 1 and direct and self._is_layer(ways[0].source) and not ways[0].delay:
            source = self._layer(ways[0].source)
            shape, _ = self._reached(ways[0], source)
            return Port(name, source.name, shape, source.grid), [], []
        reached = {self._reached(way, self._layer(way.source)) for way in ways}
        if len(reached) > 1:
            raise NotInNir(
                f"node {quoted(name)} (Output): what reaches it has different shapes: {listed(map(str, reached))}"
            )
        shape, grid = reached.pop()
        layer = _Layer(self.labels[name], shape, grid)
        size = math.prod(shape)
        self.layers[name] = layer
        zeros, ones = np.zeros(size), np.ones(size)
        step = Step(zeros, zeros, ones, zeros, np.full(size, np.inf), "none", zeros)
        made = self._neurons(layer, step, self._constant(name, shape))
        return Port(name, layer.name, shape, grid), [made], self._synapses(name, layer, ones)

    def _check_used(self, names: Sequence[str]) -> None:
        """Values that feed a layer, and nodes that lead to nothing."""
        reached: set[str] = set()
        waiting = [name for name, kind in self.kinds.items() if kind == "Output"]
        while waiting:
            at = waiting.pop()
            if at not in reached:
                reached.add(at)
                waiting += self.before[at]
        if left := [name for name in self.kinds if name not in reached]:
            raise NotInNir(
                f"node {quoted(left[0])} ({self.kinds[left[0]]}) is not on the way from the input to the output; join it,"
                " or take it out"
            )
        for name in names:
            if self.kinds[name] in VALUED and any(self.kinds[n] not in PASSING for n in self.after[name]):
                behind = next(n for n in self.after[name] if self.kinds[n] not in PASSING)
                raise NotInNir(
                    f"node {quoted(name)} ({self.kinds[name]}): its value, which is no spike, feeds node {quoted(behind)}"
                    f" ({self.kinds[behind]}). Put a Threshold behind it, or use one of {', '.join(SPIKING[:3])}"
                )


def _ordered(value: np.ndarray, grid: Grid | None) -> np.ndarray:
    """(N,) in NIR's order of a grid as ours."""
    if grid is None:
        return value
    found = np.empty_like(value)
    found[ours_at(grid)] = value
    return found


def _labels(nodes: Iterable[str]) -> dict[str, str]:
    """Names of layers: those of the nodes, of letters that a population's name may have, and not the input's own."""
    found: dict[str, str] = {}
    for name in nodes:
        label = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        label = label if label[:1].isalnum() else f"_{label}"
        while label == INPUT or label in found.values():
            label += "_"
        found[name] = label
    return found
