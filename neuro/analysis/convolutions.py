"""Which convolutions of a trace can leave the host, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hardware.text import quoted
from neuro.analysis.fit import Fit, Fitter
from neuro.analysis.rules import CONVOLUTIONS, Where
from neuro.analysis.tracing import Trace, TracedOp


def convolution_calls(
    module: nn.Module,
    traced: Trace,
    where: Where,
    fitter: Fitter | None,
    mappable: Callable[[str, nn.Linear], bool] | None,
    fits: dict[str, Fit],
) -> tuple[dict[int, str], dict[int, str]]:
    """Index of the operation -> name of the nn.Conv1d or nn.Conv2d that runs it, for those that go to the chip; and index
    -> reason for those that do not. What each needs of the chip is added to `fits`.
    """
    calls: dict[int, str] = {}
    refused: dict[int, str] = {}
    if not where.takes_route:
        return calls, refused
    modules = dict(module.named_modules())
    company = {op.module for op in traced.ops if op.target not in CONVOLUTIONS}
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for op in traced.ops:
        if op.target in CONVOLUTIONS:
            shapes.setdefault(op.module, set()).add(op.in_shapes[0][1:])
    for op in traced.ops:
        layer = modules.get(op.module)
        if op.target not in CONVOLUTIONS or not isinstance(layer, nn.Conv1d | nn.Conv2d):
            continue
        reason = _reason(module, traced, op, layer, op.module in company, len(shapes[op.module]))
        if not reason and mappable is not None and not mappable(op.module, layer):  # type: ignore[arg-type]
            reason = "kept by mappable()"
        if reason:
            refused[op.index] = reason
            continue
        if fitter is not None:
            fits[op.module] = fitter.convolution(layer, op.in_shapes[0][1:])
        if op.module not in fits or fits[op.module].fits:
            calls[op.index] = op.module
    return calls, refused


def _reason(
    module: nn.Module, traced: Trace, op: TracedOp, layer: nn.Conv1d | nn.Conv2d, company: bool, shapes: int
) -> str:
    """Why a layer stays on the host, "" where it need not."""
    if layer.padding_mode != "zeros":
        return f"padding_mode {quoted(layer.padding_mode)}: a graph's convolution pads with zeros only"
    if is_parametrized(layer):
        return "its weight is computed anew at every call (parametrization)"
    parameters = dict(module.named_parameters(remove_duplicate=False))
    owns = any(parameters.get(name) is layer.weight for name in op.weights)
    if traced.complete and (company or not owns):
        return "its module computes more than the convolution"
    if not layer.weight.is_floating_point():
        return "its weights are no floating-point numbers"
    if len(op.in_shapes[0]) != layer.weight.dim():
        return "its input has no batch dimension; a sample is a time step, so one is needed"
    if shapes > 1:
        return "it is called on samples of several shapes, and a graph has one"
    return ""
