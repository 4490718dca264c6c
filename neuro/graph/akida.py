"""A graph of graded messages as a network of BrainChip's Akida 2.0: its layers, their integers, and what has no place.

Akida takes one input, 8-bit, and layers one behind another. What a layer computes, as the makers document it
(doc.brainchipinc.com, API reference, Akida V2 layers, read 2026-11-30):

    sum = product or convolution of 8-bit messages and 8-bit (or 4-bit) weights, + (bias << bias_shift)
    message = ReLU(sum) * output_scale, shifted by output_shift, saturated to output_bits

with a bias of 8 bits and a sum of 28. There are no time steps: an inference is one sample. A graph of graded kinds has one
sample a step, so that a population `depth` steps behind the input sends the messages of step t - depth.

What becomes of a graph:

* a projection with all populations that only pass on, rectify or shift its sum (graded, graded_relu, and product times a
  constant 1) is one layer; `weight_exp` and `exp` become its shift. Weights of mixed sign are even in a graph; the factors
  of two that all have in common go into the shift too. Shifts floor in a graph, which adds half a step as a constant where
  it rounds, and add that half by themselves in Akida: the bias takes the difference, so that the integers are the same.
* constants (biases, halves of a step) become the bias, where 8 bits and a shift hold it: `GradedConfig(bias_bits=8)`.
* a kernel is written into the smallest of 1, 3, 5 or 7 squared that holds its taps; groups are written out with zeros.
* the last layer is read as whole sums, as networks on Akida usually end; the reader adds its constants, shifts, rectifies.

Anything else is refused by name: branches and residual adds, products of two messages, states, delays, loops, event
thresholds. Whether messages fit 8 bits depends on the input and is checked with it (`neuro/simulators/akida/`).

Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from neuro.graph.akida_kernels import kernel_layer
from neuro.graph.kinds import GraphError
from neuro.graph.network import Population, SpikingGraph
from neuro.graph.synapses import Projection
from neuro.graph.text import listed, quoted

KINDS = ("input", "graded", "graded_relu", "product")
MESSAGE_LOW, MESSAGE_HIGH = -128, 127
FOUR_BITS_HIGH = 15  # 4-bit messages have no sign
SUM_LIMIT = 2**27  # of a 28-bit sum
LINES, ONES, BIAS = "lines", "ones", "bias0"  # names that the graded route gives to its inputs of constants


@dataclass(frozen=True, eq=False)
class AkidaLayer:
    """One layer.

    Attributes:
        name: the population whose messages it sends. depth: steps from the input to that population.
        kind: "dense", "conv" or "depthwise".
        weight: int8, (inputs, units), (K, K, inputs, filters) or (K, K, channels, 1), the kernel flipped as a graph's is.
        weight_bits: 8 or 4.
        stride, padding: of a convolution; padding "valid", "same" (the odd one behind) or "same_upper" (before).
        shape: (width, height, channels) of its messages.
        relu: whether it rectifies.
        last: whether it is read as whole sums.
        shift: right shift of the sum in Akida, negative: left. 0 of the last layer.
        bias, bias_shift: int8 and uint8 (channels,). 0 of the last layer.
        low, high: what its messages may be.
        read_factor, read_constant, read_shift: the last layer's message is (factor sum + constant) >> shift, rectified
            where `relu`; the constant is int64 (neurons,).
    """

    name: str
    depth: int
    kind: str
    weight: np.ndarray
    weight_bits: int
    stride: int
    padding: str
    shape: tuple[int, int, int]
    relu: bool
    last: bool
    shift: int
    bias: np.ndarray
    bias_shift: np.ndarray
    low: int
    high: int
    read_factor: int
    read_constant: np.ndarray
    read_shift: int


@dataclass(frozen=True, eq=False)
class AkidaNetwork:
    """A graph as layers.

    Attributes:
        input: the input population. shape: (width, height, channels) of a sample.
        lines: payloads of its last neurons, which are constants.
        constants: other input populations -> their payloads, int64 (size,).
        layers: in order.
        warm_up: steps until every constant has arrived everywhere.
    """

    input: str
    shape: tuple[int, int, int]
    lines: np.ndarray
    constants: Mapping[str, np.ndarray]
    layers: tuple[AkidaLayer, ...]
    warm_up: int


@dataclass
class _Sum:
    """What a population sends, from the projection that it began with: (weights x messages + constant) >> shift."""

    projection: Projection
    weight: np.ndarray
    shift: int
    constant: np.ndarray
    relu: bool


def akida_network(graph: SpikingGraph) -> AkidaNetwork:
    """The layers of a graph.

    Raises:
        GraphError: what Akida has no place for, by name, with the limit and the remedy.
    """
    for population in graph.populations:
        if population.kind not in KINDS:
            raise GraphError(
                f"population {quoted(population.name)} ({population.kind}) is no part of an Akida network, whose layers"
                f" keep no state and fire no spikes; it has the kinds {', '.join(KINDS)}, as the graded route makes them"
            )
        if np.any(np.asarray(population.params.get("vth", 0))):
            raise GraphError(
                f"population {quoted(population.name)}: vth is not 0; Akida has no event thresholds. Convert with"
                " drop_hidden=0 and without EventThreshold modules"
            )
    main, lines, constants = _inputs(graph)
    settled, arrival = _settled(graph, main, constants)
    way = _way(graph, main, settled)
    inputs = graph.population(main).size - len(lines)
    return _layers(graph, main, inputs, lines, constants, settled, way, max(arrival.values(), default=0))


def _inputs(graph: SpikingGraph) -> tuple[str, np.ndarray, dict[str, np.ndarray]]:
    """The input of samples, the payloads of its constant neurons, and the inputs of constants with theirs."""
    payloads = {name: [int(p) for p in graph.meta.get(name, ())] for name in ("constant_lines", "bias_lines")}
    constants: dict[str, np.ndarray] = {}
    for payload in payloads["constant_lines"]:
        if f"{LINES}{payload}" in graph.inputs:
            constants[f"{LINES}{payload}"] = np.array([payload], dtype=np.int64)
    if BIAS in graph.inputs and payloads["bias_lines"]:
        constants[BIAS] = np.array(payloads["bias_lines"], dtype=np.int64)
    if ONES in graph.inputs and graph.meta.get("narrow") == "neuron":
        constants[ONES] = np.ones(1, dtype=np.int64)
    for name, values in constants.items():
        if graph.population(name).size != len(values):
            raise GraphError(
                f"input {quoted(name)} has {graph.population(name).size} neurons, and the graph's meta names {len(values)}"
                " constants for it; convert the network again"
            )
    mains = [name for name in graph.inputs if name not in constants]
    if len(mains) != 1:
        raise GraphError(
            f"the graph has {len(mains)} inputs of samples ({listed(mains)}); a network of Akida has one. Constants are"
            " known by the meta that the graded route writes"
        )
    whole = payloads["constant_lines"] if not any(name.startswith(LINES) for name in constants) else []
    if len(whole) >= graph.population(mains[0]).size:
        raise GraphError(f"input {quoted(mains[0])} holds constants only; an Akida network needs an input of samples")
    return mains[0], np.array(whole, dtype=np.int64), constants


def _settled(
    graph: SpikingGraph, main: str, constants: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """What populations that only constants reach send for ever, and after how many steps they do."""
    settled = dict(constants)
    arrival = dict.fromkeys(settled, 0)
    changed = True
    while changed:
        changed = False
        for population in graph.populations:
            incoming = graph.incoming(population.name)
            if population.name in settled or population.name == main or not incoming:
                continue
            if not all(p.source in settled for p in incoming):
                continue
            settled[population.name] = _message(population, incoming, settled)
            arrival[population.name] = max(arrival[p.source] + 1 + p.max_delay for p in incoming)
            changed = True
    for p in graph.projections:  # at what samples reach
        if p.source in settled and p.target not in settled:
            arrival[f"{p.name} -> {p.target}"] = arrival[p.source] + 1 + p.max_delay
    return settled, arrival


def _message(population: Population, incoming: tuple[Projection, ...], settled: Mapping[str, np.ndarray]) -> np.ndarray:
    sums: dict[str, np.ndarray] = {}
    for p in incoming:
        sums[p.port] = sums.get(p.port, 0) + _arriving(p, settled[p.source])
    if population.kind == "product":
        return (sums["a_in1"] * sums["a_in2"]) >> int(population.params["exp"])
    return np.maximum(sums["a_in"], 0) if population.kind == "graded_relu" else sums["a_in"]


def _arriving(p: Projection, message: np.ndarray) -> np.ndarray:
    """The constant that a projection adds, int64 (n_target,)."""
    if p.conv is None:
        total = p.weight.astype(np.int64) @ message
        return total << p.weight_exp if p.weight_exp >= 0 else total >> -p.weight_exp
    patches = p.conv.patches(p.weight.shape)  # (positions, groups, taps)
    values = np.where(patches >= 0, message[np.maximum(patches, 0)], 0)
    groups = p.conv.groups
    kernel = p.weight.astype(np.int64).reshape(groups, len(p.weight) // groups, -1)
    return np.einsum("pgt,got->pgo", values, kernel).reshape(-1)


def _way(graph: SpikingGraph, main: str, settled: Mapping[str, np.ndarray]) -> list[tuple[Projection, Population]]:
    """From the input to the output: each projection that carries samples, and the population behind it."""
    way: list[tuple[Projection, Population]] = []
    name, seen = main, {main}
    while outgoing := graph.outgoing(name):
        targets = [p.target for p in outgoing]
        if len(outgoing) > 1:
            squared = len(set(targets)) == 1 and graph.population(targets[0]).kind == "product"
            raise GraphError(
                f"population {quoted(targets[0])} multiplies two messages; Akida has no such layer. Use ReLU in place of"
                " its square"
                if squared
                else f"population {quoted(name)} feeds {listed(targets)}; layers on Akida stand one behind another here, so"
                " branches and residual adds stay out. Convert the branches apart"
            )
        (p,) = outgoing
        target = graph.population(p.target)
        others = [o for o in graph.incoming(target.name) if o.name != p.name and o.source not in settled]
        if others and others[0].source in _behind(graph, target.name):
            raise GraphError(f"projection {quoted(others[0].name)} closes a loop; Akida runs from input to output once")
        if others:
            raise GraphError(
                f"population {quoted(target.name)} adds {quoted(p.source)} and {quoted(others[0].source)}; layers on Akida"
                " stand one behind another here, so residual adds stay out. Convert the branches apart"
            )
        if p.kind == "delay_dense":
            raise GraphError(f"projection {quoted(p.name)} (delay_dense): Akida has no synaptic delays; use kind dense")
        way.append((p, target))
        seen.add(target.name)
        name = target.name
    unreached = [p.name for p in graph.populations if p.name not in seen and p.name not in settled]
    if unreached:
        raise GraphError(f"population {quoted(unreached[0])} is not on the way from {quoted(main)} to {quoted(name)}")
    if graph.outputs != (name,):
        raise GraphError(
            f"the outputs are {listed(graph.outputs)}; of a network of Akida the last population is read, {quoted(name)}"
        )
    if not way:
        raise GraphError(f"nothing is behind input {quoted(main)}; an Akida network needs a layer")
    return way


def _behind(graph: SpikingGraph, name: str) -> set[str]:
    """A population and all that its messages reach."""
    found, fresh = {name}, [name]
    while fresh:
        fresh = [p.target for source in fresh for p in graph.outgoing(source) if p.target not in found]
        found.update(fresh)
    return found


def _layers(
    graph: SpikingGraph,
    main: str,
    inputs: int,
    lines: np.ndarray,
    constants: Mapping[str, np.ndarray],
    settled: Mapping[str, np.ndarray],
    way: list[tuple[Projection, Population]],
    warm_up: int,
) -> AkidaNetwork:
    found: list[tuple[_Sum, Population, int]] = []
    for step, (p, population) in enumerate(way):
        merged = bool(found) and _passes(p)
        if merged:
            sums = found.pop()[0]
        else:
            weight = p.weight.astype(np.int64)
            constant = np.zeros(population.size, dtype=np.int64)
            if step == 0 and len(lines):
                if p.conv is not None:
                    raise GraphError(
                        f"projection {quoted(p.name)} (conv) reads constant neurons of {quoted(main)}; give them an input"
                        " population of their own"
                    )
                weight, constant = weight[:, :inputs], weight[:, inputs:] @ lines
            exponent = 0 if p.conv is not None else p.weight_exp
            sums = _Sum(p, weight << max(exponent, 0), max(-exponent, 0), constant << max(exponent, 0), relu=False)
        port = p.port
        for o in graph.incoming(population.name, port):
            if o.name != p.name:
                _add(sums, _arriving(o, settled[o.source]), population)
        if population.kind == "product":
            _shift(graph, sums, population, port, settled)
        sums.relu = sums.relu or population.kind == "graded_relu"
        found.append((sums, population, step + 1))
    layers: list[AkidaLayer] = []
    shape = _first_shape(found[0][0], inputs)
    first = shape
    for number, (sums, population, depth) in enumerate(found):
        last = number == len(found) - 1
        layers.append(_layer(sums, population, depth, shape, last))
        shape = layers[-1].shape
    return AkidaNetwork(main, first, lines, constants, tuple(layers), warm_up)


def _passes(p: Projection) -> bool:
    """Whether a projection hands each message to a neuron of its own, as it is."""
    if p.conv is not None:
        return p.weight.shape[1:] == (1, 1, 1) and bool((p.weight == 1).all()) and p.ends[0] == p.ends[1]
    scaled = p.ends[0] == p.ends[1] and -30 < p.weight_exp <= 0
    return scaled and bool((p.weight == (np.eye(p.ends[0], dtype=np.int64) << -p.weight_exp)).all())


def _add(sums: _Sum, constant: np.ndarray, population: Population) -> None:
    if not constant.any():
        return
    if sums.relu:
        raise GraphError(
            f"population {quoted(population.name)} adds a constant to what is rectified already; a layer of Akida rectifies"
            " last. Average pooling behind a ReLU does so: use a convolution with a stride in its place"
        )
    sums.constant = sums.constant + (constant << sums.shift)


def _shift(graph: SpikingGraph, sums: _Sum, population: Population, port: str, settled: Mapping[str, np.ndarray]) -> None:
    other = "a_in2" if port == "a_in1" else "a_in1"
    factor: np.ndarray | int = 0
    for o in graph.incoming(population.name, other):
        factor = factor + _arriving(o, settled[o.source])
    if np.any(np.asarray(factor) != 1):
        raise GraphError(
            f"population {quoted(population.name)} multiplies by {int(np.asarray(factor).reshape(-1)[0])}; of products"
            " Akida has only those by 1 that shift. Put the factor into the weights"
        )
    sums.shift += int(population.params["exp"])


def _first_shape(sums: _Sum, inputs: int) -> tuple[int, int, int]:
    return (1, 1, inputs) if sums.projection.conv is None else sums.projection.conv.input_shape


def _layer(sums: _Sum, population: Population, depth: int, given: tuple[int, int, int], last: bool) -> AkidaLayer:
    p = sums.projection
    common = _common_factors(sums.weight)
    whole = sums.weight >> common
    bits = 4 if p.num_weight_bits <= 4 and whole.min() >= -8 and whole.max() <= 7 else 8
    if whole.min() < MESSAGE_LOW or whole.max() > MESSAGE_HIGH:
        far = int(whole.flat[np.abs(whole).argmax()])
        raise GraphError(
            f"projection {quoted(p.name)}: weight {far << common} is {far} after the factor that all weights share;"
            f" Akida's weights have 8 bits, {MESSAGE_LOW}..{MESSAGE_HIGH}. Convert with weight_bits=8 or fewer"
        )
    kind, weight, stride, padding, shape = kernel_layer(p, whole, given)
    channels = shape[2] if kind != "dense" else weight.shape[1]
    _check_sum(p, weight, kind, sums, common)
    nothing = np.zeros(channels, dtype=np.int64)
    if last:
        shift, bias, bias_shift = 0, nothing, nothing
    else:
        shift = sums.shift - common
        bias, bias_shift = _bias(sums, population, shift, common, channels)
    low = 0 if sums.relu or bits == 4 else MESSAGE_LOW
    return AkidaLayer(
        name=population.name,
        depth=depth,
        kind=kind,
        weight=weight.astype(np.int8),
        weight_bits=bits,
        stride=stride,
        padding=padding,
        shape=shape,
        relu=sums.relu,
        last=last,
        shift=shift,
        bias=bias.astype(np.int8),
        bias_shift=bias_shift.astype(np.uint8),
        low=low,
        high=FOUR_BITS_HIGH if bits == 4 else MESSAGE_HIGH,
        read_factor=1 << common if last else 1,
        read_constant=sums.constant if last else nothing,
        read_shift=sums.shift if last else 0,
    )


def _common_factors(weight: np.ndarray) -> int:
    """How many factors of two all weights share; 0 where all are 0."""
    every = int(np.bitwise_or.reduce(np.abs(weight), axis=None))
    return (every & -every).bit_length() - 1 if every else 0


def _check_sum(p: Projection, weight: np.ndarray, kind: str, sums: _Sum, common: int) -> None:
    axes = (0,) if kind == "dense" else (0, 1) if kind == "depthwise" else (0, 1, 2)
    reach = 128 * int(np.abs(weight).sum(axis=axes).max()) + int(np.abs(sums.constant >> common).max(initial=0))
    if reach >= SUM_LIMIT:
        raise GraphError(
            f"projection {quoted(p.name)}: its sum can reach {reach:,}; Akida's sums have 28 bits, up to {SUM_LIMIT - 1:,}."
            " Split the layer along its inputs"
        )


def _bias(sums: _Sum, population: Population, shift: int, common: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mantissas and shifts of the bias, so that Akida's rounding shift gives the graph's floors."""
    per_channel = sums.constant.reshape(-1, channels)
    if (per_channel != per_channel[0]).any():
        raise GraphError(
            f"population {quoted(population.name)}: the constants of one channel differ from place to place; Akida has one"
            " bias for a channel"
        )
    constant = per_channel[0]
    if shift >= 0:
        value = (constant >> common) - ((1 << shift) >> 1)
    else:
        value = (constant >> sums.shift) >> -shift
        if ((value << -shift) != constant >> sums.shift).any():
            raise GraphError(
                f"population {quoted(population.name)}: its constants are finer than its sum, which is shifted left by"
                f" {-shift}; Akida adds the bias before the shift"
            )
    mantissa, power = value.copy(), np.zeros_like(value)
    for _ in range(28):
        wide = (mantissa < MESSAGE_LOW) | (mantissa > MESSAGE_HIGH)
        odd = wide & (mantissa % 2 != 0)
        if odd.any():
            first = int(np.flatnonzero(odd)[0])
            raise GraphError(
                f"population {quoted(population.name)}: channel {first} needs a bias of {int(value[first]):,}, and Akida's"
                " has 8 bits and a shift. Convert with GradedConfig(bias_bits=8), which rounds biases to that"
            )
        mantissa, power = np.where(wide, mantissa >> 1, mantissa), power + wide
    return mantissa, power
