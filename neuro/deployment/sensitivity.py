"""Which layer hurts: the error of every mapped layer, and the loss when one segment at a time is converted.

for error in layer_errors(model, plan, batches): print(error.layer, error.relative_rms)
for found in one_at_a_time(model, plan, loss_fn): print(found.segment, found.delta_nats)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import listed, quoted
from neuro.analysis.preparation import prepared_copy
from neuro.analysis.tracing import Example, evaluating, split_example
from neuro.conversion.plan import HostWork, Plan, Segment
from neuro.deployment.deployed import Deployed, deploy

LossFn = Callable[[nn.Module], float]


@dataclass(frozen=True)
class LayerError:
    """Error of one segment's output, and what it sent, over the given batches.

    `layer`: its last linear layer. `relative_rms`: root of sum |y - y_float|^2 / sum |y_float|^2 where every layer before
    is converted too; `own_relative_rms`: the same where the segment gets the float model's own inputs. `rows`: rows
    compared; `events_per_row`, `synops_per_row`: what the segment's graph sent and did for a row of the first kind, None
    on a backend without events.
    """

    segment: str
    layer: str
    rows: int
    relative_rms: float
    own_relative_rms: float
    events_per_row: float | None
    synops_per_row: float | None


@dataclass(frozen=True)
class SegmentLoss:
    """Loss with only this segment converted, in nats as `loss_fn` gives it, and its difference from the float model's.

    `mac_share`: the segment's part of all mapped multiply-accumulates.
    """

    segment: str
    layers: tuple[str, ...]
    loss_nats: float
    delta_nats: float
    mac_share: float


def part_of(plan: Plan, names: Collection[str]) -> Plan:
    """The plan with only the named segments; the layers of the others are listed with the host's work.

    Raises ValueError for a name the plan does not have, or none at all.
    """
    known = [s.name for s in plan.segments]
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise ValueError(f"the plan has no segment {quoted(missing[0] if missing else '')}; it has: {listed(known)}")
    kept = tuple(s for s in plan.segments if s.name in names)
    stays = tuple(work for s in plan.segments if s.name not in names for work in _host_work(s))
    return replace(plan, segments=kept, host=(*plan.host, *stays))


def macs_per_token(segment: Segment) -> float:
    """Dense multiply-accumulates of a segment's linear layers per token."""
    return float(segment.rows_per_token * sum(segment.macs))


def _host_work(segment: Segment) -> list[HostWork]:
    """Its layers as the host runs them, with float32 weights."""
    return [
        HostWork(layer, "convolution" if segment.stages else "linear", segment.rows_per_token * macs, 4 * weights)
        for layer, macs, weights in zip(segment.modules, segment.macs, segment.weight_counts, strict=True)
    ]


def one_at_a_time(module: nn.Module, plan: Plan, loss_fn: LossFn, backend: str = "quantised") -> tuple[SegmentLoss, ...]:
    """Convert each segment alone and measure.

    Args:
        module: the float module that `plan` was made from; not changed.
        plan: of any route.
        loss_fn: gives the loss of a module in nats; called once for the float module and once per segment. Use training
            text where the result decides on settings.
        backend: of `deploy`.

    Returns:
        one record per segment, in the plan's order.
    """
    with evaluating(module):
        baseline = float(loss_fn(module))
    total = sum(macs_per_token(s) for s in plan.segments)
    found = []
    for segment in plan.segments:
        loss = float(loss_fn(deploy(module, part_of(plan, (segment.name,)), backend)))
        share = macs_per_token(segment) / total
        found.append(SegmentLoss(segment.name, segment.modules, loss, loss - baseline, share))
    return tuple(found)


