"""Populations and what they receive, put together for the loops in C.

Layout: (T, B, N) = steps, samples, neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuro.graph import Projection, SpikingGraph
from neuro.simulators.compiled.calls import neurons, run_members, sums_only
from neuro.simulators.compiled.packing import Packed, packed
from neuro.simulators.compiled.structures import Input, pointer
from neuro.simulators.exact import CONV_LIMIT, INT32_LIMIT, Arrived, Synapses
from neuro.simulators.lines import Line
from neuro.simulators.memory import unwritten
from neuro.simulators.neurons import Lif


@dataclass(frozen=True)
class Part:
    """Synapses of one delay onto one port, exact in 32 bits for messages up to their bound.

    Attributes:
        exponent: of the sum: what the weights' common zero bits and the projection shift it by, to the left.
        bound: on the magnitude of the sum after its shift.
        inside: whether the source is on the same loop.
    """

    projection: Projection
    weights: Packed
    line: Line
    exponent: int
    bound: int
    inside: bool


class Program:
    """Hands populations over to the loops in C, with the messages that lie in `lines`."""

    def __init__(
        self,
        graph: SpikingGraph,
        batch: int,
        synapses: Mapping[str, Synapses],
        lif: Mapping[str, Lif],
        lines: Mapping[tuple[str, str], Line],
        delayed: bool = True,
    ) -> None:
        self._graph, self._batch, self._synapses, self._lif, self._lines = graph, batch, synapses, lif, lines
        self._delayed = delayed

    def inputs(self, names: Sequence[str]) -> list[list[Part]] | None:
        """What each of these populations of the lif family receives; None where only torch has it."""
        found = []
        for name in names:
            parts = self._parts(name, "a_in", names)
            if parts is None:
                return None
            found.append(parts)
        return found

    def _parts(self, name: str, port: str, names: Sequence[str]) -> list[Part] | None:
        found: list[Part] = []
        for projection in self._graph.incoming(name, port):
            synapses, line = self._synapses[projection.name], self._lines[projection.source, projection.source_port]
            weights = packed(projection, synapses.weight, synapses.mode)
            inside = projection.source in names
            if weights is None or line.whole.dtype != torch.int8:
                return None
            bound = 1 if synapses.binary or inside else max(line.bound, line.bound_before)
            for part in weights:
                limit = bound * part.row_sum
                after = limit << synapses.exponent if synapses.exponent > 0 else -(-limit >> -synapses.exponent)
                most = CONV_LIMIT if projection.kind == "conv" and synapses.mode != "chip" else INT32_LIMIT
                if limit >= most or after >= INT32_LIMIT:
                    return None
                found.append(Part(projection, part, line, synapses.exponent + part.drop, after, inside))
        return found if sum(part.bound for part in found) < INT32_LIMIT else None

    def advance(
        self,
        names: Sequence[str],
        inputs: Sequence[Sequence[Part]],
        messages: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        fired: Sequence[Tensor | None],
        start: int,
        rows: slice,
    ) -> list[list[int]]:
        """Take populations of the lif family through the steps `rows` of the chunk that begins at step `start`.

        Args:
            names: one population, or all of one loop.
            inputs: as `inputs` gave them.
            messages: of each, int8 (T, B, N), receive what it sends.
            states: of each, int32 (T, B, N) for "u" and "v", where they are wanted.
            fired: of each, int32 (B x N), receive counts of messages, where they are wanted.

        Returns:
            numbers of each, see `run_members`.
        """
        steps = rows.stop - rows.start
        members, resets = [], []
        for name, parts, sent, kept, each in zip(names, inputs, messages, states, fired, strict=True):
            lif = self._lif[name]
            reset = lif.resets(start + rows.start, steps)
            resets.append(None if reset is None else reset.to(torch.uint8))
            keep = (kept["u"][rows], kept["v"][rows]) if kept else None
            member = neurons(lif.scan, parts[0].exponent if len(parts) == 1 else 0, lif.state, resets[-1], each, keep)
            member.sent, member.size = pointer(sent[rows]), sent.shape[2]
            members.append(member)
        return run_members(members, [self._inputs(parts, rows.start) for parts in inputs], steps, self._batch)

    def _inputs(self, parts: Sequence[Part], row: int) -> list[Input]:
        found = []
        for part in parts:
            given = part.weights.input()
            given.messages = pointer(part.line.arriving(part.weights.delay, row, self._delayed))
            given.stride = self._batch * given.sources
            given.binary, given.inside = part.projection.num_message_bits == 0, part.inside
            if len(parts) > 1:
                given.right, given.left = max(-part.exponent, 0), max(part.exponent, 0)
            found.append(given)
        return found

    def arrived(self, name: str, port: str, rows: slice, without: Sequence[str]) -> Arrived | None:
        """Sums at a port, as `neuro.simulators.exact.add` gives them; None where only torch has them."""
        parts = self._parts(name, port, ())
        if parts is None:
            return None
        parts = [part for part in parts if part.projection.source not in without]
        steps, size = rows.stop - rows.start, self._graph.population(name).size
        total = unwritten((steps, self._batch, size), torch.device("cpu"))
        member = sums_only(total)
        member.size = size
        run_members([member], [self._inputs(parts, rows.start)], steps, self._batch)
        return Arrived(total, parts[0].exponent if len(parts) == 1 else 0, sum(part.bound for part in parts))
