"""From a trace: rows, rows of the table, transfers between host and chip, the placement of all mapped layers together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from hardware.placement import LayerDemand
from neuro.analysis.chains import Chain
from neuro.analysis.fit import Fitter
from neuro.analysis.report import MlpPair, Operation
from neuro.analysis.rules import CONVOLUTIONS, ROUTES, Rule, Where
from neuro.analysis.tracing import Trace, TracedOp

OUTPUT_BYTES = 2  # a graded payload of 16 bits back to the host; inputs are 1 byte


def rows_of(op: TracedOp) -> int:
    """Rows of a linear operation (product of its output's leading dimensions), samples of a convolution."""
    if op.target in CONVOLUTIONS:
        return op.out_shape[0] if op.out_shape else 1
    return math.prod(op.out_shape[:-1]) if op.out_shape else 1


def row_count(ops: Iterable[TracedOp], given: int | None) -> int:
    """Rows that the example stands for: those given, else of the operation that has most, 1 where there is none.

    Raises:
        ValueError: an example without rows.
    """
    rows = given or max((rows_of(op) for op in ops), default=1)
    if rows < 1:
        raise ValueError("the example inputs hold no row, and all figures are per row; pass a batch that is not empty")
    return rows


def unused_parameters(module: nn.Module, traced: Trace) -> tuple[str, ...]:
    """Names of the parameters that no operation reads, under any of their names."""
    names = dict(module.named_parameters(remove_duplicate=False))
    read = {id(names[name]) for op in traced.ops for name in op.weights if name in names}
    return tuple(name for name, parameter in module.named_parameters() if id(parameter) not in read)


def operation_of(op: TracedOp, rule: Rule, rows: int, parameters: int, size: int, where: Where) -> Operation:
    """The row of the table that a rule gives an operation.

    Args:
        op, rule: what was seen, and what becomes of it.
        rows: of the example, which products are divided by.
        parameters, size: values and bytes that count for this operation.
        where: chip and route.
    """
    return Operation(
        name=op.module or "(root)",
        kind=rule.kind,
        verdict=rule.verdict,
        runs_on=rule.runs_on,
        reason=rule.reason,
        remedy=rule.remedy,
        macs_per_token=(rule.macs(op) if op.leaf_macs is None or rule.unseen else op.leaf_macs) / rows,
        parameters=parameters,
        bytes=size,
        chip=where.chip.name,
        error_bound=rule.error_bound,
        bound_of=rule.bound_of,
        limit=rule.limit,
        need=rule.need,
        have=rule.have,
        cores=rule.cores,
    )


def _widths(module: nn.Module, name: str) -> tuple[int, int]:
    layer = module.get_submodule(name)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def crossings_of(
    module: nn.Module,
    traced: Trace,
    calls: Mapping[int, str],
    pairs: tuple[MlpPair, ...],
    chains: tuple[Chain, ...],
    rows: int,
) -> tuple[float, float]:
    """Transfers host -> chip and chip -> host per token, and their bytes (int8 in, 16-bit payloads out)."""
    seconds = {pair.fc2 for pair in pairs} | {name for chain in chains for name in chain.modules[1:]}
    last_of = {pair.fc1: pair.fc2 for pair in pairs}
    first_of = {chain.modules[0]: chain for chain in chains}
    count = size = 0.0
    for index, name in calls.items():
        if name in seconds:
            continue
        times = rows_of(traced.ops[index]) / rows
        count += 2 * times
        if name in first_of:
            chain = first_of[name]
            out = sum(math.prod(chain.stages[number].shape) for number in chain.outputs)
            size += times * (math.prod(chain.shape) + OUTPUT_BYTES * out)
        else:
            size += times * (_widths(module, name)[0] + OUTPUT_BYTES * _widths(module, last_of.get(name, name))[1])
    return count, size


def placed_together(module: nn.Module, traced: Trace, calls: Mapping[int, str], where: Where, chips: int) -> None:
    """Raises DoesNotFit where all mapped layers, side by side, need more than so many chips."""
    modules = dict(module.named_modules())
    fitter = Fitter(where.chip, graded=ROUTES[where.route])
    demands: list[LayerDemand] = []
    for index, name in {name: (index, name) for index, name in calls.items()}.values():
        layer, label = modules[name], name or "(root)"
        if isinstance(layer, nn.Linear):
            demands += fitter.demands(label, layer.in_features, layer.out_features)
        else:
            demands += fitter.convolution_demands(label, layer, traced.ops[index].in_shapes[0][1:])
    fitter.together(demands, chips)