def layer_errors(
    module: nn.Module, plan: Plan, batches: Iterable[Example], backend: str = "fixed_point"
) -> tuple[LayerError, ...]:
    """Compare every segment's output with the float layer's on the same batches.

    Args:
        module: the float module that `plan` was made from; not changed.
        plan: of any route; segments whose runners keep state between tokens are run in the order of the batches.
        batches: what forward takes, each a tensor, a tuple of arguments or a dict of keyword arguments.
        backend: of `deploy`.

    Raises:
        ValueError: no batch, or a batch that a segment sees in another number of calls than the float layer.
    """
    module = prepared_copy(module, plan.prepared) if plan.prepared else module
    together, alone = deploy(module, plan, backend), deploy(module, plan, backend)
    sums = {s.name: torch.zeros(3, dtype=torch.float64) for s in plan.segments}
    rows = dict.fromkeys(sums, 0)
    seen = 0
    for seen, batch in enumerate(batches, start=1):
        args, kwargs = split_example(batch)
        with evaluating(module):
            inputs, wanted = _recorded(module, plan.segments, args, kwargs)
        _, got = _recorded(together, plan.segments, args, kwargs, prefix="module.")
        for s in plan.segments:
            if len(got[s.name]) != len(wanted[s.name]):
                raise ValueError(
                    f"segment {quoted(s.name)}: the deployed model called it {len(got[s.name])} times, the float model "
                    f"{len(wanted[s.name])} times on batch {seen - 1}"
                )
            for x, y, z in zip(inputs[s.name], wanted[s.name], got[s.name], strict=True):
                own = _alone(alone, s, x)
                parts = [(z - y).double().square().sum(), (own - y).double().square().sum(), y.double().square().sum()]
                sums[s.name] += torch.stack(parts).cpu()
                rows[s.name] += y.numel() // y.shape[-1]
    if not seen:
        raise ValueError("no batch to compare on; pass at least one")
    counted = {c.layer: c for c in together.counts()}
    return tuple(_error(s, sums[s.name], rows[s.name], counted) for s in plan.segments)


def _error(segment: Segment, sums: Tensor, rows: int, counted: dict[str, Any]) -> LayerError:
    error, own, size = sums.tolist()
    mine = [
        c
        for name, c in counted.items()
        if set(name.split(" + ")) & set(segment.modules) or name == f"{segment.modules[0]}:square"
    ]
    events = bool(mine) and not any(c.host for c in mine)
    return LayerError(
        segment=segment.name,
        layer=segment.modules[-1],
        rows=rows,
        relative_rms=(error / size) ** 0.5 if size else float("nan"),
        own_relative_rms=(own / size) ** 0.5 if size else float("nan"),
        events_per_row=sum(c.events for c in mine) / rows if events and rows else None,
        synops_per_row=sum(c.synops for c in mine) / rows if events and rows else None,
    )


def _alone(deployed: Deployed, segment: Segment, x: Tensor) -> Tensor:
    """The segment's own answer to an input, whatever stands around it."""
    first = deployed.module.get_submodule(segment.modules[0]) if segment.modules[0] else deployed.module
    with torch.no_grad():
        out: Tensor = first.runner.run(x)[0]  # type: ignore[union-attr, operator]
    return out


def _recorded(
    module: nn.Module, segments: tuple[Segment, ...], args: Any, kwargs: Any, prefix: str = ""
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Inputs of every segment's first layer and outputs of its last, one per call, from one forward pass."""
    inputs: dict[str, list[Tensor]] = {s.name: [] for s in segments}
    outputs: dict[str, list[Tensor]] = {s.name: [] for s in segments}

    def keep(store: list[Tensor], side: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], result: Tensor) -> None:
            first = given[0] if given else named["input"]
            store.append((first if side == 0 else result).detach())

        return hook

    handles = []
    for s in segments:
        for side, name, store in ((0, s.modules[0], inputs[s.name]), (1, s.modules[-1], outputs[s.name])):
            part = module.get_submodule(f"{prefix}{name}".rstrip("."))
            handles.append(part.register_forward_hook(keep(store, side), with_kwargs=True))
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs
