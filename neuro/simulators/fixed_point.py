"""Our integer simulator: batched, on CPU or CUDA, equal to Lava's fixed-point models bit for bit (`mode="lava"`).

Populations that lie on no loop are evaluated layer by layer: one exact matrix product over all samples and steps of a
chunk, then one elementwise update (stateless kinds) or a scan over time (lif). Only populations on a loop go step by
step. Memory is bounded by chunks over time; what is recorded is kept in full.

A message sent at step t arrives at step t + 1. Layout inside: (T, B, N) = steps, samples, neurons. At the door:
(batch, steps, size).

Counting (`Activity`): an event is a message other than 0 leaving a source, once per projection it feeds; synaptic
operations are events x targets, because a dense projection stores its zeros too. Messages wider than a projection's
`num_message_bits` are refused in the input and counted inside the graph (`strict=True` raises): Lava sends them on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from neuro.graph import PORTS, Population, Projection, SpikingGraph
from neuro.simulators.activity import Activity, PopulationCounts, ProjectionCounts, recorded
from neuro.simulators.exact import Arrived, Exact, Synapses, add, fitting, join_arrived
from neuro.simulators.neurons import REGISTER_LIMIT, Block, Lif, graded, join, product, settled_v
from neuro.simulators.schedule import PipelineError, components, depths, latency

__all__ = [
    "FixedPointOverflow",
    "InputError",
    "PipelineError",
    "checked_inputs",
    "latency",
    "run_pipelined",
    "simulate",
]

MODES = ("lava",)
CHUNK_VALUES = 2**21  # messages of all populations together held at a time, unless a single step has more


class InputError(ValueError):
    """Inputs that do not fit the graph: a name, a shape, a type, or a payload too wide."""


class FixedPointOverflow(OverflowError):
    """In strict mode: a value left its register, which Lava would wrap, clip or let pass in silence."""


def simulate(
    graph: SpikingGraph,
    inputs: Mapping[str, Tensor | np.ndarray],
    *,
    mode: str = "lava",
    strict: bool = False,
    record: Iterable[str] = ("spikes",),
    device: torch.device | str | None = None,
) -> Activity:
    """Run a graph from rest.

    Args:
        graph: any graph, loops included.
        inputs: for each input population integers (or bool) of shape (batch, steps, size), within the signed
            `num_message_bits` of every projection they feed.
        mode: "lava", the arithmetic of lava-nc 0.10.0 tagged `fixed_pt`.
        strict: raise at the first value that leaves its register, instead of counting such values.
        record: what to keep of every step: "spikes", "u", "v", "a_in", or "POPULATION.VARIABLE". The messages of the
            outputs are always kept.
        device: where to compute; by default where the first input is.

    Returns:
        Activity, its tensors int32 on the device, with counts over all samples and steps.

    Raises:
        ValueError: a mode that does not exist.
        InputError: inputs missing, unknown, not integer, of a wrong shape or too wide.
        FixedPointOverflow: strict only; names population, step, sample, neuron, value and width. The first one met in
            the order of evaluation: by chunks of steps, and within one by population.
    """
    values = _values(graph, inputs, mode, device)
    batch, steps = next(iter(values.values())).shape[:2]
    windows = {population.name: (0, steps) for population in graph.populations}
    engine = _Engine(graph, batch, _device(values), strict, recorded(graph, record), windows, delayed=True)
    engine.run(values, steps)
    return engine.activity(batch, steps, mode)


def run_pipelined(
    graph: SpikingGraph,
    inputs: Mapping[str, Tensor | np.ndarray],
    *,
    mode: str = "lava",
    strict: bool = False,
    record: Iterable[str] = (),
    device: torch.device | str | None = None,
) -> Activity:
    """Feed one token per step through a feed-forward graph and return each population's steps aligned with the tokens.

    What leaves a population at step t + `latency(graph, population)` stands at index t of the result, and exactly those
    steps are counted, so that counts per token carry no filling and flushing of the pipeline. A graph without lif has
    no memory: its tokens are then computed without the delays, which gives the same values.

    Args:
        graph: no loops, and all paths to one population of equal length.
        inputs: as in `simulate`; steps are tokens.
        mode, strict, record, device: as in `simulate`; steps in messages of `strict` are tokens.

    Returns:
        Activity as of `simulate`, aligned.

    Raises:
        PipelineError: a loop, unequal paths, or a population that no input reaches.
        ValueError, InputError, FixedPointOverflow: as `simulate`.
    """
    depth = depths(graph)
    values = _values(graph, inputs, mode, device)
    batch, tokens = next(iter(values.values())).shape[:2]
    keep = recorded(graph, record)
    delayed = any(population.kind == "lif" for population in graph.populations)
    flush = max(depth.values()) if delayed else 0
    windows = {name: (steps * delayed, steps * delayed + tokens) for name, steps in depth.items()}
    engine = _Engine(graph, batch, _device(values), strict, keep, windows, delayed=delayed)
    engine.run(values, tokens + flush)
    return engine.activity(batch, tokens, mode)


def _values(
    graph: SpikingGraph, inputs: Mapping[str, Tensor | np.ndarray], mode: str, device: torch.device | str | None
) -> dict[str, Tensor]:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} does not exist; there is: {', '.join(MODES)}")
    return checked_inputs(graph, inputs, device)


def _device(values: Mapping[str, Tensor]) -> torch.device:
    return next(iter(values.values())).device


def checked_inputs(
    graph: SpikingGraph, inputs: Mapping[str, Tensor | np.ndarray], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Inputs as tensors of shape (batch, steps, size) in the graph's order, every rule of `simulate` checked.

    Raises:
        InputError: missing, unknown, not integer, of a wrong shape, or too wide for a projection they feed.
    """
    if not graph.inputs:
        raise InputError("the graph has no input population, so nothing says how many steps to run; add one")
    for given, needed, word in ((inputs, graph.inputs, "unknown"), (graph.inputs, inputs, "missing")):
        for name in given:
            if name not in needed:
                raise InputError(f"input {name!r} is {word}; the graph's inputs are: {', '.join(graph.inputs)}")
    values: dict[str, Tensor] = {}
    extent: tuple[int, int] | None = None
    for name in graph.inputs:
        raw = inputs[name]
        value = raw if isinstance(raw, Tensor) else torch.from_numpy(np.array(raw))
        if value.is_floating_point() or value.is_complex():
            raise InputError(f"input {name!r} is {value.dtype}; messages are integers, so round and convert it first")
        size = graph.population(name).size
        if value.ndim != 3 or value.shape[2] != size or 0 in value.shape:
            raise InputError(f"input {name!r} has shape {tuple(value.shape)}; (batch, steps, {size}) is needed")
        if extent is not None and extent != tuple(value.shape[:2]):
            raise InputError(f"input {name!r} has (batch, steps) = {tuple(value.shape[:2])}, another input has {extent}")
        extent = (value.shape[0], value.shape[1])
        for projection in graph.outgoing(name):
            low, high = projection.payload_range
            _refuse_wide(name, value, low, high, f"projection {projection.name!r} ({projection.num_message_bits} bits)")
        if not graph.outgoing(name):
            _refuse_wide(name, value, -(2**31), 2**31 - 1, "a message (32 bits)")
        values[name] = value.to(device) if device is not None else value
    return values


