"""What a run counts, records and refuses, over the steps of each population's window.

The engine of `neuro.simulators.fixed_point` computes chunk by chunk and hands each population's messages, sums and states
over. Layout: (T, B, N) = steps of the chunk, samples, neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hardware.text import quoted
from neuro.graph import PORTS, Population, Projection, SpikingGraph
from neuro.graph.kinds import BINARY_KINDS, LIF_KINDS
from neuro.simulators.activity import Activity, Messages, PopulationCounts, ProjectionCounts
from neuro.simulators.compiled.calls import spread
from neuro.simulators.exact import Arrived, Exact, magnitude
from neuro.simulators.lines import Line, synapses_of
from neuro.simulators.memory import unwritten
from neuro.simulators.neurons import REGISTER_LIMIT, Block, Finding, Lif
from neuro.simulators.scan import State
from neuro.simulators.tally import Tally

CHIP_NOTE = (
    "mode chip follows published emulators of the chip; of silicon, one published trace of one lif neuron was compared"
)


class FixedPointOverflow(OverflowError):
    """In strict mode: a value left its register, which would wrap, be clipped, or pass in silence."""


@dataclass(frozen=True)
class Run:
    """What one run of a graph is.

    Attributes:
        graph, batch, device: what runs, how many samples, and where.
        mode: "lava" or "chip".
        strict: whether the first value that leaves its register is an error.
        keep: population -> variables to record.
        windows: population -> (first, end) of the steps that count.
        delayed: whether messages take a step on their way.
    """

    graph: SpikingGraph
    batch: int
    device: torch.device
    mode: str
    strict: bool
    keep: Mapping[str, set[str]]
    windows: Mapping[str, tuple[int, int]]
    delayed: bool


class Ledger:
    """Counts and records of one run.

    Args:
        run: what runs.
        tally: sums over the steps counted.
        lines: (population, port) -> its messages; their shares of events are written here.
        in_c: whether copies are made by the loops in C.

    `start` is the first step of the chunk that is computed now.
    """

    def __init__(self, run: Run, tally: Tally, lines: Mapping[tuple[str, str], Line], in_c: bool = False) -> None:
        self._run, self.tally, self._lines, self.start = run, tally, lines, 0
        self._in_c = in_c
        self._kept: dict[str, dict[str, Tensor]] = {name: {} for name in run.keep}

    def count_lif(
        self, population: Population, stat: dict[str, int], fired_M: Tensor | None, wrapped: Tensor | None, steps: int
    ) -> None:
        """Counts of a lif kind over some steps, as its scan gives them (`neuro.simulators.scan.STATS`)."""
        name, events = population.name, stat["fired"]
        each = None if fired_M is None else fired_M.view(self._run.batch, population.size).sum(dim=0)
        self.tally.sent(name, "s_out", events, each)
        self.tally.updated(name, steps * self._run.batch, events)
        counts = self.tally.populations[name]
        for key in ("wide_a", "wraps_u", "saturations_v"):
            counts[key] += stat[key]
        self.tally.raise_to(name, "max_abs_u", stat["max_abs_u"])
        self.tally.raise_to(name, "max_abs_v", min(stat["max_abs_v"], REGISTER_LIMIT - 1))
        self.tally.raise_to(name, "max_abs_payload", int(events > 0))
        if wrapped is not None:
            counts["wraps_sum"] += int(torch.count_nonzero(wrapped))
        self._lines[name, "s_out"].share = events / max(1, steps * self._run.batch * population.size)

    def refuse_lif(
        self,
        population: Population,
        lif: Lif,
        arrived: Arrived,
        messages: Tensor,
        step: int,
        before: State,
        stat: dict[str, int],
        row: int,
    ) -> None:
        """In strict mode: the error of the first value of these steps that left its register."""
        if arrived.wrapped is not None:
            self._refuse(population.name, _beyond_32(arrived.wrapped), row)
        watched = ("wraps_u", "saturations_v") if self._run.mode == "lava" else ("wide_a", "wraps_u", "saturations_v")
        if any(stat[key] for key in watched):
            for found in lif.explain(arrived, messages, step, before):
                self._refuse(population.name, found, row)

    def send(
        self,
        population: Population,
        messages: Mapping[str, Tensor],
        arrived: Mapping[str, Arrived],
        states: Mapping[str, Tensor],
        block: Block | None,
        counted: tuple[int, Tensor | None] | None = None,
    ) -> None:
        """Count and record what a population sent, got and held in the steps of its window that lie in this chunk.

        Args:
            counted: of an input all of whose steps lie in the window, where known: messages that are not 0, and of each
                neuron where `Tally.wants_each`.
        """
        name = population.name
        first, end = self._run.windows[name]
        steps = len(next(iter(messages.values())))
        rows = slice(max(first - self.start, 0), min(end - self.start, steps))
        if rows.start >= rows.stop:
            return
        if population.kind not in LIF_KINDS:
            self._count_other(population, messages, block, rows, counted)
        for projection in self._run.graph.outgoing(name):
            line = self._lines[name, projection.source_port]
            self._count_payload(projection, messages[projection.source_port][rows], line.bound, rows.start)
        self._record(name, "spikes", messages["s_out"], rows)
        if "s2_out" in messages:
            self._record(name, "spikes2", messages["s2_out"], rows)
        for variable, value in states.items():
            self._record(name, variable, value, rows)
        for port, part in arrived.items():
            if port in self._run.keep[name]:
                self._record(name, port, part.settled(), rows)

    def _count_other(
        self,
        population: Population,
        messages: Mapping[str, Tensor],
        block: Block | None,
        rows: slice,
        counted: tuple[int, Tensor | None] | None,
    ) -> None:
        name = population.name
        events = 0
        for port, value in messages.items():
            sent = value[rows]
            if counted is not None:
                number, each = counted
            else:
                each = torch.count_nonzero(sent, dim=(0, 1)) if self.tally.wants_each(name, port) else None
                number = int(torch.count_nonzero(sent) if each is None else each.sum())
            self.tally.sent(name, port, number, each)
            line = self._lines[name, port]
            line.share = number / max(1, sent.numel())
            events = number if port == "s_out" else events
            self.tally.raise_to(name, "max_abs_payload", magnitude(sent) if block is not None else 0)
        if block is None:  # an input computes nothing
            return
        self.tally.updated(name, (rows.stop - rows.start) * self._run.batch, events)
        self.tally.raise_to(name, "max_abs_v", magnitude(block.v[rows]))
        for found in block.findings:
            mask = found.mask[rows]
            self.tally.populations[name][found.counter] += int(torch.count_nonzero(mask))
            held = None if found.value is None else found.value[rows]
            self._refuse(name, Finding(found.counter, mask, held, found.what, found.width), rows.start)

    def _record(self, name: str, variable: str, value_TBN: Tensor, rows: slice) -> None:
        if variable not in self._run.keep[name]:
            return
        first, end = self._run.windows[name]
        if variable not in self._kept[name]:
            shape = (self._run.batch, end - first, value_TBN.shape[2])
            # Of inputs and lif kinds all chunks have one type; other messages may become wider later.
            small = variable == "spikes" and self._in_c and value_TBN.dtype == torch.int8 and self._bytes(name)
            dtype = torch.int8 if small else torch.int32
            self._kept[name][variable] = unwritten(shape, self._run.device, dtype)
        at = self.start + rows.start - first
        to_TBN = self._kept[name][variable][:, at : at + rows.stop - rows.start].transpose(0, 1)
        if self._in_c and value_TBN.dtype in (torch.int8, torch.int32) and value_TBN.stride(2) == 1:
            spread(value_TBN[rows], to_TBN)
        else:
            to_TBN.copy_(value_TBN[rows])

    def _bytes(self, name: str) -> bool:
        return self._run.graph.population(name).kind in (*LIF_KINDS, "input")

    def _count_payload(self, projection: Projection, sent: Tensor, bound: int, low: int) -> None:
        counts = self.tally.projections[projection.name]
        counts["max_abs_payload"] = max(counts["max_abs_payload"], bound)
        least, most = projection.payload_range
        kind = self._run.graph.population(projection.source).kind
        signed = least == 0 and kind not in ("input", *BINARY_KINDS) and bool((sent < 0).any())
        if bound > most or signed:
            holder = f"{projection.num_message_bits} message bits of projection {quoted(projection.name)}"
            wide = (sent < least) | (sent > most)
            counts["payload_overflows"] += int(torch.count_nonzero(wide))
            self._refuse(projection.source, Finding("", wide, sent, "its message", holder), low)

    def _refuse(self, name: str, found: Finding, low: int) -> None:
        """In strict mode the first value that left its register is an error; `low`: row of the chunk where masks begin."""
        if not self._run.strict or not bool(found.mask.any()):
            return
        row, sample, neuron = torch.nonzero(found.mask)[0].tolist()
        if found.value is None:
            value = self._unbounded(name, low + row, sample, neuron)
        else:
            value = int(found.value[row, sample, neuron])
        step = self.start + low + row - self._run.windows[name][0]
        raise FixedPointOverflow(
            f"population {quoted(name)}, step {step}, sample {sample}, neuron {neuron}: {found.what} is {value},"
            f" outside the {found.width}; lower the weights, exponents or payloads that lead here"
        )

    def _unbounded(self, name: str, row: int, sample: int, neuron: int) -> int:
        """The largest number on the way to one neuron's sums, in Python's integers."""
        sums, seen = [], [0]
        population = self._run.graph.population(name)
        for port in PORTS[population.kind]:
            total = 0
            for projection in self._run.graph.incoming(name, port):
                line, at = self._lines[projection.source, projection.source_port], slice(row, row + 1)
                dot = 0
                for weight, delay, source in synapses_of(projection, neuron):
                    message = line.read(delay, at) if self._run.delayed else Exact(line.now().value[at], 0)
                    payload = int(message.value[0, sample, source])
                    dot += weight * (int(payload != 0) if projection.num_message_bits == 0 else payload)
                e = 0 if projection.kind == "conv" and self._run.mode == "lava" else projection.weight_exp
                shifted = dot << e if e > 0 else dot >> -e
                total += shifted
                seen += [dot, shifted, total]
            sums.append(total)
        if population.kind in ("product", "norm"):
            seen.append(sums[0] * sums[1])
        return max(seen, key=abs)

    def activity(self, batch: int, steps: int, notes: list[str]) -> Activity:
        """The frozen result; `notes`: what the synapses had to say."""
        cores = self.tally.finish()
        variants = {
            p.name: f"{p.kind} ({'corrected' if p.params['corrected'] else 'residue'})"
            for p in self._run.graph.populations
            if "corrected" in p.params
        }
        notes = notes + [
            f"{name}: the corrected model is not in Lava 0.10" for name, model in variants.items() if "cor" in model
        ]
        return Activity(
            spikes=Messages({name: kept["spikes"] for name, kept in self._kept.items() if "spikes" in kept}),
            states={
                name: {variable: value for variable, value in kept.items() if variable != "spikes"}
                for name, kept in self._kept.items()
                if set(kept) - {"spikes"}
            },
            batch=batch,
            steps=steps,
            ran_on=f"simulated (ours, {self._run.mode})",
            projections={name: ProjectionCounts(**counts) for name, counts in self.tally.projections.items()},
            populations={name: PopulationCounts(**counts) for name, counts in self.tally.populations.items()},
            cores=cores,
            models=variants,
            notes=tuple(notes) + ((CHIP_NOTE,) if self._run.mode == "chip" else ()),
            mode=self._run.mode,
        )


def _beyond_32(mask: Tensor) -> Finding:
    return Finding("wraps_sum", mask, None, "a sum", "32 bits of numpy's int32")
