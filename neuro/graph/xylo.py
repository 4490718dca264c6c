"""SynSense's Xylo as a graph: its arithmetic, its form, and the lists of synapses that its makers' simulator takes.

A network of Xylo is input channels, one pool of hidden neurons (kind `xylo`, in as many populations as one likes) and
read-outs (kind `xylo_out`). Inputs feed hidden neurons; hidden neurons feed each other and the read-outs; a read-out
feeds nothing. All words are integers. One step, after the source of xylosim 0.1.3 (its version 2, which Rockpool 3.1
runs for XyloAudio 2 and XyloIMU; src/v2/cpp/XyloIAFNeuron.cpp and XyloLayer.cpp):

* every spike that arrives adds `w << shift` to its synapse's current, `i_syn` or (port `a_in2`) `i_syn2`. The 16-bit
  register saturates at each addition, so the order counts: input channels first, then hidden neurons by number, the
  spikes of one neuron one after another;
* both currents decay: `i -= i >> dash_syn`, rounding down, and by 1 where a positive value would lose nothing;
* `dv = -(v >> dash_mem)`, by the same rule, plus the currents, plus `bias`, saturating at 16 bits each time, and then
  `v_mem += dv` saturates too. Only where v_mem is -32,768 and dash_mem 0 does the negation wrap, as the simulator's does;
* while `v_mem >= vth` and the neuron has sent fewer than 31 spikes in this step (a read-out: 1), it sends one and loses
  vth. What is left stays: soft reset with several spikes a step;
* a neuron with an `alias` adds its spikes to those of that neuron, up to 31. An alias with a higher number counts them
  before its own and passes them on in the same step; one with a lower number has had its turn already.

Timing: on the chip the spikes of an input arrive in the step they are sent, and those of a neuron one step later. In a
graph every projection takes one step, so that all of ours runs one step behind and is otherwise the same.

A synapse's weight w, -128..127, is stored as 2 w, and the shift as `weight_exp` = shift - 1: the graph's mixed-sign 8-bit
weights are even. `synapses` makes such a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuro.graph.kinds import GraphError
from neuro.graph.network import Population, SpikingGraph
from neuro.graph.synapses import Projection
from neuro.graph.text import quoted
from neuro.graph.values import integer_array

STATE_LOW, STATE_HIGH = -(2**15), 2**15 - 1
MOST_SPIKES = {"input": 15, "xylo": 31, "xylo_out": 1}  # in a step
MESSAGE_BITS = {"input": 5, "xylo": 6}  # what holds them in a projection, sign included
SHIFTS = (0, 7)  # an 8-bit weight shifted further would leave the 16-bit word of a current
PARAMETERS = ("dash_mem", "dash_syn", "dash_syn2", "vth", "bias", "alias")


def synapses(
    name: str, source: Population, target: Population, weight: object, shift: int = 0, second: bool = False
) -> Projection:
    """A projection of Xylo from its own 8-bit weights.

    Args:
        source, target: populations of kind input, xylo or xylo_out.
        weight: integers -128..127, (n_target, n_source).
        shift: 0..7, one for all inputs, one for all recurrent synapses and one for all read-outs of a network.
        second: to the second synapse of the targets, with its own decay.

    Raises:
        GraphError: weights or a shift out of range, or a source that has no such projection.
    """
    array = integer_array(weight, f"projection {quoted(name)}: weight").astype(np.int64)
    if array.size and (array.min() < -128 or array.max() > 127):
        far = int(array.min() if array.min() < -128 else array.max())
        raise GraphError(
            f"projection {quoted(name)}: weight {far} is beyond Xylo's 8 bits, -128..127; scale the weights down"
        )
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise GraphError(f"projection {quoted(name)}: shift is {quoted(shift)}; {SHIFTS[0]}..{SHIFTS[1]} are possible")
    if source.kind not in MESSAGE_BITS:
        raise GraphError(f"projection {quoted(name)}: {quoted(source.name)} ({source.kind}) feeds nothing on Xylo")
    return Projection(
        name,
        source.name,
        target.name,
        "a_in2" if second else "a_in",
        2 * array,
        shift - 1,
        num_message_bits=MESSAGE_BITS[source.kind],
        kind="sparse",
    )


@dataclass(frozen=True, eq=False)
class XyloNetwork:
    """A graph as Xylo's three pools; neurons are numbered through the populations of a pool, in the graph's order.

    Attributes:
        inputs, hidden, readouts: (population, number of its first neuron).
        sizes: neurons of each pool.
        synapses: pool "in", "rec" or "out" -> int32 (n, 4): source, target, synapse (0 or 1), weight; by source.
        shifts: pool -> weight shift.
        parameters: "hidden" or "readout" -> parameter -> int32 (size,).
    """

    inputs: tuple[tuple[Population, int], ...]
    hidden: tuple[tuple[Population, int], ...]
    readouts: tuple[tuple[Population, int], ...]
    sizes: dict[str, int]
    synapses: dict[str, np.ndarray]
    shifts: dict[str, int]
    parameters: dict[str, dict[str, np.ndarray]]


def xylo_network(graph: SpikingGraph) -> XyloNetwork:
    """The pools of a graph.

    Raises:
        GraphError: a kind of another chip, a projection that Xylo has none of (convolution, delay, from a read-out, from
            an input to a read-out), a weight that is no 8-bit integer, messages too narrow, shifts that differ in a pool.
    """
    pools: dict[str, list[tuple[Population, int]]] = {"input": [], "xylo": [], "xylo_out": []}
    sizes = dict.fromkeys(pools, 0)
    first: dict[str, int] = {}
    for population in graph.populations:
        if population.kind not in pools:
            raise GraphError(
                f"population {quoted(population.name)} ({population.kind}) is no part of a Xylo network; it has the kinds"
                f" {', '.join(pools)}"
            )
        first[population.name] = sizes[population.kind]
        pools[population.kind].append((population, sizes[population.kind]))
        sizes[population.kind] += population.size
    found: dict[str, list[np.ndarray]] = {"in": [], "rec": [], "out": []}
    shifts: dict[str, tuple[int, str]] = {}
    for projection in graph.projections:
        pool, weight = checked_projection(graph, projection)
        shift = projection.weight_exp + 1
        known, name = shifts.setdefault(pool, (shift, projection.name))
        if known != shift:
            raise GraphError(
                f"projection {quoted(projection.name)}: its weight shift is {shift}, that of {quoted(name)} {known}; Xylo"
                f" has one shift for all {_POOLS[pool]}, so give both one weight_exp"
            )
        targets, sources = np.nonzero(weight)
        synapse = np.full(len(targets), int(projection.port == "a_in2"))
        columns = (
            sources + first[projection.source],
            targets + first[projection.target],
            synapse,
            weight[targets, sources],
        )
        found[pool].append(np.stack(columns, axis=1).astype(np.int32))
    lists = {}
    for pool, parts in found.items():
        rows = np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int32)
        lists[pool] = rows[np.argsort(rows[:, 0], kind="stable")]
    hidden = _parameters(pools["xylo"], PARAMETERS)
    return XyloNetwork(
        inputs=tuple(pools["input"]),
        hidden=tuple(pools["xylo"]),
        readouts=tuple(pools["xylo_out"]),
        sizes={"input": sizes["input"], "hidden": sizes["xylo"], "readout": sizes["xylo_out"]},
        synapses=lists,
        shifts={pool: shifts[pool][0] if pool in shifts else 0 for pool in found},
        parameters={"hidden": hidden, "readout": _parameters(pools["xylo_out"], ("dash_mem", "dash_syn", "vth", "bias"))},
    )


_POOLS = {"in": "input synapses", "rec": "recurrent synapses", "out": "synapses of read-outs"}


def checked_projection(graph: SpikingGraph, projection: Projection) -> tuple[str, np.ndarray]:
    """The pool of a projection, "in", "rec" or "out", and its own 8-bit weights (n_target, n_source).

    Raises GraphError where Xylo has no such projection.
    """
    where = f"projection {quoted(projection.name)}"
    source, target = graph.population(projection.source), graph.population(projection.target)
    pool = {("input", "xylo"): "in", ("xylo", "xylo"): "rec", ("xylo", "xylo_out"): "out"}.get((source.kind, target.kind))
    if pool is None:
        raise GraphError(
            f"{where}: from {quoted(source.name)} ({source.kind}) to {quoted(target.name)} ({target.kind}); on Xylo inputs"
            " feed hidden neurons, and these each other and the read-outs. Put a hidden population in between"
        )
    if projection.kind not in ("dense", "sparse"):
        reason = "it has no synaptic delays" if projection.kind == "delay_dense" else "it stores every synapse of its own"
        raise GraphError(f"{where} ({projection.kind}): Xylo has none; {reason}. Write it as kind sparse")
    low, high = projection.payload_range
    most = MOST_SPIKES[source.kind]
    if high < most and not (source.kind == "input" and projection.num_message_bits == 0):
        bits = MESSAGE_BITS[source.kind]
        raise GraphError(
            f"{where}: {projection.num_message_bits} message bits carry {low}..{high}, and {quoted(source.name)} sends up"
            f" to {most} spikes a step; num_message_bits = {bits} holds them"
        )
    if not SHIFTS[0] <= projection.weight_exp + 1 <= SHIFTS[1]:
        raise GraphError(
            f"{where}: weight_exp is {projection.weight_exp}; on Xylo it is the weight shift"
            f" {SHIFTS[0]}..{SHIFTS[1]} minus 1"
        )
    odd, whole = projection.weight % 2 != 0, projection.weight // 2
    bad = odd | (whole < -128) | (whole > 127)
    if bad.any():
        raise GraphError(
            f"{where}: weight {int(projection.weight[bad][0])} is not twice an integer of -128..127, as Xylo's"
            " 8-bit weights are stored; neuro.graph.xylo.synapses makes a projection from the weights themselves"
        )
    return pool, whole.astype(np.int64)


def _parameters(pool: list[tuple[Population, int]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        parts = [np.broadcast_to(np.asarray(p.params[name], dtype=np.int32), (p.size,)) for p, _ in pool]
        if name == "alias":
            parts = [np.where(part < 0, -1, part + start) for part, (_, start) in zip(parts, pool, strict=True)]
        found[name] = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, dtype=np.int32)
    return found