def _refuse_wide(name: str, value: Tensor, low: int, high: int, holder: str) -> None:
    least, most = int(value.min()), int(value.max())
    if least < low or most > high:
        sample, step, neuron = torch.nonzero((value < low) | (value > high))[0].tolist()
        raise InputError(
            f"input {name!r} is {int(value[sample, step, neuron])} at sample {sample}, step {step}, neuron {neuron};"
            f" {holder} carries {low}..{high}"
        )


class _Engine:
    """One run: weights on the device, the state that is carried from chunk to chunk, counts and records."""

    def __init__(
        self,
        graph: SpikingGraph,
        batch: int,
        device: torch.device,
        strict: bool,
        keep: Mapping[str, set[str]],
        windows: Mapping[str, tuple[int, int]],
        delayed: bool,
    ) -> None:
        self._graph, self._batch, self._device, self._strict = graph, batch, device, strict
        self._keep, self._windows, self._delayed = keep, windows, delayed
        self._components = components(graph)
        self._synapses = {p.name: Synapses(p, device) for p in graph.projections}
        self._lif = {p.name: Lif(p, batch, device) for p in graph.populations if p.kind == "lif"}
        self._last = {p.name: self._silence(p.size, 1) for p in graph.populations}  # messages of the step before
        self._messages: dict[str, Exact] = {}  # of this chunk
        self._delays: dict[str, Exact] = {}
        self._start = 0
        self._counts = {p.name: {f.name: 0 for f in fields(PopulationCounts)} for p in graph.populations}
        self._traffic = {p.name: {f.name: 0 for f in fields(ProjectionCounts)} for p in graph.projections}
        self._kept: dict[str, dict[str, Tensor]] = {name: {} for name in keep}

    def _silence(self, size: int, steps: int) -> Exact:
        return Exact(torch.zeros(steps, self._batch, size, device=self._device), 0)

    def run(self, inputs: Mapping[str, Tensor], steps: int) -> None:
        """Take the graph through `steps` steps; inputs (batch, any steps, size) are silent after their end."""
        width = self._batch * sum(p.size for p in self._graph.populations)
        chunk = max(1, CHUNK_VALUES // width)
        for start in range(0, steps, chunk):
            count = min(chunk, steps - start)
            self._start, self._messages, self._delays = start, {}, {}
            for names, loop in self._components:
                if loop:
                    self._loop(names, count)
                    continue
                population = self._graph.population(names[0])
                if population.kind == "input":
                    self._send(population, self._input(inputs[population.name], start, count), None, {})
                    continue
                arrived = {port: self._arrived(population, port, count, ()) for port in PORTS[population.kind]}
                block = self._update(population, arrived)
                self._send(population, _measured(block.messages), block, arrived)
            self._last = {name: Exact(m.value[-1:].clone(), m.bound) for name, m in self._messages.items()}

    def _input(self, value: Tensor, start: int, count: int) -> Exact:
        part = value[:, start : start + count].transpose(0, 1)
        bound = max(-int(part.min()), int(part.max()), 0) if part.numel() else 0
        rest = count - len(part)
        part = part.to(fitting(bound))
        return Exact(torch.cat([part, part.new_zeros(rest, *part.shape[1:])]) if rest else part.contiguous(), bound)

    def _delay(self, name: str) -> Exact:
        """Messages as they arrive: those of the step before."""
        if not self._delayed:
            return self._messages[name]
        if name not in self._delays:
            last, now = self._last[name], self._messages[name]
            bound = max(last.bound, now.bound)
            self._delays[name] = Exact(torch.cat([last.value.to(fitting(bound)), now.value[:-1].to(fitting(bound))]), bound)
        return self._delays[name]

    def _arrived(self, population: Population, port: str, count: int, without: tuple[str, ...]) -> Arrived:
        incoming = [p for p in self._graph.incoming(population.name, port) if p.source not in without]
        if not incoming:
            return self._silence(population.size, count), None
        return add([self._synapses[p.name].sums(self._delay(p.source)) for p in incoming])

    def _update(self, population: Population, arrived: Mapping[str, Arrived]) -> Block:
        sums = [arrived[port] for port in PORTS[population.kind]]
        if population.kind == "lif":
            block = self._lif[population.name].advance(sums[0][0])
        elif population.kind == "product":
            block = product(population, sums[0][0], sums[1][0])
        else:
            block = graded(population, sums[0][0])
        for _, mask in sums:
            if mask is not None:
                block.wraps_sum = mask if block.wraps_sum is None else block.wraps_sum | mask
        return block

    def _loop(self, names: tuple[str, ...], count: int) -> None:
        """Populations on a loop, step by step; what comes from outside the loop is computed for all steps at once."""
        members = [self._graph.population(name) for name in names]
        outside = {(m.name, port): self._arrived(m, port, count, names) for m in members for port in PORTS[m.kind]}
        before = {m.name: self._last[m.name] for m in members}
        blocks: dict[str, list[Block]] = {m.name: [] for m in members}
        arrivals: dict[str, dict[str, list[Arrived]]] = {m.name: {port: [] for port in PORTS[m.kind]} for m in members}
        for step in range(count):
            now = {}
            for member in members:
                arrived: dict[str, Arrived] = {}
                for port in PORTS[member.kind]:
                    total, mask = outside[member.name, port]
                    at = slice(step, step + 1)
                    parts = [(Exact(total.value[at], total.bound), None if mask is None else mask[at])]
                    inside = [p for p in self._graph.incoming(member.name, port) if p.source in before]
                    parts += [self._synapses[p.name].sums(before[p.source]) for p in inside]
                    arrived[port] = add(parts)
                    arrivals[member.name][port].append(arrived[port])
                block = self._update(member, arrived)
                now[member.name] = _measured(block.messages)
                blocks[member.name].append(block)
            before = now
        joined = {name: join(parts) for name, parts in blocks.items()}
        self._messages.update({name: _measured(block.messages) for name, block in joined.items()})
        for member in members:
            name = member.name
            whole = {port: join_arrived(parts) for port, parts in arrivals[name].items()}
            self._send(member, self._messages[name], joined[name], whole)

    # Counting, recording, refusing: over the steps of the population's window that lie in this chunk.

    def _send(self, population: Population, messages: Exact, block: Block | None, arrived: Mapping[str, Arrived]) -> None:
        name = population.name
        self._messages[name] = messages
        first, end = self._windows[name]
        low, high = max(first - self._start, 0), min(end - self._start, len(messages.value))
        if low >= high:
            return
        rows = slice(low, high)
        sent = messages.value[rows]
        events = int(torch.count_nonzero(sent))
        for projection in self._graph.outgoing(name):
            self._count_traffic(projection, sent, messages.bound, events, low)
        if block is not None:
            self._count_updates(population, block, messages.bound, events, rows)
        self._record(name, "spikes", sent, low)
        if block is not None:
            if block.u is not None:
                self._record(name, "u", block.u[rows], low)
                if "v" in self._keep[name]:
                    self._record(name, "v", settled_v(block)[rows], low)
            for port, (total, _) in arrived.items():
                self._record(name, port, total.value[rows], low)

    def _record(self, name: str, variable: str, value_TBN: Tensor, low: int) -> None:
        if variable not in self._keep[name]:
            return
        first, end = self._windows[name]
        if variable not in self._kept[name]:
            shape = (self._batch, end - first, value_TBN.shape[2])
            self._kept[name][variable] = torch.empty(shape, dtype=torch.int32, device=self._device)
        at = self._start + low - first
        self._kept[name][variable][:, at : at + len(value_TBN)] = value_TBN.transpose(0, 1)

    def _count_traffic(self, projection: Projection, sent: Tensor, bound: int, events: int, low: int) -> None:
        counts = self._traffic[projection.name]
        counts["events"] += events
        counts["synops"] += events * projection.weight.shape[0]
        counts["max_abs_payload"] = max(counts["max_abs_payload"], bound)
        least, most = projection.payload_range
        signless = least == 0 and self._graph.population(projection.source).kind != "lif"
        if bound > most or (signless and bool((sent < 0).any())):
            holder = f"{projection.num_message_bits} message bits of projection {projection.name!r}"
            wide = (sent < least) | (sent > most)
            counts["payload_overflows"] += self._left(projection.source, wide, low, sent, "its message", holder)

    def _count_updates(self, population: Population, block: Block, bound: int, events: int, rows: slice) -> None:
        counts, name = self._counts[population.name], population.name
        v = block.v[rows]
        magnitude = _magnitude(v)
        counts["updates_active"] += events
        counts["updates_inactive"] += v.numel() - events
        counts["max_abs_payload"] = max(counts["max_abs_payload"], bound)
        if block.wraps_sum is not None:
            mask = block.wraps_sum[rows]
            counts["wraps_sum"] += self._left(name, mask, rows.start, None, "a sum", "32 bits of numpy's int32")
        if block.u is not None:
            counts["max_abs_u"] = max(counts["max_abs_u"], _magnitude(block.u[rows]))
            if block.raw_u is not None:
                raw = block.raw_u[rows]
                mask = (raw > REGISTER_LIMIT) | (raw <= -REGISTER_LIMIT)
                counts["wraps_u"] += self._left(name, mask, rows.start, raw, "u", "24 bits of its register")
        if magnitude >= REGISTER_LIMIT:
            lowest = -REGISTER_LIMIT + (1 if population.kind == "lif" else 0)
            mask = (v >= REGISTER_LIMIT) | (v < lowest)
            key = "saturations_v" if population.kind == "lif" else "wide_v"
            counts[key] += self._left(name, mask, rows.start, v, "v", "24 bits of its register")
            magnitude = min(magnitude, REGISTER_LIMIT - 1) if population.kind == "lif" else magnitude
        counts["max_abs_v"] = max(counts["max_abs_v"], magnitude)

    def _left(self, name: str, mask: Tensor, low: int, value: Tensor | None, what: str, width: str) -> int:
        """How many values left their register; in strict mode the first of them is an error."""
        number = int(torch.count_nonzero(mask))
        if not number or not self._strict:
            return number
        row, sample, neuron = torch.nonzero(mask)[0].tolist()
        found = self._unbounded(name, low + row, sample, neuron) if value is None else int(value[row, sample, neuron])
        step = self._start + low + row - self._windows[name][0]
        raise FixedPointOverflow(
            f"population {name!r}, step {step}, sample {sample}, neuron {neuron}: {what} is {found},"
            f" outside the {width}; lower the weights, exponents or payloads that lead here"
        )

    def _unbounded(self, name: str, row: int, sample: int, neuron: int) -> int:
        """The largest number on the way to one neuron's sums, in Python's integers."""
        sums, seen = [], []
        population = self._graph.population(name)
        for port in PORTS[population.kind]:
            total = 0
            for projection in self._graph.incoming(name, port):
                messages = [int(m) for m in self._delay(projection.source).value[row, sample].tolist()]
                if projection.num_message_bits == 0:
                    messages = [int(m != 0) for m in messages]
                dot = sum(int(w) * m for w, m in zip(projection.weight[neuron], messages, strict=True))
                shifted = dot << projection.weight_exp if projection.weight_exp > 0 else dot >> -projection.weight_exp
                total += shifted
                seen += [dot, shifted, total]
            sums.append(total)
        if population.kind == "product":
            seen.append(sums[0] * sums[1])
        return max(seen, key=abs)

    def activity(self, batch: int, steps: int, mode: str) -> Activity:
        """The frozen result."""
        return Activity(
            spikes={name: kept["spikes"] for name, kept in self._kept.items() if "spikes" in kept},
            states={
                name: {variable: value for variable, value in kept.items() if variable != "spikes"}
                for name, kept in self._kept.items()
                if set(kept) - {"spikes"}
            },
            batch=batch,
            steps=steps,
            ran_on=f"simulated (ours, {mode})",
            projections={name: ProjectionCounts(**counts) for name, counts in self._traffic.items()},
            populations={name: PopulationCounts(**counts) for name, counts in self._counts.items()},
        )


def _magnitude(value: Tensor) -> int:
    least, most = torch.aminmax(value)
    return max(-int(least), int(most))


def _measured(messages: Exact) -> Exact:
    """The same messages in the narrowest type, with their true bound, which lets narrower products be exact."""
    bound = messages.bound if messages.bound <= 1 else _magnitude(messages.value)
    return Exact(messages.value.to(fitting(bound)), bound)
