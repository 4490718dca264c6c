"""One process's part of a graph: its own populations by the engine of `fixed_point`, the others' messages from outside.

A message that is sent at step t arrives at t + 1 + delay, so a process needs, for some steps, what the others sent before
them only. All go on by as many steps as the shortest delay between two of them allows, then every process tells what its
populations sent. Layout: (T, B, N) = steps, samples, neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuro.graph import SpikingGraph
from neuro.simulators import fixed_point
from neuro.simulators.activity import Activity, recorded
from neuro.simulators.exact import magnitude, narrow
from neuro.simulators.fixed_point import Engine, Fused
from neuro.simulators.inputs import Integers, bounded_run
from neuro.simulators.ledger import Run
from neuro.simulators.ranks.splitting import Port, crossing, lookahead, narrow_port
from neuro.simulators.tally import Placement, Tally, checked_placement

Exchange = Callable[[dict[Port, Tensor], Sequence[tuple[Port, int, int, bool]], int, int], dict[Port, Tensor]]
"""(what this process sent; every port that crosses, with its process, its size and whether it fits a byte; steps; samples)
-> what all sent. Tensors are (T, B, N), int8 or int32."""


def simulate_part(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    assignment: Mapping[str, int],
    rank: int,
    exchange: Exchange,
    *,
    mode: str = "lava",
    record: Any = ("spikes",),
    placement: Placement | None = None,
    fused: Fused = None,
    steps: int | None = None,
) -> Activity:
    """The part of process `rank` of a run; every process calls it with the same arguments but for `rank`.

    Returns:
        Activity with the messages, states and counts of the populations of this process; those of the others are 0.

    Raises:
        As `neuro.simulators.fixed_point.simulate`.
    """
    values, bounds, batch, length = bounded_run(graph, inputs, steps, "cpu")
    mine = {name for name, part in assignment.items() if part == rank}
    keep = {name: found if name in mine else set() for name, found in recorded(graph, record).items()}
    windows = {population.name: (0, length) for population in graph.populations}
    run = Run(graph, batch, torch.device("cpu"), mode, False, keep, windows, delayed=True)
    engine = _Part(run, Tally(graph, checked_placement(graph, placement)), fused, assignment, rank, exchange)
    engine.advance(values, bounds, length)
    return engine.activity(batch, length)


class _Part(Engine):
    """The engine, for the populations of one process."""

    def __init__(
        self, run: Run, tally: Tally, fused: Fused, assignment: Mapping[str, int], rank: int, exchange: Exchange
    ) -> None:
        super().__init__(run, tally, fused)
        graph = run.graph
        self._mine = frozenset(name for name, part in assignment.items() if part == rank)
        self._exchange = exchange
        self._lookahead = lookahead(graph, assignment)
        self._crossing = [
            (port, assignment[port[0]], graph.population(port[0]).size, narrow_port(graph, port))
            for port in crossing(graph, assignment)
        ]
        heard = {(p.source, p.source_port) for p in graph.projections if p.target in self._mine}
        self._foreign = [port for port, part, _, _ in self._crossing if part != rank and port in heard]
        self._inputs_heard = {
            p.source
            for p in graph.projections
            if p.target in self._mine and p.source not in self._mine and graph.population(p.source).kind == "input"
        }

    def advance(self, inputs: Mapping[str, Tensor], bounds: Mapping[str, int], steps: int) -> None:
        """As of the engine, by as many steps at a time as the others need not hear of."""
        width = self._run.batch * sum(p.size for p in self._run.graph.populations)
        chunk = max(1, fixed_point.CHUNK_VALUES // width)
        if self._lookahead is not None:
            chunk = min(chunk, self._lookahead)
        self._input_bounds = bounds
        inputs = {name: value.to(narrow(bounds[name])) for name, value in inputs.items()}
        for start in range(0, steps, chunk):
            count = min(chunk, steps - start)
            self._start = self._ledger.start = start
            rooms = {port: self._foreign_room(port, count) for port in self._foreign}
            for names, loop in self._components:
                self._advance_component(names, loop, inputs, start, count)
            if self._crossing:
                self._tell(rooms, count)

    def _advance_component(
        self, names: tuple[str, ...], loop: bool, inputs: Mapping[str, Tensor], start: int, count: int
    ) -> None:
        own = tuple(name for name in names if name in self._mine)
        population = self._run.graph.population(names[0])
        if population.kind == "input":
            if own:
                self._input(population, inputs[population.name], start, count)
            elif population.name in self._inputs_heard:
                self._hear_input(population.name, inputs[population.name], start, count)
            return
        if not own or self._in_c(own, count):
            return
        if loop:
            self._loop(names, count, self._mine)
        else:
            self._alone(population, count)

    def _hear_input(self, name: str, value: Tensor, start: int, count: int) -> None:
        """An input that another process counts."""
        part = value[:, start : start + count].transpose(0, 1)
        rest = part.new_zeros(count - len(part), *part.shape[1:])
        self._lines[name, "s_out"].put(torch.cat([part, rest]), self._input_bounds[name], 1.0)

    def _foreign_room(self, port: Port, count: int) -> Tensor:
        """Room for what another process sends in these steps; nothing of this process reads it before it is there."""
        line = self._lines[port]
        if not narrow_port(self._run.graph, port):
            line.whole = line.whole.to(torch.int32)
        room = line.begin(count)
        room.zero_()
        return room

    def _tell(self, rooms: Mapping[Port, Tensor], count: int) -> None:
        sent = {port: self._lines[port].whole[-count:] for port, _, _, _ in self._crossing if port[0] in self._mine}
        heard = self._exchange(sent, self._crossing, count, self._run.batch)
        for port, room in rooms.items():
            room.copy_(heard[port])
            line = self._lines[port]
            line.bound = 1 if narrow_port(self._run.graph, port) else magnitude(room)
            line.share = 1.0
