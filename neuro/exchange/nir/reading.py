"""A NIR file back to an integer graph, and any NIR graph to one chain of weights and neurons in real numbers.

`read_nir` takes our own files: the integers come from the metadata, and the nodes must still say what they say. `chain`
takes what other tools write: Linear, Affine, Scale, Conv1d, Conv2d, Flatten, SumPool2d and AvgPool2d are multiplied into
one matrix per layer; LIF, IF and CubaLIF become (beta, gain, bias, threshold) of a step dt by Euler's rule. `from_nir`
makes the integers of it (`neuro.conversion.lif`).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hardware.text import listed, quoted
from neuro.conversion.lif import LifNetwork, convert_lif
from neuro.exchange.nir.carried import restored
from neuro.exchange.nir.library import DT_S, NirFileError, NotInNir
from neuro.exchange.nir.loading import load_nir
from neuro.exchange.nir.nesting import flattened
from neuro.exchange.nir.writing import FORM, KEY, to_nir
from neuro.graph import SpikingGraph

LARGEST_MATRIX = 2**26  # weights of one layer multiplied out


def read_nir(path: str | os.PathLike[str]) -> SpikingGraph:
    """The integer graph of a file that `write_nir` made: identical to the one written.

    Raises:
        NirFileError: unreadable, no integers in it (`from_nir` takes such files), written by another version, or nodes that
            another tool changed since.
        FileNotFoundError, NirUnavailable: as `load_nir`.
    """
    return carried_graph(load_nir(path), str(path))


def carried_graph(graph: Any, where: str = "the NIR graph") -> SpikingGraph:
    """The integers beside the nodes of a nir.NIRGraph; raises NirFileError as `read_nir`."""
    if not has_integers(graph):
        raise NirFileError(f"{where} holds no integers of ours; from_nir (spikegate import) converts its nodes")
    record = graph.metadata[KEY]
    if record.get("form") != FORM:
        raise NirFileError(f"{where} has form {record.get('form')}, this version reads {FORM}; export it again")
    found = restored(record.get("graph", {}), where)
    timing = record.get("timing")
    try:
        expected = to_nir(found, timing=str(timing))
    except (NotInNir, ValueError) as error:
        raise NirFileError(f"{where}: its integers have no such nodes: {error}") from error
    if changed := _difference(expected, graph):
        raise NirFileError(
            f"{where}: {changed} is not what the integers beside it say; another tool changed it."
            " Delete metadata/spikegate to convert the nodes as they are"
        )
    return found


def has_integers(graph: Any) -> bool:
    """Whether a nir.NIRGraph carries an integer graph."""
    return isinstance(graph.metadata, dict) and isinstance(graph.metadata.get(KEY), dict)


def _difference(first: Any, second: Any) -> str:
    """The first node or edge that differs, in words; "" where none does. Metadata apart."""
    if set(first.nodes) != set(second.nodes):
        return f"node {quoted(min(set(first.nodes) ^ set(second.nodes)))}"
    if sorted(first.edges) != sorted(second.edges):
        return f"edge {quoted(min(set(first.edges) ^ set(second.edges), default='counted twice'))}"
    for name, node in first.nodes.items():
        other = second.nodes[name]
        if type(node) is not type(other):
            return f"node {quoted(name)}"
        if isinstance(node, type(first)):
            if inner := _difference(node, other):
                return f"{inner} in {quoted(name)}"
            continue
        ours, theirs = node.to_dict(), other.to_dict()
        for key in sorted((set(ours) | set(theirs)) - {"metadata", "type"}):
            if key not in theirs or key not in ours or not np.array_equal(np.asarray(ours[key]), np.asarray(theirs[key])):
                return f"{key} of node {quoted(name)}"
    return ""


def from_nir(
    graph: Any,
    *,
    dt_s: float | None = None,
    steps: int | None = None,
    input_scale: float = 1.0,
    input_range: tuple[int, int] = (0, 1),
    headroom_bits: float = 0.5,
) -> LifNetwork:
    """A NIR graph of another tool as an integer graph of lif neurons.

    Args:
        graph: nir.NIRGraph: one input, one output, layers one behind the other, each ending in LIF, IF, or CubaLIF whose
            synapse forgets within a step. Graphs within it count as what they hold.
        dt_s: seconds of a step (default: the file's, if we wrote it, else 1e-4, which is snnTorch's; norse's is 1e-3).
        steps, input_scale, input_range, headroom_bits: as `convert_lif`.

    Raises:
        NotInNir: names the node that has no integer counterpart, with the remedy.
        NotConvertible: as `convert_lif`.
    """
    if dt_s is None:
        dt_s = float(graph.metadata[KEY]["dt_s"]) if has_integers(graph) else DT_S
    layers: list[tuple[nn.Linear, Any]] = [
        (stage.linear(), Leaky(stage.beta, stage.threshold)) for stage in chain(graph, dt_s)
    ]
    return convert_lif(layers, steps=steps, input_scale=input_scale, input_range=input_range, headroom_bits=headroom_bits)


@dataclass(frozen=True)
class Leaky:
    """Neurons of NIR in the terms of snnTorch's Leaky, which `convert_lif` reads: hard reset, threshold above 0."""

    beta: Tensor
    threshold: Tensor
    reset_mechanism: str = "zero"
    reset_delay: bool = False
    inhibition: bool = False
    state_quant: bool = False
    graded_spikes_factor: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One layer in real numbers: `v <- beta v + W x + b`, a spike where v > threshold, v becomes 0.

    `weight` (N, F) and `bias` (N,) float64 hold r, tau and dt already; `beta`, `threshold` (N,).
    """

    name: str
    weight: Tensor
    bias: Tensor
    beta: Tensor
    threshold: Tensor

    def linear(self) -> nn.Linear:
        """W and b as a torch layer of float64."""
        biased = bool((self.bias != 0).any())
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=biased, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            if biased:
                layer.bias.copy_(self.bias)
        return layer


def chain(graph: Any, dt_s: float) -> list[Stage]:
    """The layers of a feed-forward NIR graph, in order; graphs within it are taken apart (`nesting.flattened`).

    Raises NotInNir: a branch, a loop, several inputs or outputs, a node without a counterpart, sizes that do not meet.
    """
    nodes, edges = flattened(graph)
    order = _in_order(nodes, edges)
    stages: list[Stage] = []
    shape = _input_shape(order, nodes)
    size = int(np.prod(shape))
    waiting: list[tuple[str, Any]] = []
    for name in order[1:-1]:
        node = nodes[name]
        kind = type(node).__name__
        if kind in _LINEAR:
            waiting.append((name, node))
            continue
        if kind not in ("LIF", "IF", "CubaLIF"):
            raise NotInNir(
                f"node {quoted(name)} ({kind}): {_NO_COUNTERPART.get(kind, 'it has no counterpart on the chip')}"
            )
        weight_NF, bias_N, shape = _multiplied(waiting, shape, size)
        stages.append(_neuron(name, node, kind, weight_NF, bias_N, shape, dt_s))
        size, waiting = int(np.prod(shape)), []
    if waiting:
        names = listed(quoted(name) for name, _ in waiting)
        raise NotInNir(
            f"node {names}: weights behind the last neurons; a chip's output is spikes. End the graph with LIF or IF"
        )
    if not stages:
        raise NotInNir("the NIR graph has no spiking neurons; from_nir takes layers of LIF, IF or CubaLIF")
    return stages


def _input_shape(order: Sequence[str], nodes: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes of one step's input; of an Input without any (NIRTorch writes such) those that the node behind it takes."""
    name = order[0]
    given = (nodes[name].input_type or {}).get("input")
    if given is None and len(order) > 1:
        given = (getattr(nodes[order[1]], "input_type", None) or {}).get("input")
    try:
        shape = tuple(operator.index(n) for n in np.asarray(given).reshape(-1).tolist())
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        raise NotInNir(
            f"node {quoted(name)} (Input) has the shape {quoted(given)}; the sizes of the layers follow from it, so give it"
            " whole numbers from 1"
        )
    return shape


_NO_COUNTERPART = {
    "LI": "a readout that does not spike has no population here. End the graph with spiking neurons",
    "CubaLI": "a readout that does not spike has no population here. End the graph with spiking neurons",
    "I": "a readout that does not spike has no population here. End the graph with spiking neurons",
    "Threshold": "a threshold without a reset is not what the chip's neurons do. Use LIF or IF",
    "Delay": "layers one behind the other have no use for it. Take it out, or write the graph with integers",
}


def _in_order(nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]]) -> list[str]:
    """Names of the nodes from the input to the output; NotInNir where there is no single way."""
    kinds = {name: type(node).__name__ for name, node in nodes.items()}
    ends = {word: [name for name, kind in kinds.items() if kind == word] for word in ("Input", "Output")}
    for word, names in ends.items():
        if len(names) != 1:
            raise NotInNir(f"the NIR graph has {len(names)} nodes of type {word} ({listed(names)}); one is needed")
    after: dict[str, list[str]] = {name: [] for name in kinds}
    before: dict[str, list[str]] = {name: [] for name in kinds}
    for source, target in edges:
        after[source].append(target)
        before[target].append(source)
    order = ends["Input"]
    while after[order[-1]]:
        name = order[-1]
        if len(after[name]) > 1 or len(before[after[name][0]]) > 1:
            raise NotInNir(_off_the_way(name, kinds[name], after))
        order = [*order, after[name][0]]
    if order[-1] != ends["Output"][0]:
        raise NotInNir(f"the way from the input ends at node {quoted(order[-1])} ({kinds[order[-1]]}), not at the output")
    if left := [name for name in kinds if name not in order]:
        raise NotInNir(f"node {quoted(left[0])} ({kinds[left[0]]}) is not on the way from the input to the output")
    return order


