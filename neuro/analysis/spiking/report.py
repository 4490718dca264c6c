"""The report of route "lif": neurons, the layers whose sums reach them, and what is left on the host.

A linear or convolution layer goes to the chip where all that reads it, past reshapes and dropout, are neurons that convert.
Spikes go from layer to layer within the graph, so that only the ends of a chain cross to the host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from hardware.placement import LayerDemand, place
from neuro.analysis.fit import Fit, Fitter
from neuro.analysis.report import CompatibilityReport, Operation
from neuro.analysis.rules import AFFINE_NORMS, CONVOLUTIONS, LAYOUT, LINEARS, POSITION, Rule, Where, rules_for
from neuro.analysis.spiking.neurons import CONVERTER, LIF, Neurons, program
from neuro.analysis.tracing import Trace, TracedOp
from neuro.analysis.transfers import operation_of, row_count, rows_of, unused_parameters
from neuro.conversion.spiking.description import NotConvertible

SUMS_OF_TWO = ("add", "iadd")
PASSING = LAYOUT | AFFINE_NORMS
POOLS = frozenset(("avg_pool1d", "avg_pool2d", "AvgPool1d", "AvgPool2d"))
SYNAPSES = LINEARS | CONVOLUTIONS
STARVED = "it hears something that is computed on the host"
BEHIND = "more than a layer of spiking neurons that converts reads its sums, or nothing does"


@dataclass(frozen=True)
class _Layer:
    """A layer of synapses that goes to the chip: its demands, and what it takes alone; None on a chip without budgets."""

    demands: tuple[LayerDemand, LayerDemand]
    fit: Fit | None


def spiking_report(
    module: nn.Module,
    traced: Trace,
    where: Where,
    neurons: Mapping[str, Neurons],
    *,
    mappable: Callable[[str, nn.Linear], bool] | None = None,
    tokens: int | None = None,
    chips: int | None = None,
) -> CompatibilityReport:
    """The report of a network of spiking neurons.

    Args:
        module: the network. traced: its operations, each layer of neurons contracted to one.
        where: chip and route "lif".
        neurons: path -> what is known of it, from `spiking_layers`.
        mappable, tokens, chips: as in `neuro.analyse`.

    Raises:
        DoesNotFit: all layers together need more than `chips` chips.
        ValueError: an example without rows.
    """
    found = _Network(module, traced, where, neurons, mappable)
    rows = row_count((op for op in traced.ops if op.target in SYNAPSES), tokens)
    if chips is not None and found.layers:
        place([demand for layer in found.layers.values() for demand in layer.demands], where.chip, chips)
    seen: Counter[str] = Counter()
    for op in traced.ops:
        if op.index in found.on_chip and op.module in found.layers:
            seen[op.module] += rows_of(op)
    crossings, size = found.crossings(rows)
    return CompatibilityReport(
        chip=where.chip.name,
        traced=traced.complete,
        note=traced.note,
        tokens=rows,
        operations=tuple(found.operations(rows)),
        mapped=tuple(found.layers),
        pairs=(),
        rows_per_token=tuple((name, seen[name] / rows) for name in found.layers),
        unused_parameters=unused_parameters(module, traced),
        tied=(),
        total_parameters=sum(p.numel() for p in module.parameters()),
        crossings_per_token=crossings,
        crossing_bytes_per_token=size,
        route=LIF,
        cores=sum(layer.fit.cores for layer in found.layers.values() if layer.fit is not None),
        cores_per_chip=where.chip.cores,
    )


class _Network:
    """Who is on the chip: `on_chip` indices of operations, `layers` of synapses by module path, `refused` by index."""

    def __init__(
        self,
        module: nn.Module,
        traced: Trace,
        where: Where,
        neurons: Mapping[str, Neurons],
        mappable: Callable[[str, nn.Linear], bool] | None,
    ) -> None:
        self.module, self.traced, self.where, self.neurons = module, traced, where, neurons
        self.modules = dict(module.named_modules())
        self.state = dict(module.named_parameters(remove_duplicate=False))
        self.readers: dict[int, list[TracedOp]] = {}
        self.sources = dict(zip((op.index for op in traced.ops), _sources(traced), strict=True))
        for op in traced.ops:
            for source in self.sources[op.index]:
                self.readers.setdefault(source, []).append(op)
        self.layers: dict[str, _Layer] = {}
        self.refused: dict[int, Fit] = {}
        self.fitter = Fitter(where.chip, graded=False)
        converted = [op for op in traced.ops if self.is_neuron(op) and neurons[op.module].converts]
        self.unlike = {op.module: why for op in converted if any(why := self._unlike(op))}
        self.on_chip = {op.index for op in converted if op.module not in self.unlike}
        for op in traced.ops:
            if op.target in SYNAPSES and not self.is_neuron(op) and self._owned(op, mappable):
                self._take(op)
        self.starved: set[int] = set()
        while lost := [
            i for i in self.on_chip if not (self._fed(i) if self.is_neuron(traced.ops[i]) else self._reaches(i))
        ]:
            self.starved.update(lost)
            self.on_chip.difference_update(lost)
        kept = {traced.ops[i].module for i in self.on_chip}
        self.layers = {name: layer for name, layer in self.layers.items() if name in kept}

    def is_neuron(self, op: TracedOp) -> bool:
        return op.module in self.neurons and op.target == self.neurons[op.module].name

    def _unlike(self, op: TracedOp) -> tuple[str, str]:
        """Why neurons that convert elsewhere are not what this chip has, and the remedy; two empty texts where they are."""
        try:
            why = program(self.modules[op.module], op.out_shape[1:])
        except NotConvertible as error:
            return str(error), "make the neurons anew with the settings that they are to have"
        if not why or self.where.chip.graded:
            return "", ""
        remedy = "map to loihi2, or train Leaky with one decay a layer and reset_mechanism='zero' or reset_delay=False"
        return f"{why}: a program of the neuron, and {self.where.chip.title} has none", remedy

    def _passes(self, op: TracedOp) -> bool:
        """Whether an operation between neurons and synapses folds into the synapses, or only orders them."""
        if op.target not in POOLS:
            return op.target in PASSING
        pool = self.modules.get(op.module)
        return isinstance(pool, nn.AvgPool1d | nn.AvgPool2d) and not (
            pool.ceil_mode
            or getattr(pool, "divisor_override", None)
            or (not pool.count_include_pad and pool.padding not in (0, (0,), (0, 0)))
        )

    def _owned(self, op: TracedOp, mappable: Callable[[str, nn.Linear], bool] | None) -> bool:
        owner = self.modules.get(op.module)
        if not isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d) or not owner.weight.is_floating_point():
            return False
        if isinstance(owner, nn.Linear) and mappable is not None and not mappable(op.module, owner):
            return False
        return not self.traced.complete or any(self.state.get(name) is owner.weight for name in op.weights)

    def _meets(self, op: TracedOp) -> bool:
        """Whether it adds two branches of one shape."""
        return op.target in SUMS_OF_TWO and len(op.in_shapes) == 2 and op.in_shapes[0] == op.in_shapes[1] and not op.weights

    def _clean(self, index: int) -> bool:
        """Whether what an operation makes is spikes, sums of synapses on the chip, or the input, added up and reshaped."""
        waiting, seen = [index], set[int]()
        while waiting:
            at = waiting.pop()
            op = self.traced.ops[at]
            if at in seen or at in self.on_chip:
                continue
            if not (self._passes(op) or self._meets(op)):
                return False
            seen.add(at)
            waiting += self.sources[at]
        return True

    def _fed(self, index: int) -> bool:
        """Whether neurons hear only what is `_clean`, and states of their own."""
        own = self.traced.ops[index].module
        return all(
            self.traced.ops[i].module == own or self.traced.ops[i].target in POSITION or self._clean(i)
            for i in self.sources[index]
        )

    def _reaches(self, index: int) -> bool:
        """Whether neurons on the chip read it, past reshapes and sums, and nothing else does."""
        waiting, seen = [index], set[int]()
        while waiting:
            at = waiting.pop()
            following = self.readers.get(at, [])
            if not following or at in self.traced.returned:
                return False
            for reader in following:
                if (reader.index in self.on_chip and self.is_neuron(reader)) or reader.index in seen:
                    continue
                if not (self._passes(reader) or self._meets(reader)):
                    return False
                seen.add(reader.index)
                waiting.append(reader.index)
        return True

    def _take(self, op: TracedOp) -> None:
        if op.module not in self.layers:
            layer = self._layer(op)
            if layer.fit is not None and not layer.fit.fits:
                self.refused[op.index] = layer.fit
                return
            self.layers[op.module] = layer
        self.on_chip.add(op.index)

    def _layer(self, op: TracedOp) -> _Layer:
        """What a linear or convolution layer asks of the chip."""
        owner, name = self.modules[op.module], op.module or "(root)"
        if isinstance(owner, nn.Linear):
            size = (owner.in_features, owner.out_features)
            demands = self.fitter.demands(name, *size)
            return _Layer(demands, self.fitter.linear(*size) if self.where.chip.budgets else None)
        assert isinstance(owner, nn.Conv1d | nn.Conv2d)
        shape = op.in_shapes[0][-(owner.weight.dim() - 1) :]  # with the batch or without
        demands = self.fitter.convolution_demands(name, owner, shape)
        return _Layer(demands, self.fitter.convolution(owner, shape) if self.where.chip.budgets else None)

    def crossings(self, rows: int) -> tuple[float, float]:
        """Transfers a token between host and chip and their bytes: one for each value that goes in or comes out."""
        count = size = 0.0
        for op in self.traced.ops:
            if op.index not in self.on_chip:
                continue
            times = (op.out_shape[0] if op.out_shape else 1) / rows
            if op.module in self.layers and not any(self._from_chip(i) for i in self.sources[op.index]):
                count += times
                size += times * self.layers[op.module].demands[0].neurons
            if self.is_neuron(op) and not self._stays(op):
                count += times
                size += math.prod(op.out_shape) / rows
        return count, size

    def _from_chip(self, index: int) -> bool:
        """Whether it comes from layers on the chip, not from the host's input alone."""
        op = self.traced.ops[index]
        if index in self.on_chip:
            return True
        return (self._passes(op) or self._meets(op)) and any(self._from_chip(i) for i in self.sources[index])

    def _stays(self, op: TracedOp) -> bool:
        """Whether only operations on the chip read it."""
        return op.index not in self.traced.returned and all(
            reader.index in self.on_chip or ((self._passes(reader) or self._meets(reader)) and self._stays(reader))
            for reader in self.readers.get(op.index, [])
        )

    def operations(self, rows: int) -> list[Operation]:
        """A row for each operation; parameters counted where first read."""
        counted: set[int] = set()
        found = []
        for op in self.traced.ops:
            for position, rule in enumerate(self._rules(op)):
                parameters = size = 0
                for name in op.weights if position == 0 else ():
                    weight = self.state.get(name)
                    if weight is not None and id(weight) not in counted:
                        counted.add(id(weight))
                        parameters += weight.numel()
                        size += weight.numel() * (1 if rule.runs_on == "chip" else weight.element_size())
                found.append(operation_of(op, rule, rows, parameters, size, self.where))
        return found

    def _rules(self, op: TracedOp) -> tuple[Rule, ...]:
        if self.is_neuron(op):
            known = self.neurons[op.module]
            plain = rules_for(op, self.where)[0]
            on = "chip" if op.index in self.on_chip else "host"
            if op.module in self.unlike:
                return (Rule(known.kind, "after transform", on, *self.unlike[op.module], plain.macs),)
            if op.index in self.starved:
                return (Rule(known.kind, known.verdict, on, STARVED, "", plain.macs),)
            return (Rule(known.kind, known.verdict, on, known.reason, known.remedy, plain.macs),)
        if op.target in SYNAPSES:
            return (self._synapses(op),)
        if self._from_chip(op.index) and self._stays(op):
            folds = op.target in AFFINE_NORMS | POOLS
            reason = "folds into the weights beside it" if folds else "the order of the synapses"
            reason = "two projections into one population" if self._meets(op) else reason
            return tuple(
                replace(r, verdict="after transform", runs_on="chip", reason=reason) for r in rules_for(op, self.where)
            )
        return rules_for(op, self.where)

    def _synapses(self, op: TracedOp) -> Rule:
        kind = "linear" if op.target in LINEARS else "convolution"
        plain = rules_for(op, self.where)[0]
        refused = self.refused.get(op.index)
        if refused is not None:
            reason = f"does not fit: {refused.limit} {refused.need:,} of {refused.have:,}"
            rule = Rule(kind, "native", "host", reason, refused.remedy, plain.macs)
            return replace(rule, limit=refused.limit, need=refused.need, have=refused.have)
        if op.index not in self.on_chip:
            remedy = (
                "put neurons behind it; a read-out is Leaky(beta=0, reset_mechanism='none'), described with readout=True"
            )
            return Rule(kind, "native", "host", BEHIND, remedy, plain.macs)
        fit = self.layers[op.module].fit
        rule = Rule(kind, "native", "chip", f"int8 synapses of the neurons behind it; {CONVERTER}", "", plain.macs)
        if fit is None:
            return rule
        return replace(rule, limit=fit.limit, need=fit.need, have=fit.have, cores=fit.cores)


def _sources(traced: Trace) -> list[tuple[int, ...]]:
    """Who each operation reads; in a trace of leaf modules alone, the one that ran before it."""
    if traced.complete:
        return [op.inputs for op in traced.ops]
    return [(op.index - 1,) if op.index else () for op in traced.ops]
