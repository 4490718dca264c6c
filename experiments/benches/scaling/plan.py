"""What is planned to 10,000 GPUs, and the published tables that the plan is held against before it says anything."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hardware.clusters.choose import Planned, fastest
from hardware.clusters.gating import GatedStep, GatePlan, break_even_keep, plan_gated
from hardware.clusters.layout import LayoutError
from hardware.clusters.machines import ENDS, Machine, load_machine
from hardware.clusters.published import Table, compare, load_table, tables
from hardware.clusters.shapes import load_shape

MODELS = {
    "gpt2-124m": (1024, 2**19),
    "mpt-1b": (2048, 2**21),
    "llama3-8b": (8192, 2**22),
    "llama3-70b": (8192, 2**23),
    "llama3-405b": (8192, 2**24),
}
"""Model -> (tokens of a window, tokens of a step); the latter grows where every rank is offered at least four windows."""
GPUS = (8, 64, 512, 1024, 4096, 10_000)
MOST_TOKENS = 2**24
"""Largest step that is planned where a layout stays below it: Llama 3's batch of 16 M tokens."""
KEEPS = (0.75, 0.5, 0.25)
GATES = {
    "windows": GatePlan("windows", scoring="shared"),
    "windows, scored apart": GatePlan("windows", scoring="separate"),
    "windows, scores known": GatePlan("windows", scoring="free"),
    "tokens": GatePlan("tokens", scoring="shared"),
    "weight blocks": GatePlan("blocks"),
}
LEAST = 0.01
"""A gate that saves less than this of a step does not pay."""
Entry = dict[str, Any]


def reproduced(names: Iterable[str] | None = None) -> list[tuple[Table, Entry]]:
    """Every published table with what the plan makes of it: errors of the middle, and how many rows lie inside."""
    found = []
    for name in names if names is not None else tables():
        table = load_table(name)
        rows = compare(table)
        errors = [row.error for row in rows]
        worst = max(rows, key=lambda row: abs(row.error))
        entry: Entry = {
            "role": table.role,
            "machine": table.machine.name,
            "rows": len(rows),
            "median_error": round(statistics.median(errors), 3),
            "mean_absolute_error": round(statistics.mean(map(abs, errors)), 3),
            "worst_error": round(worst.error, 3),
            "worst_row": f"{worst.row.shape.name} on {worst.row.layout.gpus}",
            "inside": sum(row.inside for row in rows),
        }
        found.append((table, entry))
    return found


def planned(
    machine: Machine, models: Sequence[str] = tuple(MODELS), gpus: Sequence[int] = GPUS
) -> Iterator[tuple[str, int, Planned | None, str]]:
    """(model, GPUs, the fastest layout or None, why there is none)."""
    for model in models:
        sequence, batch = MODELS[model]
        for count in gpus:
            try:
                yield model, count, fastest(load_shape(model), machine, count, sequence, batch, MOST_TOKENS), ""
            except LayoutError as error:
                yield model, count, None, str(error)


def ends(values: dict[Any, float], digits: int = 4) -> list[float]:
    """[low, mid, high], rounded to significant digits."""
    return [float(f"{values[end]:.{digits}g}") for end in ENDS]


def gated(plan: Planned, gate: GatePlan) -> GatedStep:
    """The gate on a planned step; a window of its is a window of the step."""
    step = plan.step
    return plan_gated(step.shape, step.machine, step.layout, replace(gate, window=step.layout.sequence), step)


def entry(model: str, count: int, plan: Planned | None, reason: str) -> Entry:
    """Everything that is planned of one model on so many GPUs, for the document."""
    found: Entry = {"model": model, "gpus": count}
    if plan is None:
        return found | {"fits": False, "reason": reason}
    step, layout = plan.step, plan.step.layout
    found |= {
        "fits": True,
        "layout": {key: getattr(layout, key) for key in ("mesh", "tensor", "pipeline", "recompute", "micro_batch",
                                                         "accumulation", "data")},
        "step_tokens": layout.step_tokens,
        "memory_gb": round(plan.memory.total / 1e9, 1),
        "step_s": ends(step.step_s),
        "communication_s": ends(step.communication_s),
        "tokens_per_s_gpu": [round(step.tokens_per_s_gpu(end)) for end in reversed(ENDS)],
        "mfu": [round(step.mfu(end), 3) for end in reversed(ENDS)],
        "sent_bytes": {name: float(f"{value:.4g}") for name, value in step.sent_bytes.items()},
        "gates": {},
    }  # fmt: skip
    for name, gate in GATES.items():
        each = {str(keep): gated(plan, replace(gate, keep=keep)) for keep in KEEPS}
        half = each["0.5"]
        tree = gated(plan, replace(gate, keep=0.5, reduce=True))
        window = replace(gate, window=layout.sequence)
        found["gates"][name] = {
            "bytes": float(f"{half.communication_bytes:.4g}"),
            "seconds": ends(half.communication_s),
            "share_of_step": ends(half.gate_share),
            "share_of_step_by_tree": ends(tree.gate_share),
            "step_over_dense": {keep: ends(one.per_offered_token) for keep, one in each.items()},
            "per_kept_token": {keep: ends(one.per_kept_token) for keep, one in each.items()},
            "largest_keep_that_saves": break_even_keep(step.shape, step.machine, layout, window, LEAST),
        }
    return found