def _off_the_way(name: str, kind: str, after: Mapping[str, Sequence[str]]) -> str:
    """What is wrong at a node behind which there is no single way, a loop or a branch, and the remedy."""
    where = f"node {quoted(name)} ({kind})"
    takes = "from_nir takes layers one behind the other"
    if any(_returns(at, after) for at in (name, after[name][0])):
        return (
            f"{where} is at a loop; {takes}. Only a file with our integers (write_nir, `spikegate export`) keeps its "
            "loops, and read_nir, or `spikegate import` without --nodes, reads them"
        )
    return f"{where} is at a branch; {takes}. Write a file for each way from the input to the output"


def _returns(name: str, after: Mapping[str, Sequence[str]]) -> bool:
    """Whether a way leads from a node back to it."""
    reached, waiting = set[str](), list(after[name])
    while waiting:
        at = waiting.pop()
        if at not in reached:
            reached.add(at)
            waiting += after[at]
    return name in reached


def _values(node: Any, name: str, key: str) -> np.ndarray:
    value = np.asarray(getattr(node, key), dtype=np.float64)
    if not np.isfinite(value).all():
        raise NotInNir(f"node {quoted(name)} ({type(node).__name__}): {key} holds NaN or infinity")
    return value


def _neuron(
    name: str, node: Any, kind: str, weight_NF: Tensor, bias_N: Tensor, shape: tuple[int, ...], dt_s: float
) -> Stage:
    """Euler's rule of one step: gains into W and b."""
    where = f"node {quoted(name)} ({kind})"
    size = int(np.prod(shape))

    def each(key: str) -> np.ndarray:
        value = _values(node, name, key).reshape(-1)
        if value.size not in (1, size):
            raise NotInNir(f"{where}: {key} has {value.size} values, {size} neurons reach it")
        return np.broadcast_to(value, (size,))

    if np.any(each("v_reset") != 0):
        raise NotInNir(
            f"{where}: v_reset is {each('v_reset')[0]:g}; the chip's neurons restart at 0. Shift v so that it is 0"
        )
    if kind == "IF":
        r = each("r")
        if not (np.allclose(r, 1) or np.allclose(r, 1 / dt_s)):
            raise NotInNir(
                f"{where}: r is {r[0]:g}; tools write 1, or 1/dt = {1 / dt_s:g}, for weights that count per step."
                " Multiply the weights by it, or give the dt_s (`spikegate import --dt`) it was written for"
            )
        beta, gain, drive = np.ones(size), np.ones(size), np.zeros(size)
    else:
        tau = each("tau" if kind == "LIF" else "tau_mem")
        gain = each("r") * dt_s / _longer(tau, dt_s, f"{where}: tau")
        beta, drive = 1 - dt_s / tau, each("v_leak") * dt_s / tau
        if kind == "CubaLIF":
            synapse = _longer(each("tau_syn"), dt_s, f"{where}: tau_syn")
            if not np.allclose(synapse, dt_s):
                raise NotInNir(
                    f"{where}: its synaptic current keeps {1 - dt_s / synapse.max():.3g} from step to step, and the"
                    " conversion has neurons whose current forgets at once. Train with LIF, or tau_syn = dt"
                )
            gain = gain * each("w_in")
    factor = torch.from_numpy(np.array(gain))
    return Stage(
        name,
        weight_NF * factor[:, None],
        bias_N * factor + torch.from_numpy(np.array(drive)),
        torch.from_numpy(np.array(beta)),
        torch.from_numpy(np.array(each("v_threshold"))),
    )


