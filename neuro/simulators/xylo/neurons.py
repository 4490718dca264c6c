"""Xylo's neurons over a block of steps, in integers; `neuro/graph/xylo.py` has the equations and their source.

Layout: (T, B, N) = steps, samples, neurons. The sum that arrives is exact; where a register could saturate on the way to
it, the additions are done again one source after another, in the chip's order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from neuro.graph import Population, SpikingGraph
from neuro.graph.kinds import KINDS
from neuro.graph.xylo import MOST_SPIKES, STATE_HIGH, STATE_LOW, checked_projection
from neuro.simulators.compiled.calls import use_compiled
from neuro.simulators.compiled.signals import advance_xylo
from neuro.simulators.exact import Arrived, outside, wrap
from neuro.simulators.neurons import Block, Finding, per_neuron

_REGISTER = "16 bits of its register"
MOST_SUMS = 2**23  # partial sums held at a time, 64 MiB


def decay(value: Tensor, dash: Tensor) -> Tensor:
    """What a state loses in a step: `value >> dash`, and 1 where that is 0 and the value above 0."""
    lost = value >> dash
    return torch.where((lost == 0) & (value > 0), 1, lost)


def clamped(value: Tensor) -> Tensor:
    """Saturated at 16 bits."""
    return value.clamp(STATE_LOW, STATE_HIGH)


class Xylo:
    """State of one population for B samples; `advance` takes it through T steps."""

    def __init__(
        self,
        graph: SpikingGraph,
        population: Population,
        batch: int,
        device: torch.device,
        fused: bool | None = False,
    ) -> None:
        """`fused`: as of `simulate`."""
        self._compiled = use_compiled(fused, device)
        self._hidden = population.kind == "xylo"
        self._most = MOST_SPIKES[population.kind]

        def each(name: str) -> Tensor:
            return per_neuron(population, population.params[name], 1, device)

        self._dash_mem, self._vth, self._bias = each("dash_mem"), each("vth"), each("bias")
        self._currents = ("i_syn", "i_syn2") if self._hidden else ("i_syn",)
        self._dash = {name: each(name.replace("i_", "dash_")) for name in self._currents}
        shape = (batch, population.size)
        states = KINDS[population.kind].states
        self.state = {name: torch.zeros(shape, dtype=torch.int32, device=device) for name in states}
        self._ports = dict(zip(self._currents, KINDS[population.kind].ports, strict=True))
        # port -> weights of its projections in the chip's order, each (S, N), shifted; by source population
        self._synapses: dict[str, list[tuple[str, list[tuple[str, Tensor]]]]] = {}
        self._sizes: dict[str, list[tuple[str, Tensor]]] = {}  # their magnitudes
        order = [p.name for p in graph.populations if p.kind == "input"] + [
            p.name for p in graph.populations if p.kind == "xylo"
        ]
        for port in KINDS[population.kind].ports:
            by_source = []
            for source in order:
                found = []
                for p in graph.incoming(population.name, port):
                    if p.source == source:
                        weight = checked_projection(graph, p)[1].T << (p.weight_exp + 1)
                        found.append((p.name, torch.from_numpy(np.ascontiguousarray(weight, dtype=np.int32)).to(device)))
                if found:
                    by_source.append((source, found))
            self._synapses[port] = by_source
            self._sizes[port] = [(name, w.abs().to(torch.float64)) for _, found in by_source for name, w in found]
        alias = np.broadcast_to(np.asarray(population.params.get("alias", -1)), (population.size,))
        self._turns = [tuple(torch.from_numpy(part).to(device) for part in turn) for turn in _turns(alias.astype(np.int64))]
        back = np.flatnonzero((alias >= 0) & (alias <= np.arange(len(alias))))
        self._back = tuple(torch.from_numpy(part).to(device) for part in (back, alias[back].astype(np.int64)))

    def advance(self, arrived: Mapping[str, Arrived], messages: Mapping[str, Tensor]) -> Block:
        """Update through T steps.

        Args:
            arrived: port -> sums (T, B, N).
            messages: projection -> what its source sent to these steps, (T, B, S).
        """
        if self._compiled and not self._turns:
            parts = {port: arrived[port] for port in self._ports.values()}
            numbers = {"dash_mem": self._dash_mem, "vth": self._vth, "bias": self._bias}
            found = advance_xylo(parts, self.state, self._dash, numbers, self._most)
            if found is not None:
                return Block({"s_out": found.messages}, v=found.v, states=found.states)
        sums = {name: arrived[port].settled() for name, port in self._ports.items()}
        kept: dict[str, list[Tensor]] = {name: [] for name in self.state}
        sent: list[Tensor] = []
        raw: dict[str, list[Tensor]] = {name: [] for name in self.state}
        clipped: dict[str, list[Tensor]] = {name: [] for name in self.state}
        for t in range(len(next(iter(sums.values())))):
            for name in self._currents:
                port = self._ports[name]
                current, hit = self._add(name, sums[name][t], port, arrived[port].bound, messages, t)
                clipped[name].append(hit)
                raw[name].append(self.state[name] + sums[name][t])
                self.state[name] = current - decay(current, self._dash[name])
            v, hit, before = self._integrate()
            clipped["v_mem"].append(hit)
            raw["v_mem"].append(before)
            spikes, own = self._fire(v)
            self.state["v_mem"] = v - own * self._vth
            sent.append(spikes)
            for name, value in self.state.items():
                kept[name].append(value)
        findings = [
            Finding("saturations_v", torch.stack(masks), torch.stack(raw[name]), name, _REGISTER)
            for name, masks in clipped.items()
            if any(bool(mask.any()) for mask in masks)
        ]
        states = {name: torch.stack(values) for name, values in kept.items()}
        return Block({"s_out": torch.stack(sent)}, v=torch.stack(raw["v_mem"]), states=states, findings=findings)

    def _add(
        self, name: str, total: Tensor, port: str, bound: int, messages: Mapping[str, Tensor], t: int
    ) -> tuple[Tensor, Tensor]:
        """A current with what arrived added, and where it saturated."""
        current = self.state[name]
        none = torch.zeros_like(current, dtype=torch.bool)
        largest = max(int(current.max()), -int(current.min())) if current.numel() else 0
        if largest + bound <= STATE_HIGH:
            return current + total, none
        parts = self._synapses[port]
        reach = current.abs().to(torch.float64)
        for projection, size in self._sizes[port]:
            reach = reach + messages[projection][t].to(torch.float64).matmul(size)
        near = torch.nonzero((reach > STATE_HIGH).any(dim=0)).flatten()
        near = self._beyond(current, near, parts, messages, t)
        if not len(near):
            return current + total, none
        part, hit = current[:, near], none[:, near]
        for _, found in parts:
            spikes = messages[found[0][0]][t].to(torch.int32)
            for number in torch.nonzero(spikes.any(dim=0)).flatten().tolist():
                part, hit = self._one_source(part, hit, spikes[:, number, None], [w[number, near] for _, w in found])
        result = current + total
        result[:, near] = part
        none[:, near] = hit
        return result, none

    @staticmethod
    def _beyond(
        current: Tensor,
        near: Tensor,
        parts: list[tuple[str, list[tuple[str, Tensor]]]],
        messages: Mapping[str, Tensor],
        t: int,
    ) -> Tensor:
        """Of some neurons those whose register meets an end on the way, addition by addition in the chip's order."""
        rows = sum(len(weight) * len(messages[projection][t]) for _, found in parts for projection, weight in found)
        width = max(1, MOST_SUMS // max(1, rows))
        found_at = []
        for some in near.split(width):
            steps = [
                messages[projection][t][:, :, None] * weight[:, some]  # (B, S, N), synapses of a source side by side
                for _, found in parts
                for projection, weight in found
            ]
            ends = [len(found) for _, found in parts]
            ordered = []
            for count in ends:
                own, steps = steps[:count], steps[count:]
                ordered.append(own[0] if count == 1 else torch.stack(own, dim=2).flatten(1, 2))
            sums = current[:, None, some].to(torch.int64) + torch.cat(ordered, dim=1).to(torch.int64).cumsum(dim=1)
            outer = (sums.amax(dim=(0, 1)) > STATE_HIGH) | (sums.amin(dim=(0, 1)) < STATE_LOW)
            found_at.append(some[outer])
        return torch.cat(found_at) if found_at else near

    @staticmethod
    def _one_source(part: Tensor, hit: Tensor, spikes: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The spikes of one source: synapse by synapse, each as often as there are spikes (which saturates as once)."""
        for weight in weights:
            reached = part + spikes * weight
            part = clamped(reached)
            hit = hit | (part != reached)
        return part, hit

    def _integrate(self) -> tuple[Tensor, Tensor, Tensor]:
        """v_mem before it fires, where something saturated, and v_mem before it saturated."""
        v = self.state["v_mem"]
        change = wrap(-decay(v, self._dash_mem), 16)
        first = change + sum(self.state[name] for name in self._currents)
        second = clamped(first) + self._bias
        third = v + clamped(second)
        return clamped(third), outside(first, 16) | outside(second, 16) | outside(third, 16), third

    def _fire(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes sent, those of aliases included, and how many of them are the neuron's own."""
        wanted = torch.div(v, self._vth, rounding_mode="floor").clamp_min(0)
        own = wanted.clamp_max(self._most)
        if not self._turns:
            return own, own
        sent = own.clone()
        for neurons, _, _ in self._turns:
            sent[:, neurons] = 0
        for neurons, sources, targets in self._turns:  # in the chip's order, as far as it matters
            before = sent[:, neurons]
            own[:, neurons] = torch.minimum(wanted[:, neurons], self._most - before)
            sent[:, neurons] = before + own[:, neurons]
            sent.index_add_(1, targets, sent[:, sources])
            sent.clamp_max_(self._most)
        sources, targets = self._back
        late = torch.zeros_like(sent).index_add_(1, targets, sent[:, sources])
        return (sent + late).clamp_max(self._most), own


def _turns(alias: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Neurons that take part in aliases, in groups that may fire at once: (neurons, those of them with an alias to a
    higher number, that number). A neuron comes after all lower ones that add to its spikes."""
    level: dict[int, int] = {}
    chained = sorted({*np.flatnonzero(alias >= 0).tolist(), *alias[alias >= 0].tolist()})
    for neuron in chained:
        level.setdefault(neuron, 0)
        if alias[neuron] > neuron:
            level[int(alias[neuron])] = max(level.get(int(alias[neuron]), 0), level[neuron] + 1)
    found = []
    for number in range(max(level.values(), default=-1) + 1):
        neurons = np.array([neuron for neuron in chained if level[neuron] == number], dtype=np.int64)
        sources = neurons[alias[neurons] > neurons]
        found.append((neurons, sources, alias[sources]))
    return found