def headline(found: Entry) -> Entry:
    """The short form of an entry, for the last line of the command."""
    if not found["fits"]:
        return {"model": found["model"], "gpus": found["gpus"], "fits": False}
    windows = found["gates"]["windows"]
    return {
        "model": found["model"],
        "gpus": found["gpus"],
        "mfu": found["mfu"],
        "gate_share": windows["share_of_step"][1],
        "half": windows["step_over_dense"]["0.5"][1],
    }


def table_lines(tables_found: Sequence[tuple[Table, Entry]]) -> list[str]:
    """The published tables, for people."""
    lines = [f"{'published table':<22} {'role':<12} {'rows':>4} {'median':>8} {'mean |e|':>9} {'worst':>8}  inside"]
    for table, found in tables_found:
        lines.append(
            f"{table.name:<22} {found['role']:<12} {found['rows']:>4} {found['median_error']:>+8.1%} "
            f"{found['mean_absolute_error']:>9.1%} {found['worst_error']:>+8.1%}  {found['inside']}/{found['rows']}"
        )
    lines.append("errors: tokens per second at the plan's middle over the published ones, less one")
    return lines


def plan_lines(entries: Sequence[Entry]) -> list[str]:
    """The plan, for people: one line for each model and number of GPUs."""
    head = (
        f"{'model':<12} {'GPUs':>6} {'layout':<26} {'GB':>5} {'Mtok':>6} {'step s':>7} {'MFU low..mid..high':>19} "
        f"{'gate %':>7} {'tree %':>7} {'half':>5} {'blocks':>6} {'pays to':>7}"
    )
    lines = [head]
    for found in entries:
        if not found["fits"]:
            lines.append(f"{found['model']:<12} {found['gpus']:>6} does not fit in any layout")
            continue
        layout, windows, blocks = found["layout"], found["gates"]["windows"], found["gates"]["weight blocks"]
        shape = f"{layout['mesh']} t{layout['tensor']} p{layout['pipeline']} d{layout['data']} {layout['recompute']}"
        mfu = "..".join(f"{100 * value:.0f}" for value in found["mfu"])
        pays = windows["largest_keep_that_saves"]
        lines.append(
            f"{found['model']:<12} {found['gpus']:>6} {shape:<26} {found['memory_gb']:>5.0f} "
            f"{found['step_tokens'] / 1e6:>6.2f} {found['step_s'][1]:>7.3f} {mfu:>19} "
            f"{100 * windows['share_of_step'][1]:>7.3f} {100 * windows['share_of_step_by_tree'][1]:>7.3f} "
            f"{windows['step_over_dense']['0.5'][1]:>5.2f} {blocks['step_over_dense']['0.5'][1]:>6.2f} "
            f"{'never' if pays is None else f'{pays:.2f}':>7}"
        )
    lines += [
        "layout: mesh, t tensor, p pipeline, d data ranks, recomputation; GB of memory a rank; tokens of a step",
        "gate %: the gate's own communication over a step that keeps half of its windows, by a ring; tree %: by all-reduce",
        "half, blocks: a step that keeps half of the windows, of the weight blocks, over the dense step of the same tokens",
        f"pays to: the largest share of windows at which a step is at least {LEAST:.0%} shorter than the dense one",
    ]
    return lines


def machine_named(name: str) -> Machine:
    """The machine to plan for. Raises FileNotFoundError naming the shipped ones, DataFileError for a damaged file."""
    return load_machine(name)