def _longer(tau: np.ndarray, dt_s: float, what: str) -> np.ndarray:
    if np.any(tau < dt_s * (1 - 1e-9)):
        raise NotInNir(f"{what} is {tau.min():g} s, shorter than the step of {dt_s:g} s; give dt_s (--dt) as it was made")
    return tau


_LINEAR = ("Affine", "Linear", "Scale", "Conv1d", "Conv2d", "Flatten", "SumPool2d", "AvgPool2d")


def _multiplied(nodes: list[tuple[str, Any]], shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """W (N, F), b (N,) float64 and the shape behind linear nodes, by sending unit vectors and 0 through them."""
    x = torch.cat([torch.eye(size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)]).reshape(-1, *shape)
    for name, node in nodes:
        try:
            x = _through(name, node, x)
        except (RuntimeError, TypeError) as error:
            raise NotInNir(
                f"node {quoted(name)} ({type(node).__name__}) does not fit what reaches it, {tuple(x.shape[1:])}: {error}"
            ) from error
        if x.numel() > LARGEST_MATRIX:
            raise NotInNir(
                f"node {quoted(name)}: the layer as a matrix has {x.numel():,} weights; {LARGEST_MATRIX:,} are the limit"
            )
    flat = x.reshape(size + 1, -1)
    return (flat[:-1] - flat[-1]).T, flat[-1], tuple(x.shape[1:])


def _through(name: str, node: Any, x: Tensor) -> Tensor:
    kind = type(node).__name__

    def tensor(key: str) -> Tensor:
        return torch.from_numpy(_values(node, name, key))

    def pair(value: Any) -> tuple[int, int]:
        numbers = np.asarray(value).reshape(-1)
        return int(numbers[0]), int(numbers[-1])

    if kind == "Linear":
        return functional.linear(x, tensor("weight"))
    if kind == "Affine":
        return functional.linear(x, tensor("weight"), tensor("bias"))
    if kind == "Scale":
        return x * tensor("scale")
    if kind == "Flatten":
        start, end = int(node.start_dim), int(node.end_dim)
        return x.flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
    if kind in ("SumPool2d", "AvgPool2d"):
        kernel = pair(node.kernel_size)
        mean = functional.avg_pool2d(x, kernel, pair(node.stride), pair(node.padding))
        return mean * (kernel[0] * kernel[1]) if kind == "SumPool2d" else mean
    each = pair if kind == "Conv2d" else lambda value: pair(value)[0]
    convolve: Any = functional.conv2d if kind == "Conv2d" else functional.conv1d
    return convolve(
        x,
        tensor("weight"),
        tensor("bias"),
        padding=node.padding if isinstance(node.padding, str) else each(node.padding),
        stride=each(node.stride),
        dilation=each(node.dilation),
        groups=int(node.groups),
    )
