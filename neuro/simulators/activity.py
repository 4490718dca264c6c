"""What a simulator returns: messages and states of every step, counts, where it ran; and how two results compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hardware.text import quoted
from neuro.graph import PORTS, GraphError, Population, SpikingGraph
from neuro.graph.kinds import KINDS

# What `record` may name. "a_in" stands for every port of a population; "spikes2" is what leaves by a second port.
VARIABLES = (
    "spikes",
    "spikes2",
    "u",
    "v",
    "real",
    "imag",
    "sigma",
    "act",
    "residue",
    "error",
    "i_syn",
    "i_syn2",
    "v_mem",
    "a_in",
)
RECORD_ALL = VARIABLES


@dataclass(frozen=True)
class ProjectionCounts:
    """Traffic of one projection over all samples and the steps counted.

    Attributes:
        events: messages other than 0 that the source sent into these synapses.
        synops: events x synapses of their source. All targets of a dense projection: its synapse lists store the zeros
            too; of a sparse one the weights that are not 0; of a conv those whose target exists.
        weight_reads: weights fetched for these events: a stored list is read whole, a kernel also at a border.
        payload_overflows: messages wider than `num_message_bits`. Lava delivers them in full, a chip could not.
        max_abs_payload: largest magnitude sent; for a binary projection the magnitude before it was read as 0 or 1.
    """

    events: int
    synops: int
    payload_overflows: int
    max_abs_payload: int
    weight_reads: int = 0


@dataclass(frozen=True)
class PopulationCounts:
    """Work and range of one population over all samples and the steps counted. An input population computes nothing.

    Attributes:
        updates_active, updates_inactive: neuron updates that sent a message, and that sent none.
        saturations_v: times v was clipped at +-(2^23 - 1) (lif kinds), a part of an rf kind's state was, or a state
            at 16 bits (xylo kinds).
        wraps_u: times u left 24 bits and was wrapped (lif kinds).
        wide_a: sums beyond 16 bits, sign included, that reached a lif kind. Lava writes that width beside its port and
            passes them on; mode "chip" wraps them.
        wraps_sum: times a synaptic sum or a product ran over 32 bits and wrapped, as numpy's int32 does under Lava.
        wide_v: values that a 24-bit register could not hold (all other kinds). Lava passes them on unharmed; mode "chip"
            wraps them.
        max_abs_payload, max_abs_u, max_abs_v: largest magnitudes of messages, u, and v before its reset. For graded
            populations v is the sum that arrived, for a product the product after its shift, for an rf kind its imag.
    """

    updates_active: int = 0
    updates_inactive: int = 0
    saturations_v: int = 0
    wraps_u: int = 0
    wraps_sum: int = 0
    wide_a: int = 0
    wide_v: int = 0
    max_abs_payload: int = 0
    max_abs_u: int = 0
    max_abs_v: int = 0


@dataclass(frozen=True)
class CoreCounts:
    """Work of one core over all samples and the steps counted, given a placement.

    Attributes:
        spikes: messages other than 0 that neurons of this core sent.
        synops, weight_reads: done for targets on this core. A convolution's reads are counted as its synops here.
        neuron_updates: neurons on this core x steps x samples; input populations compute nothing.
    """

    spikes: int = 0
    synops: int = 0
    weight_reads: int = 0
    neuron_updates: int = 0


class Messages(Mapping[str, Tensor]):
    """Population -> int32 (batch, steps, size). What was kept as int8 becomes int32 when it is first asked for."""

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        self._kept = dict(kept)

    def __getitem__(self, name: str) -> Tensor:
        value = self._kept[name]
        if value.dtype != torch.int32:
            self._kept[name] = value = value.to(torch.int32)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return repr({name: self[name] for name in self})


@dataclass(frozen=True)
class Activity:
    """Result of running a graph.

    Attributes:
        spikes: population -> int32 (batch, steps, size), the messages sent at each step. Always holds the outputs.
            Where our simulator kept bytes they become int32 when they are first read.
        states: population -> variable -> int32 (batch, steps, size), after the step: the states that `KINDS` lists (v of
            a lif kind after its reset), what arrived at each port ("a_in", or "a_in1" and "a_in2"), and "spikes2".
        batch, steps: extent of the run.
        ran_on: "simulated (ours, lava)", "simulated (ours, chip)", "simulated (ours, xylo)", "Lava CPU", "xylosim" or a
            board's name.
        projections, populations: counts by name; empty when the backend does not count.
        cores: counts by core number, where a placement was given.
        models: population -> the model used, where its kind has several: "sigma_delta (residue)".
        notes: what the mode does differently from what the graph says, one sentence each.
        mode: "lava", "chip" or "xylo"; "" for a board.
    """

    spikes: Mapping[str, Tensor]
    states: Mapping[str, Mapping[str, Tensor]]
    batch: int
    steps: int
    ran_on: str
    projections: Mapping[str, ProjectionCounts] = field(default_factory=dict)
    populations: Mapping[str, PopulationCounts] = field(default_factory=dict)
    cores: Mapping[int, CoreCounts] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mode: str = "lava"

    def variables(self) -> dict[tuple[str, str], Tensor]:
        """All recorded arrays under (population, variable); messages are called "spikes"."""
        found = {(name, "spikes"): value for name, value in self.spikes.items()}
        for name, states in self.states.items():
            found.update({(name, variable): value for variable, value in states.items()})
        return found


def state_names(population: Population) -> tuple[str, ...]:
    """What a population of this kind can record besides its messages: states, ports, and what leaves by a second port."""
    kind = KINDS[population.kind]
    return kind.states + PORTS[population.kind] + (("spikes2",) if len(kind.outs) > 1 else ())


def recorded(graph: SpikingGraph, record: Iterable[str]) -> dict[str, set[str]]:
    """Resolve `record` to population -> variables ("spikes" and `state_names`).

    Args:
        graph: the graph to be run.
        record: names from `VARIABLES` for all populations that have them, or "POPULATION.VARIABLE" for one.

    Raises:
        GraphError: an entry that names nothing. A single string is refused, being a common slip for a tuple of one.
    """
    if isinstance(record, str):
        raise GraphError(f"record is the string {quoted(record)}; give a tuple of names, such as ({quoted(record)},)")
    entries = set(record)
    known = set(VARIABLES)
    chosen: dict[str, set[str]] = {}
    for population in graph.populations:
        chosen[population.name] = {"spikes"} if population.name in graph.outputs else set()
        for variable in ("spikes", *state_names(population)):
            general = "a_in" if variable in PORTS[population.kind] else variable
            single = {f"{population.name}.{variable}", f"{population.name}.{general}"}
            known |= single
            if entries & (single | {general}):
                chosen[population.name].add(variable)
    unknown = sorted(entries - known)
    if unknown:
        raise GraphError(f"record names {quoted(unknown[0])}; known are {', '.join(VARIABLES)} and POPULATION.VARIABLE")
    return chosen


@dataclass(frozen=True)
class Divergence:
    """The first value in which two results differ, in order of step, sample, then population and variable."""

    population: str
    variable: str
    sample: int
    step: int
    neuron: int
    expected: int
    got: int

    def __str__(self) -> str:
        return (
            f"population {quoted(self.population)}, {self.variable}, sample {self.sample}, step {self.step},"
            f" neuron {self.neuron}: expected {self.expected}, got {self.got}"
        )


@dataclass(frozen=True)
class Comparison:
    """Outcome of `compare`.

    Attributes:
        values: numbers compared.
        mismatches: how many of them differ.
        first: where they first differ, or None.
        skipped: "POPULATION.VARIABLE" recorded by only one of the two.
    """

    values: int
    mismatches: int
    first: Divergence | None
    skipped: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        if self.first is None:
            return f"equal over {self.values} values"
        return f"{self.mismatches} of {self.values} values differ; first: {self.first}"


def compare(expected: Activity, got: Activity) -> Comparison:
    """Compare everything that both results recorded, value by value.

    Raises:
        ValueError: shapes differ, or the two have no recorded variable in common.
    """
    left, right = expected.variables(), got.variables()
    common = [key for key in left if key in right]
    if not common:
        raise ValueError("the two results recorded no variable in common; record the same ones in both")
    values = mismatches = 0
    earliest: tuple[int, int] | None = None
    first: Divergence | None = None
    for name, variable in common:
        a, b = left[name, variable].cpu(), right[name, variable].cpu()
        if a.shape != b.shape:
            raise ValueError(f"population {quoted(name)}, {variable}: shapes differ, {tuple(a.shape)} and {tuple(b.shape)}")
        values += a.numel()
        unequal = torch.nonzero((a != b).transpose(0, 1))  # (step, sample, neuron), in that order
        mismatches += len(unequal)
        if len(unequal):
            step, sample, neuron = (int(i) for i in unequal[0])
            if earliest is None or (step, sample) < earliest:
                earliest = (step, sample)
                place = (sample, step, neuron)
                first = Divergence(name, variable, sample, step, neuron, int(a[place]), int(b[place]))
    skipped = tuple(sorted(f"{name}.{variable}" for name, variable in set(left) ^ set(right)))
    return Comparison(values, mismatches, first, skipped)
