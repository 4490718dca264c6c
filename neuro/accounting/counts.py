"""A graph's work as `hardware.energy` takes it: one record per population, and what became of weights that are zero.

A record covers the synapses that end at a population and its neurons. Its dense equivalent multiplies every weight that a
dense evaluation of the same layer reads: all of a dense projection, those that are not zero of a sparse one, and the whole
kernel at every output position of a convolution, as torch counts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardware.energy.counts import Counts
from hardware.placement import LayerDemand, Placement
from hardware.text import quoted
from neuro.accounting.running import CountedRun
from neuro.conversion.mapped import SPARSE_ABOVE
from neuro.graph.demand import core_map, layer_demands
from neuro.graph.network import SpikingGraph
from neuro.graph.synapses import Projection
from neuro.simulators.activity import Activity, CoreCounts
from neuro.simulators.tally import Tally

ZEROS = ("auto", "stored")
"""What becomes of zero weights in a dense projection: "auto" drops them where they are more than a quarter of all, so that
a sparse list is worth its indices; "stored" keeps every one, as the file says."""


@dataclass(frozen=True)
class Zeros:
    """Zero weights of one projection that is dense or a convolution.

    Attributes:
        projection: name.
        zeros, weights: how many weights are zero, and how many there are.
        stored: whether the zeros are taken as stored; each then costs a synaptic operation per message.
        synops: synaptic operations on zeros, counted over all samples where stored and left out where not; None for a
            kernel, whose zeros are stored and counted too, but not one by one.
    """

    projection: str
    zeros: int
    weights: int
    stored: bool
    synops: int | None

    def sentence(self, samples: int) -> str:
        """What was assumed, in words; operations per sample."""
        head = f"projection {quoted(self.projection)}: {self.zeros:,} of {self.weights:,} weights are zero, "
        if self.synops is None:
            return f"{head}in the kernel, assumed stored"
        each = f"{self.synops / samples:,.4g} synaptic operations a sample"
        if self.stored:
            return f"{head}assumed stored: {each} are on zeros"
        return f"{head}assumed not stored (a sparse list): {each} are left out"


def dense_macs(projection: Projection) -> int:
    """Multiply-accumulates of one dense evaluation of a projection."""
    if projection.conv is not None:
        return projection.ends[0] * math.prod(projection.weight.shape[1:])
    return int(np.count_nonzero(projection.weight)) if projection.kind == "sparse" else projection.weight.size


def sparse_where_it_pays(graph: SpikingGraph, zeros: str = "auto") -> SpikingGraph:
    """The graph with dense projections that hold many zeros as sparse ones; the spikes are the same.

    Args:
        graph: any.
        zeros: one of `ZEROS`; "stored" returns the graph as it is.

    Raises:
        ValueError: another word.
    """
    if zeros not in ZEROS:
        raise ValueError(f"zeros is {quoted(zeros)}; known: {', '.join(ZEROS)}")
    if zeros == "stored":
        return graph
    changed = tuple(replace(p, kind="sparse") if _mostly_zero(p) else p for p in graph.projections)
    return replace(graph, projections=changed)


def _mostly_zero(projection: Projection) -> bool:
    if projection.kind != "dense":
        return False
    nonzero = int(np.count_nonzero(projection.weight))
    return 0 < nonzero < (1 - SPARSE_ABOVE) * projection.weight.size


def graph_counts(graph: SpikingGraph, activity: Activity) -> tuple[Counts, ...]:
    """What a run of a graph did, one record per population that computes; a sample is the "token" of the record.

    `events` are messages into the population: one that arrives through several projections of the same two ports counts
    once, as a chip sends it once. `dense_macs` are those of one dense evaluation per sample (see the module's text).

    Args:
        graph: the network.
        activity: a run of the same graph on the fixed-point simulator.

    Raises:
        ValueError: an activity without counts, or of another graph.
    """
    missing = [p.name for p in graph.projections if p.name not in activity.projections]
    missing += [p.name for p in graph.populations if p.name not in activity.populations]
    if missing:
        raise ValueError(
            f"the activity has no counts of {quoted(missing[0])} ({activity.ran_on}); run this graph with "
            "neuro.simulators.fixed_point.simulate, which counts"
        )
    found = []
    for population in graph.populations:
        if population.kind == "input":
            continue
        incoming = graph.incoming(population.name)
        work = activity.populations[population.name]
        traffic = [(p, activity.projections[p.name]) for p in incoming]
        graded = [(p, seen) for p, seen in traffic if p.num_message_bits]
        widest = max((seen.max_abs_payload.bit_length() + 1 for _, seen in graded), default=1)
        sent = {(p.source, p.source_port, p.port): seen.events for p, seen in traffic}
        found.append(
            Counts(
                layer=population.name,
                tokens=activity.batch,
                synops=sum(seen.synops for _, seen in traffic),
                events=sum(sent.values()),
                neuron_updates_active=work.updates_active,
                neuron_updates_inactive=work.updates_inactive,
                dense_macs=activity.batch * sum(dense_macs(p) for p in incoming),
                weight_bytes=sum(_stored_bytes(p) for p in incoming),
                graded=bool(graded),
                payload_bits=widest,
                time_steps=activity.steps,
            )
        )
    return tuple(found)


def _stored_bytes(projection: Projection) -> int:
    stored = int(np.count_nonzero(projection.weight)) if projection.kind == "sparse" else projection.weight.size
    return -(-stored * projection.num_weight_bits // 8)


def zero_weights(original: SpikingGraph, counted: SpikingGraph, run: CountedRun) -> tuple[Zeros, ...]:
    """What became of the zeros of each dense projection and each kernel that has some.

    Args:
        original: the graph as it was given. counted: the same after `sparse_where_it_pays`.
        run: of `counted`.
    """
    found = []
    for before, after in zip(original.projections, counted.projections, strict=True):
        zero = before.weight == 0
        if before.kind != "sparse" and zero.any():
            spent = (
                None
                if before.kind == "conv"
                else int(run.sent[before.source, before.source_port].numpy() @ zero.sum(axis=0))
            )
            zeros = int(np.count_nonzero(zero))
            found.append(Zeros(before.name, zeros, before.weight.size, after.kind != "sparse", spent))
    return tuple(found)


def counts_per_core(graph: SpikingGraph, run: CountedRun, placement: Placement) -> dict[int, CoreCounts] | None:
    """What each core of a placement did in a run; None where a layer is split by its
    inputs, since the simulator has no neurons for partial sums.
    """
    if any(layer.partial_sums for layer in placement.layers):
        return None
    where = {name: cores.astype(np.int64) for name, cores in core_map(graph, placement).items() if cores.min() >= 0}
    tally = Tally(graph, where)
    activity = run.activity
    for (name, port), each_N in run.sent.items():
        tally.sent(name, port, int(each_N.sum()), each_N)
    for population in graph.populations:
        if population.kind != "input":
            tally.updated(
                population.name, activity.batch * activity.steps, activity.populations[population.name].updates_active
            )
    return tally.finish()


def measured_demands(graph: SpikingGraph, run: CountedRun) -> tuple[LayerDemand, ...]:
    """Demands of a graph with the messages of each neuron that a run counted."""
    runs = run.activity.batch * run.activity.steps
    found = []
    for demand in layer_demands(graph, replace(run.activity, spikes={})):
        if all(p.source_port == "s_out" for p in graph.outgoing(demand.name)):
            rates = (run.sent[demand.name, "s_out"].double() / runs).tolist()
            demand = replace(demand, rate=tuple(rates), measured=True)
        found.append(demand)
    return tuple(found)


def every_step(counts: Sequence[Counts]) -> tuple[Counts, ...]:
    """The same counts beside a dense evaluation in every step, not once a sample: what a network needs whose inputs or
    states change from step to step."""
    return tuple(replace(item, dense_macs=item.dense_macs * item.time_steps) for item in counts)
