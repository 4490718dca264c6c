"""One verdict per operation of a module: what the chip can take, what this package moves there, and what stays on the
host.

    report = analyse(model, example_tokens, chip="loihi2")
    print(report.table())

Verdicts say what the *chip* could do (`native`, `after transform`, `approximate`, `host`); `runs_on` says where the
chosen route of this package puts the operation today ("chip" or "host"). Functional operations (attention scores,
softmax, residual adds) have rows of their own. Multiply-accumulates (MACs) are those of linear, convolution and
matrix-product operations, counted densely; element-wise work counts 0, as in `torch.utils.flop_counter`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hardware.chips.chip import Chip, list_chips, load_chip
from hardware.text import listed, quoted
from neuro.analysis.chains import Chain, find_chains
from neuro.analysis.convolutions import convolution_calls
from neuro.analysis.fit import Fit, Fitter
from neuro.analysis.lookup import Table
from neuro.analysis.pairs import disjoint, find_pairs, inside_pairs
from neuro.analysis.preparation import TransformError, convertible, prepare_named
from neuro.analysis.registry import LayerRule, layer_rule
from neuro.analysis.report import VERDICTS, CompatibilityReport, MlpPair, NothingToMap, Operation, Preparation
from neuro.analysis.rules import CONVOLUTIONS, LINEARS, ROUTES, Where, is_matrix, rules_for
from neuro.analysis.spiking.neurons import LIF, numbered, spiking_layers, spiking_neurons
from neuro.analysis.spiking.report import spiking_report
from neuro.analysis.tracing import Example, Trace, TracedOp, check_ready, contracted, strip_calls, trace
from neuro.analysis.transfers import crossings_of, operation_of, placed_together, row_count, rows_of, unused_parameters
from neuro.modules.thresholds import EventThreshold

__all__ = ["VERDICTS", "CompatibilityReport", "MlpPair", "NothingToMap", "Operation", "analyse"]

PAIRS_OF = {"graded": ("relu", "relu2"), "sigma_delta": ("relu", "relu2"), "rate": ("relu",)}
"""Route -> activations of the MLP pairs that it takes as one graph; only the graded one takes a threshold inside."""
ACTIVATION_CLASSES = {
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "MishActivation": "mish",
}
"""Class of an activation module outside torch -> the function it computes, operation by operation."""


def analyse(
    module: nn.Module,
    example_inputs: Example,
    chip: str | Path | Chip = "loihi2",
    *,
    route: str | None = None,
    tokens: int | None = None,
    mappable: Callable[[str, nn.Linear], bool] | None = None,
    chips: int | None = None,
    table: Table | None = None,
    strict: bool = True,
) -> CompatibilityReport:
    """Verdict of every operation that one forward pass of `module` on `example_inputs` runs (eval mode, nothing is
    changed).

    Layers that `convert` and `deploy` turn into nn.Linear (see `neuro.analysis.preparation`) stand in the table as they are
    in the module; its first line and `preparation` say what converting them gains, and hold the report of that module.

    Args:
        module: any nn.Module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; shapes decide the MACs (context
            length).
        chip: name of a shipped chip, path of a chip file, or a `Chip`. Loihi 1's binary spikes take nothing by the
            graded and sigma-delta routes.
        route: "graded", "sigma_delta", "rate" or "lif"; default: lif where the module has spiking neurons, else graded,
            and rate on a chip without payloads.
        tokens: rows the example stands for; default: the largest number of rows any linear operation sees.
        mappable: says per nn.Linear (name, module) whether it may leave the host; default: all may.
        chips: chips there are: all mapped layers are then placed on them. Default: as many as it takes.
        table: look-up table that an activation like GELU would get; default `Table()`, 256 entries over -8..8.
        strict: False gives the report of a module of which nothing can be mapped, too.

    Raises:
        NothingToMap: strict, and no linear operation can be mapped, preparing included; the message lists what was seen.
        hardware.placement.DoesNotFit: the mapped layers need more than `chips` chips; names the limit and remedies.
        ValueError: unknown chip or route, NaN or infinite weights (the parameter is named), example inputs that do not
            run or hold nothing; a lazy, pruned or compiled module (`neuro.analysis.tracing.check_ready`).
    """
    found = _chip(chip)
    if route is None:
        route = "graded" if found.graded else "rate"
        if spiking_layers(module):

            def by(route: str, chips: int | None, strict: bool) -> CompatibilityReport:
                return analyse(
                    module, example_inputs, found,
                    route=route, tokens=tokens, mappable=mappable, chips=chips, table=table, strict=strict,
                )  # fmt: skip

            return replace(by(LIF, chips, strict), layer_by_layer=by(route, None, False))
    if not isinstance(route, str) or route not in ROUTES:
        raise ValueError(f"route {quoted(route)} is unknown; known: {', '.join(ROUTES)}")
    where = Where(found, route, table or Table())
    check_ready(module)
    _refuse_non_finite(module)
    settings = (example_inputs, where, tokens, mappable, chips)
    if route == LIF or not convertible(module):
        return _analysed(module, *settings, strict)
    try:
        twin, layers = prepare_named(module, example_inputs)
    except TransformError as error:
        return replace(_analysed(module, *settings, strict), preparation=Preparation({}, None, str(error)))
    if not layers:
        return _analysed(module, *settings, strict)
    after = _analysed(twin, *settings, strict)
    before = _analysed(module, example_inputs, where, tokens, mappable, None, False)
    return replace(before, preparation=Preparation(layers, after))


def _analysed(
    module: nn.Module,
    example_inputs: Example,
    where: Where,
    tokens: int | None,
    mappable: Callable[[str, nn.Linear], bool] | None,
    chips: int | None,
    strict: bool,
) -> CompatibilityReport:
    """The report of the module as it is."""
    route = where.route
    traced = _grouped(module, trace(module, example_inputs))
    if route == LIF:
        neurons = spiking_layers(module)
        report = spiking_report(module, traced, where, neurons, mappable=mappable, tokens=tokens, chips=chips)
        if strict and not report.mapped:
            raise NothingToMap(_nothing(module, where, list(report.operations)))
        return report
    fitter = Fitter(where.chip, graded=ROUTES[route]) if where.takes_route and where.chip.budgets else None
    linears, fits = _linear_calls(module, traced, where, fitter, mappable)
    convolutions, refused = convolution_calls(module, traced, where, fitter, mappable, fits)
    calls = dict(sorted({**linears, **convolutions}.items()))
    modules = dict(module.named_modules())
    chains = find_chains(traced, calls, modules, signed=ROUTES[route]) if convolutions else ()
    chained = {name for chain in chains for name in chain.modules}
    pairs = disjoint(
        pair
        for pair in find_pairs(module, traced, linears)
        if pair.activation in PAIRS_OF[route]
        and (route == "graded" or not pair.threshold)
        and not {pair.fc1, pair.fc2} & chained
    )
    counted = [op for op in traced.ops if _counts_tokens(op)] or [traced.ops[index] for index in convolutions]
    rows = row_count(counted, tokens)
    operations = _operations(module, traced, calls, fits, refused, pairs, chains, rows, where)
    mapped = tuple(dict.fromkeys(calls.values()))
    if strict and not mapped:
        raise NothingToMap(_nothing(module, where, operations))
    if chips is not None and mapped:
        placed_together(module, traced, calls, where, chips)
    seen_rows: Counter[str] = Counter()
    for index, name in calls.items():
        seen_rows[name] += rows_of(traced.ops[index])
    crossings, crossing_bytes = crossings_of(module, traced, calls, pairs, chains, rows)
    return CompatibilityReport(
        chip=where.chip.name,
        traced=traced.complete,
        note=traced.note,
        tokens=rows,
        operations=tuple(operations),
        mapped=mapped,
        pairs=pairs,
        chains=chains,
        rows_per_token=tuple((name, seen_rows[name] / rows) for name in mapped),
        unused_parameters=unused_parameters(module, traced),
        tied=_tied(module, mapped),
        total_parameters=sum(p.numel() for p in module.parameters()),
        crossings_per_token=crossings,
        crossing_bytes_per_token=crossing_bytes,
        route=route,
        cores=sum(fits[name].cores for name in mapped if name in fits),
        cores_per_chip=where.chip.cores,
    )


def _chip(chip: str | Path | Chip) -> Chip:
    if isinstance(chip, Chip):
        return chip
    try:
        return _shipped(chip) if chip in list_chips() else load_chip(chip)
    except FileNotFoundError as error:
        raise ValueError(
            f"chip {quoted(str(chip))} is unknown; known: {', '.join(list_chips())}, or the path of a chip file"
        ) from error


@cache
def _shipped(name: str) -> Chip:
    return load_chip(name)


def _nothing(module: nn.Module, where: Where, operations: list[Operation]) -> str:
    seen = Counter(op.kind for op in operations)
    kinds = listed(f"{count} x {kind}" for kind, count in seen.items()) or "no operation at all"
    limits = dict.fromkeys(f"{op.name}: {op.limit_text}" for op in operations if op.kind == "linear" and op.limit)
    return (
        f"{type(module).__name__} has nothing that the {where.route} route can map to {where.chip.name}. Seen: {kinds}. "
        + (f"Limits: {'; '.join(list(limits)[:3])}. " if limits else "")
        + "Needed: at least one nn.Linear, nn.Conv1d or nn.Conv2d that forward calls as a module. "
        + " ".join(dict.fromkeys(op.remedy for op in operations if op.remedy))
    ).rstrip()


def _refuse_non_finite(module: nn.Module) -> None:
    open_ended = {id(gate.raw) for gate in module.modules() if isinstance(gate, EventThreshold)}  # -inf: never drops
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and name.endswith(("weight", "bias")) | isinstance(value, nn.Parameter):
            wrong = torch.isnan(value) if id(value) in open_ended else ~torch.isfinite(value)
            bad = int(wrong.sum())
            if bad:
                raise ValueError(
                    f"parameter {quoted(name)} holds {bad} NaN or infinite values of {value.numel()}; integers cannot be "
                    "made of them. Load an intact checkpoint, or look for a diverged training run."
                )


def _grouped(module: nn.Module, traced: Trace) -> Trace:
    """The trace with registered layers, norms and activations of other packages as one operation each.

    A module that holds nn.Linear layers is looked into instead.
    """
    modules = dict(module.named_modules())
    targets = {
        name: target
        for name, part in modules.items()
        if (target := _target(part))
        and (spiking_neurons(part) is not None or not any(isinstance(inner, nn.Linear) for inner in part.modules()))
    }
    if not traced.complete:
        owner = {
            op.module: next((name for name in _outwards(op.module) if name in targets), op.module) for op in traced.ops
        }
        named = (replace(op, module=owner[op.module], target=targets.get(owner[op.module], op.target)) for op in traced.ops)
        return replace(traced, ops=tuple(named))

    calls = [next((call for call in op.stack if strip_calls(call) in targets), None) for op in traced.ops]
    turns = numbered(calls)  # the export does not tell the calls of a loop over time apart

    def group(op: TracedOp) -> tuple[str, str] | None:
        call = calls[op.index]
        if call is None:
            return None
        again = spiking_neurons(modules[strip_calls(call)]) is not None
        return (f"{call}@{turns[op.index]}" if again else call, targets[strip_calls(call)])

    return contracted(traced, group)


def _outwards(path: str) -> Iterator[str]:
    """The path and those of the modules around it, the innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _target(part: nn.Module) -> str:
    """What a module is called when it is taken as one operation, or "" where it is looked into."""
    name = type(part).__name__
    if _known(part) is not None:
        return name
    if type(part).__module__.startswith("torch.nn."):
        return ""
    if name.endswith("RMSNorm"):
        return "RMSNorm"
    return "LayerNorm" if name.endswith("LayerNorm") else ACTIVATION_CLASSES.get(name, "")


