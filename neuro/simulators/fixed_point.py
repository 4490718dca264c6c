"""Our integer simulator: batched, on CPU or CUDA, in one of two modes that every result names.

`mode="lava"` equals Lava 0.10's models tagged `fixed_pt` bit for bit. `mode="chip"` has the register widths and
roundings of the silicon as published emulators give them (nengo-loihi, brian2_loihi; see `neuro/simulators/neurons.py`):
weight exponents act on each synapse and round down, a lif kind receives 16 bits, u wraps at 24, other registers wrap at
24, messages at their width, and there is a refractory period. Of silicon, both were compared with one published trace:
1,000 steps of a lif without wraps and shifts on a Loihi 2 board, equal but for a marker of its probe
(tests/neuro/simulators/test_silicon.py). `mode="xylo"` is another chip: the integers of SynSense's Xylo for
graphs of its kinds (`neuro/graph/xylo.py`), equal to its makers' simulator.

Populations that lie on no loop are evaluated layer by layer, over all samples and steps of a chunk: an exact product, then
one elementwise update (stateless kinds) or a scan over time. Only populations on a loop go step by step. On the CPU the lif
kinds, loops of them included, go through `neuro.simulators.compiled` with their synapses, in blocks that stay in the cache.
Memory is bounded by chunks over time; what is recorded is kept in full.

A message sent at step t arrives at step t + 1, or t + 1 + delay. Layout inside: (T, B, N) = steps, samples, neurons. At
the door: (batch, steps, size).

Counting (`Activity`): an event is a message other than 0 leaving a source, once per projection it feeds. Messages wider
than a projection's `num_message_bits` are refused in the input and counted inside the graph (`strict=True` raises): Lava
sends them on.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from hardware.text import quoted
from neuro.graph import PORTS, GraphError, Population, Projection, SpikingGraph
from neuro.graph.kinds import BINARY_KINDS, KINDS, LIF_KINDS, STATELESS, XYLO_KINDS
from neuro.graph.xylo import xylo_network
from neuro.simulators.activity import Activity, recorded
from neuro.simulators.compiled.calls import spread, use_compiled
from neuro.simulators.compiled.program import Program
from neuro.simulators.exact import Arrived, Synapses, add, join_arrived, magnitude, narrow
from neuro.simulators.inputs import InputError, Integers, bounded_run, checked_inputs
from neuro.simulators.ledger import CHIP_NOTE, FixedPointOverflow, Ledger, Run
from neuro.simulators.lines import Line
from neuro.simulators.neurons import Block, Lif, Other, join
from neuro.simulators.scan import STATS
from neuro.simulators.schedule import PipelineError, components, depths, latency
from neuro.simulators.tally import Placement, Tally, checked_placement
from neuro.simulators.xylo.neurons import Xylo

__all__ = [
    "CHIP_NOTE",
    "FixedPointOverflow",
    "InputError",
    "PipelineError",
    "checked_inputs",
    "latency",
    "run_pipelined",
    "simulate",
]

FAMILIES = {"lava": "loihi", "chip": "loihi", "xylo": "xylo"}
MODES = tuple(FAMILIES)
Fused = bool | Literal["torch"] | None
CHUNK_VALUES = 2**23  # messages of all populations together held at a time, unless a single step has more


def simulate(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    mode: str = "lava",
    strict: bool = False,
    record: Iterable[str] = ("spikes",),
    device: torch.device | str | None = None,
    placement: Placement | None = None,
    fused: Fused = None,
    steps: int | None = None,
) -> Activity:
    """Run a graph from rest.

    Args:
        graph: any graph, loops included.
        inputs: for each input population integers (or bool) of shape (batch, steps, size), within the signed
            `num_message_bits` of every projection they feed.
        mode: "lava", the arithmetic of lava-nc 0.10.0 tagged `fixed_pt`, "chip", or "xylo" for a graph of Xylo's kinds.
        strict: raise at the first value that leaves its register, instead of counting such values.
        record: what to keep of every step: "spikes", a state's name, "a_in", or "POPULATION.VARIABLE". The messages of
            the outputs are always kept.
        device: where to compute; by default where the first input is.
        placement: population -> core of each neuron, for counts per core.
        fused: the compiled loops: None takes those in C on the CPU (built once per machine into the user's cache, see
            `hardware.building`), and torch.compile on CUDA after a while. True takes the latter at once,
            False neither; "torch" takes torch.compile on either. The bits are the same.
        steps: how many to run, from 1, of a graph without input populations (neurons that their biases drive); such a run
            is one sample. Elsewhere the inputs say it, and None is needed.

    Returns:
        Activity, its tensors int32 on the device, with counts over all samples and steps.

    Raises:
        ValueError: a mode or a scan that does not exist.
        GraphError: a kind that the mode does not have (lif_refractory in mode "lava", a kind of another chip), a graph that
            is no network of Xylo in mode "xylo", or a placement that does not fit.
        InputError: inputs missing, unknown, not integer, of a wrong shape or too wide; `steps` missing or not needed.
        FixedPointOverflow: strict only; names population, step, sample, neuron, value and width. The first one met in
            the order of evaluation: by chunks of steps, and within one by population.
    """
    check_mode(graph, mode)
    values, bounds, batch, length = bounded_run(graph, inputs, steps, device)
    where = _device(values) if values else torch.device(device or "cpu")
    windows = {population.name: (0, length) for population in graph.populations}
    tally = Tally(graph, checked_placement(graph, placement))
    run = Run(graph, batch, where, mode, strict, recorded(graph, record), windows, delayed=True)
    engine = Engine(run, tally, fused)
    engine.advance(values, bounds, length)
    return engine.activity(batch, length)


def run_pipelined(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    mode: str = "lava",
    strict: bool = False,
    record: Iterable[str] = (),
    device: torch.device | str | None = None,
    placement: Placement | None = None,
    fused: Fused = None,
) -> Activity:
    """Feed one token per step through a feed-forward graph and return each population's steps aligned with the tokens.

    What leaves a population at step t + `latency(graph, population)` stands at index t of the result, and exactly those
    steps are counted, so that counts per token carry no filling and flushing of the pipeline. A graph of stateless kinds
    has no memory: its tokens are then computed without the delays, which gives the same values.

    Args:
        graph: no loops, and all paths to one population of equal length.
        inputs: as in `simulate`; steps are tokens.
        mode, strict, record, device, placement, fused: as in `simulate`; steps in messages of `strict` are tokens.

    Returns:
        Activity as of `simulate`, aligned.

    Raises:
        PipelineError: a loop, unequal paths, or a population that no input reaches.
        ValueError, GraphError, InputError, FixedPointOverflow: as `simulate`.
    """
    depth = depths(graph)
    check_mode(graph, mode)
    values, bounds, batch, tokens = bounded_run(graph, inputs, None, device)
    keep = recorded(graph, record)
    delayed = any(population.kind not in STATELESS for population in graph.populations)
    flush = max(depth.values()) if delayed else 0
    windows = {name: (steps * delayed, steps * delayed + tokens) for name, steps in depth.items()}
    tally = Tally(graph, checked_placement(graph, placement))
    engine = Engine(Run(graph, batch, _device(values), mode, strict, keep, windows, delayed), tally, fused)
    engine.advance(values, bounds, tokens + flush)
    return engine.activity(batch, tokens)


def check_mode(graph: SpikingGraph, mode: str) -> None:
    """Raises ValueError for a mode that does not exist, GraphError for a graph that the mode does not have."""
    if mode not in MODES:
        raise ValueError(f"mode {quoted(mode)} does not exist; there is: {', '.join(MODES)}")
    for population in graph.populations:
        kind = KINDS[population.kind]
        if kind.family not in ("", FAMILIES[mode]):
            fitting = " or ".join(repr(name) for name, family in FAMILIES.items() if family == kind.family)
            raise GraphError(
                f"population {quoted(population.name)}: {population.kind} has the arithmetic of another chip than mode"
                f" {quoted(mode)}; use mode {fitting}"
            )
        if mode == "lava" and not kind.lava and not kind.extends:
            raise GraphError(
                f"population {quoted(population.name)}: Lava 0.10 has no fixed-point model of {population.kind}, "
                "so mode 'lava'"
                " has nothing to equal; use mode 'chip'"
            )
    if mode == "xylo":
        xylo_network(graph)


def _device(values: Mapping[str, Tensor]) -> torch.device:
    return next(iter(values.values())).device


class Engine:
    """One run: weights on the device and the state that is carried from chunk to chunk; a ledger counts and records."""

    def __init__(self, run: Run, tally: Tally, fused: Fused) -> None:
        graph, batch, device, mode = run.graph, run.batch, run.device, run.mode
        self._run = run
        self._components = components(graph)
        kinds = {p.name: p.kind for p in graph.populations}
        self._synapses = {p.name: Synapses(p, device, mode, kinds[p.source] in BINARY_KINDS) for p in graph.projections}
        if isinstance(fused, str) and fused != "torch":
            raise ValueError(f'fused {quoted(fused)} does not exist; there is: True, False, None, "torch"')
        in_c = False if isinstance(fused, str) else fused
        self._lif = {p.name: Lif(p, batch, device, mode, in_c) for p in graph.populations if p.kind in LIF_KINDS}
        for lif in self._lif.values():
            lif.scan.in_chunks = isinstance(fused, str) or (fused if device.type == "cuda" else False)
        self._other = {
            p.name: Other(p, batch, device, mode, in_c, run.keep[p.name])
            for p in graph.populations
            if p.kind not in (*LIF_KINDS, *XYLO_KINDS, "input")
        }
        self._xylo = {p.name: Xylo(graph, p, batch, device, in_c) for p in graph.populations if p.kind in XYLO_KINDS}
        self._lines = {
            (p.name, port): Line(
                1 + max((q.max_delay for q in graph.outgoing(p.name)), default=0), batch, p.size, device, torch.int8
            )
            for p in graph.populations
            for port in KINDS[p.kind].outs
        }
        self._start = 0
        self._input_bounds: Mapping[str, int] = {}
        self._program = (
            Program(graph, batch, self._synapses, self._lif, self._lines, run.delayed)
            if use_compiled(in_c, device)
            else None
        )
        self._ledger = Ledger(run, tally, self._lines, self._program is not None)

    def advance(self, inputs: Mapping[str, Tensor], bounds: Mapping[str, int], steps: int) -> None:
        """Take the graph through `steps` steps; inputs (batch, any steps, size), whose largest magnitudes are `bounds`, are
        silent after their end."""
        width = self._run.batch * sum(p.size for p in self._run.graph.populations)
        chunk = max(1, CHUNK_VALUES // width)
        self._input_bounds = bounds
        inputs = {name: value.to(narrow(self._input_bounds[name])) for name, value in inputs.items()}
        for start in range(0, steps, chunk):
            count = min(chunk, steps - start)
            self._start = self._ledger.start = start
            for names, loop in self._components:
                population = self._run.graph.population(names[0])
                if self._in_c(names, count):
                    continue
                if loop:
                    self._loop(names, count)
                elif population.kind == "input":
                    self._input(population, inputs[population.name], start, count)
                else:
                    self._alone(population, count)

    def _alone(self, population: Population, count: int) -> None:
        """A population on no loop through this chunk of `count` steps, with torch."""
        if population.kind in LIF_KINDS:
            arrived = self._arrived(population, "a_in", slice(0, count), ())
            messages = self._lines[population.name, "s_out"].begin(count)
            states = self._advance_lif(population, arrived, messages, 0)
            self._ledger.send(population, {"s_out": messages}, {"a_in": arrived}, states, None)
            return
        parts = {port: self._arrived(population, port, slice(0, count), ()) for port in PORTS[population.kind]}
        block = self._advance(population, parts, slice(0, count))
        self._put(population.name, block.messages)
        self._ledger.send(population, block.messages, parts, block.states, block)

    def _in_c(self, names: tuple[str, ...], count: int) -> bool:
        """Populations of the lif family, on a loop or not, through the loops in C with all that they receive; False where
        something about them is only in torch: nothing has happened then."""
        run = self._run
        if (
            self._program is None
            or run.strict
            or not all(name in self._lif and "a_in" not in run.keep[name] for name in names)
        ):
            return False
        lines = [self._lines[name, "s_out"] for name in names]
        inputs = self._program.inputs(names)
        if inputs is None:
            return False
        messages = [line.begin(count) for line in lines]
        for line in lines:
            line.bound = 1
        states = [self._lif[name].room(count) if run.keep[name] & {"u", "v"} else {} for name in names]
        first, end = run.windows[names[0]]
        edges = sorted({0, count, *(min(max(edge - self._start, 0), count) for edge in (first, end))})
        for low, high in pairwise(edges):
            counts = first <= self._start + low < end
            fired = [
                self._lif[name].silence() if counts and self._ledger.tally.wants_each(name) else None for name in names
            ]
            found = self._program.advance(names, inputs, messages, states, fired, self._start, slice(low, high))
            for name, numbers, each in zip(names, found, fired, strict=True):
                if counts:
                    stat = dict(zip(STATS, numbers, strict=False))
                    self._ledger.count_lif(run.graph.population(name), stat, each, None, high - low)
        for name, sent, kept in zip(names, messages, states, strict=True):
            self._ledger.send(run.graph.population(name), {"s_out": sent}, {}, kept, None)
        return True

    def _input(self, population: Population, value: Tensor, start: int, count: int) -> None:
        part = value[:, start : start + count].transpose(0, 1)
        bound, line = self._input_bounds[population.name], self._lines[population.name, "s_out"]
        rest = count - len(part)
        if self._program is not None and value.dtype == line.whole.dtype == torch.int8 and value.stride(2) == 1:
            each = (
                value.new_zeros(population.size, dtype=torch.int32)
                if self._ledger.tally.wants_each(population.name)
                else None
            )
            room = line.begin(count)
            counted = spread(part, room[: len(part)], True, each), each
            room[len(part) :] = 0
            line.bound, line.share = bound, 1.0
            self._ledger.send(population, {"s_out": room}, {}, {}, None, None if rest else counted)
            return
        part = torch.cat([part, part.new_zeros(rest, *part.shape[1:])]) if rest else part.contiguous()
        self._lines[population.name, "s_out"].put(part, bound, 1.0)
        self._ledger.send(population, {"s_out": part}, {}, {}, None)

    def _advance(self, population: Population, parts: dict[str, Arrived], rows: slice) -> Block:
        """Update a kind that is no lif kind through the steps of `rows`."""
        if population.name not in self._xylo:
            return self._other[population.name].advance(parts)
        incoming = self._run.graph.incoming(population.name)
        lines = {p.name: self._lines[p.source, p.source_port] for p in incoming}
        messages = {name: (line.read(0, rows) if self._run.delayed else line.now()).value for name, line in lines.items()}
        return self._xylo[population.name].advance(parts, messages)

    def _put(self, name: str, messages: Mapping[str, Tensor]) -> None:
        for port, value in messages.items():
            self._lines[name, port].put(value, magnitude(value), 1.0)

    def _read(self, projection: Projection, rows: slice) -> Arrived:
        line = self._lines[projection.source, projection.source_port]
        if not self._run.delayed:
            return self._synapses[projection.name].sums(lambda delay: line.now(), again=True)
        return self._synapses[projection.name].sums(lambda delay: line.read(delay, rows), again=rows.stop - rows.start > 1)

    def _arrived(self, population: Population, port: str, rows: slice, without: tuple[str, ...]) -> Arrived:
        incoming = [p for p in self._run.graph.incoming(population.name, port) if p.source not in without]
        if not incoming:
            shape = (rows.stop - rows.start, self._run.batch, population.size)
            return Arrived(torch.zeros(shape, dtype=torch.int32, device=self._run.device), 0, 0)
        found = self._program.arrived(population.name, port, rows, without) if self._program is not None else None
        if found is not None:
            return found
        return add([self._read(p, rows) for p in incoming])

    def _advance_lif(self, population: Population, arrived: Arrived, messages: Tensor, row: int) -> dict[str, Tensor]:
        """Update a lif kind through rows from `row` on, counting those inside its window; u and v if they are kept."""
        name, lif = population.name, self._lif[population.name]
        self._lines[name, "s_out"].bound = 1
        keep = bool(self._run.keep[name] & {"u", "v"})
        first, end = self._run.windows[name]
        at, steps = self._start + row, len(messages)
        edges = sorted({0, steps, *(min(max(edge - at, 0), steps) for edge in (first, end))})
        kept: list[dict[str, Tensor]] = []
        for low, high in pairwise(edges):
            part, rows = arrived.at(slice(low, high)), messages[low:high]
            each = self._ledger.tally.wants_each(name) and first <= at + low < end
            fired = torch.zeros(rows[0].numel(), dtype=torch.int32, device=self._run.device) if each else None
            before = lif.state.copy() if self._run.strict else None
            states, numbers = lif.advance(part, rows, at + low, keep, fired)
            kept.append(states)
            if first <= at + low < end:
                stat = dict(zip(STATS, numbers, strict=True))
                self._ledger.count_lif(population, stat, fired, part.wrapped, high - low)
                if before is not None:
                    self._ledger.refuse_lif(population, lif, part, rows, at + low, before, stat, row + low)
        return {key: torch.cat([states[key] for states in kept]) for key in kept[0]}

    def _loop(self, names: tuple[str, ...], count: int, mine: Container[str] | None = None) -> None:
        """Populations on a loop (those of `mine`, where it is given), step by step; what comes from outside the loop is
        computed for all steps at once."""
        members = [self._run.graph.population(name) for name in names if mine is None or name in mine]
        outside = {
            (m.name, port): self._arrived(m, port, slice(0, count), names) for m in members for port in PORTS[m.kind]
        }
        rooms = {(m.name, port): self._room(m, port, count) for m in members for port in KINDS[m.kind].outs}
        arrivals: dict[str, dict[str, list[Arrived]]] = {m.name: {port: [] for port in PORTS[m.kind]} for m in members}
        states: dict[str, list[dict[str, Tensor]]] = {m.name: [] for m in members}
        blocks: dict[str, list[Block]] = {m.name: [] for m in members}
        for step in range(count):
            at = slice(step, step + 1)
            for member in members:
                parts = {}
                for port in PORTS[member.kind]:
                    inside = [p for p in self._run.graph.incoming(member.name, port) if p.source in names]
                    parts[port] = add([outside[member.name, port].at(at), *(self._read(p, at) for p in inside)])
                    arrivals[member.name][port].append(parts[port])
                if member.kind in LIF_KINDS:
                    states[member.name].append(
                        self._advance_lif(member, parts["a_in"], rooms[member.name, "s_out"][at], step)
                    )
                    continue
                block = self._advance(member, parts, at)
                blocks[member.name].append(block)
                for port, value in block.messages.items():
                    rooms[member.name, port][at] = value
                    line = self._lines[member.name, port]
                    line.bound = max(line.bound, magnitude(value))
        for member in members:
            whole = {port: join_arrived(parts) for port, parts in arrivals[member.name].items()}
            messages = {port: rooms[member.name, port] for port in KINDS[member.kind].outs}
            found = states[member.name]
            kept = {key: torch.cat([part[key] for part in found]) for key in found[0]} if found else {}
            joined = join(blocks[member.name]) if blocks[member.name] else None
            self._ledger.send(member, messages, whole, joined.states if joined is not None else kept, joined)

    def _room(self, population: Population, port: str, count: int) -> Tensor:
        line = self._lines[population.name, port]
        if population.kind not in LIF_KINDS:
            line.whole = line.whole.to(torch.int32)
        line.share = 1.0
        return line.begin(count)

    def activity(self, batch: int, steps: int) -> Activity:
        """The frozen result."""
        notes = [note for synapses in self._synapses.values() for note in synapses.notes]
        return self._ledger.activity(batch, steps, notes)