def _known(part: nn.Module) -> LayerRule | None:
    """The rule of a registered layer, or of a layer of spiking neurons."""
    neurons = spiking_neurons(part)
    return layer_rule(part) or (None if neurons is None else neurons.elsewhere())


def _counts_tokens(op: TracedOp) -> bool:
    return is_matrix(op) or (bool(op.weights) and any(part.target in ("addmm", "mm", "matmul") for part in op.parts))


def _linear_calls(
    module: nn.Module,
    traced: Trace,
    where: Where,
    fitter: Fitter | None,
    mappable: Callable[[str, nn.Linear], bool] | None,
) -> tuple[dict[int, str], dict[str, Fit]]:
    """Index of the operation -> name of the nn.Linear that runs it, for those that go to the chip; what each needs."""
    modules = dict(module.named_modules())
    parameters = dict(module.named_parameters(remove_duplicate=False))
    company = Counter(op.module for op in traced.ops if op.target not in LINEARS)
    calls: dict[int, str] = {}
    fits: dict[str, Fit] = {}
    if not where.takes_route:
        return calls, fits
    for op in traced.ops:
        owner = modules.get(op.module)
        if op.target not in LINEARS or not isinstance(owner, nn.Linear):
            continue
        owns = any(parameters.get(name) is owner.weight for name in op.weights)
        if traced.complete and (company[op.module] or not owns):
            continue  # a subclass that computes more than its linear product: replacing it would drop the rest
        if not owner.weight.is_floating_point():
            continue
        if mappable is None or mappable(op.module, owner):
            if fitter is not None:
                fits[op.module] = fitter.linear(owner.in_features, owner.out_features)
            if op.module not in fits or fits[op.module].fits:
                calls[op.index] = op.module
    return calls, fits


def _operations(
    module: nn.Module,
    traced: Trace,
    calls: Mapping[int, str],
    fits: Mapping[str, Fit],
    refused: Mapping[int, str],
    pairs: tuple[MlpPair, ...],
    chains: tuple[Chain, ...],
    rows: int,
    where: Where,
) -> list[Operation]:
    state = {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }
    modules = dict(module.named_modules())
    inside = inside_pairs(traced, calls, pairs)
    chained = {index for chain in chains for index in chain.operations}
    kept = "kept by mappable(), or its module computes more than the product"
    reparametrised = "its weight is computed anew at every call (parametrization)"
    rules = []
    for op in traced.ops:
        owner = modules.get(op.module)
        whole = bool(op.parts) or not traced.complete
        rules.append(
            rules_for(
                op,
                where,
                mapped=op.index in calls,
                in_pair=inside.get(op.index, ""),
                in_chain=op.index in chained,
                kept_because=refused.get(op.index, "")
                or ("" if not isinstance(owner, nn.Linear) else reparametrised if is_parametrized(owner) else kept),
                fit=fits.get(op.module) if op.target in LINEARS | CONVOLUTIONS else None,
                layer=_known(owner) if whole and owner is not None and op.target == type(owner).__name__ else None,
            )
        )
    # A parameter read by several operations counts where it reaches the chip, else at the first.
    holders: dict[int, int] = {}
    for op, _ in sorted(zip(traced.ops, rules, strict=True), key=lambda pair: pair[1][0].runs_on != "chip"):
        for name in op.weights:
            if isinstance(state.get(name), nn.Parameter):
                holders.setdefault(id(state[name]), op.index)
    placed: set[tuple[str, int]] = set()
    operations = []
    for op, found in zip(traced.ops, rules, strict=True):
        weights = {id(w): w for w in (state.get(n) for n in op.weights) if isinstance(w, nn.Parameter)}
        for position, rule in enumerate(found):
            parameters = size = 0
            for key, weight in weights.items() if position == 0 else ():
                if holders[key] == op.index:
                    parameters += weight.numel()
                if (rule.runs_on, key) not in placed:
                    placed.add((rule.runs_on, key))
                    size += weight.numel() * (1 if rule.runs_on == "chip" else weight.element_size())
            operations.append(operation_of(op, rule, rows, parameters, size, where))
    return operations + _not_attributed(traced, rows, where)


def _not_attributed(traced: Trace, rows: int, where: Where) -> list[Operation]:
    """The row of an incomplete trace for what ran outside its leaf modules."""
    rest = (traced.total_macs - sum(op.leaf_macs or 0 for op in traced.ops)) / rows
    if traced.complete or rest <= 1e-9:
        return []
    reason = "products that ran between the leaf modules, not seen one by one"
    return [Operation("(functional)", "not attributed", "host", "host", reason, "", rest, 0, 0, where.chip.name)]


def _tied(module: nn.Module, mapped: tuple[str, ...]) -> tuple[str, ...]:
    """Parameters of mapped modules that another module holds as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    prefixes = {f"{name}." for name in mapped}
    return tuple(
        " = ".join(names)
        for names in owners.values()
        if len(names) > 1 and any(n.rpartition(".")[0] + "." in prefixes for n in names)
    )
