"""`spikegate bench clock_fit`: prices of counted work out of what `bench clock` measured.

The prices are a least-squares fit, none of them negative, to the times of all measured steps, each weighed by its own time.
Counts that the steps do not tell apart are held near a first guess (`GUESS_PS`) with a small weight. A factor for every
kind of sparse step is the largest ratio of measured to priced time, both over the plain step's: no kind looks cheaper than
it was measured to be. The table that it prints says how well the prices predict each measured step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from experiments.benches.clock import Timed, steps
from experiments.benches.gate import load_model
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from sparse_update.clock.shipped import SCHEMA, ShippedTable, read_table
from sparse_update.clock.work import ALL, kinds, work_of
from sparse_update.transformer import ModelConfig
from sparse_update.weights.settings import OptimConfig

GUESS_PS: dict[str, float] = {
    "forward_flops": 13, "dx_flops": 13, "dw_flops": 11, "muon_flops": 15,
    "forward_scores": 1500, "backward_scores": 1500, "forward_elements": 5000, "backward_elements": 8000,
    "forward_logits": 2000, "backward_logits": 1500, "forward_gathered": 500, "backward_gathered": 1000,
    "wanted_logits": 2000, "wanted_elements": 1000, "adamw_elements": 1500, "muon_elements": 1500, "sign_elements": 1000,
    "galore_elements": 1500, "galore_flops": 200, "tensors": 1e7, "muon_tensors": 2e8, "forward_gathers": 1e8,
    "backward_gathers": 2e8,
    "mask_tensors": 5e7, "mask_elements": 1000, "mask_products": 300, "step": 2e8, "layers": 2e8, "backward_layers": 3e8,
}  # fmt: skip
"""Picoseconds, by rule of thumb."""
SECOND = "dw_rows"
"""The kind that is measured alone and as a part of another."""
HOLD = 0.02
"""Weight of the guess against one measured step."""


@dataclass(frozen=True)
class Measured:
    """One measured step: setting, what it is, CPU milliseconds, ratio to the plain step and the ratio's interval."""

    setting: str
    cfg: ModelConfig
    timed: Timed
    ms: float
    ratio: float
    half_width: float


def read_measured(document: Mapping[str, Any]) -> Iterator[Measured]:
    """Every measured step; the plain one's milliseconds are the best tenth of its rounds."""
    for setting in document["settings"]:
        cfg = load_model(setting["model"], setting["vocab"])
        name = f"{setting['model']} b{setting['batch']} v{setting['vocab']}"
        base = float(np.quantile(setting["ms"]["plain"], 0.1))
        for timed in steps(cfg, setting["batch"], setting["which"], setting["attention"], setting["mode"] == "compiled"):
            if timed.name == "plain":
                yield Measured(name, cfg, timed, base, 1.0, 0.0)
                continue
            ratio, half = interval_of(setting["ratios"][timed.name], f"{name}, {timed.name}")
            yield Measured(name, cfg, timed, base * ratio, ratio, half)


def interval_of(found: Mapping[str, Any], what: str) -> tuple[float, float]:
    """A ratio that `bench clock` wrote, and half of its interval as a share of it.

    Raises:
        ValueError: there were too few rounds for an interval.
    """
    if found["low"] is None:
        raise ValueError(f"{what}: too few rounds for an interval; measure it again with a larger --limit-s")
    return float(found["typical"]), float(found["high"] - found["low"]) / 2 / float(found["typical"])


def fit_prices(measured: Sequence[Measured]) -> dict[str, float]:
    """Picoseconds per count; the steps of kinds that have a factor take part too."""
    rows, wanted = [], []
    for item in measured:
        work = work_of(item.cfg, item.timed.step, item.timed.optim)
        scale = 1 / (item.ms * 1e9)  # the row's share of its own time
        rows.append([work.get(name, 0.0) * GUESS_PS[name] * scale for name in ALL])
        wanted.append(1.0)
    for i in range(len(ALL)):
        rows.append([HOLD if j == i else 0.0 for j in range(len(ALL))])
        wanted.append(HOLD)
    found, _ = nnls(np.array(rows), np.array(wanted))
    return {name: float(f"{share * GUESS_PS[name]:.3g}") for name, share in zip(ALL, found, strict=True)}


def fit(
    document: Mapping[str, Any], beside: Mapping[str, Any], scoring: Mapping[str, Any], about: Mapping[str, Any], name: str
) -> ShippedTable:
    """The table. A step by autograd has the factor "plain". `beside`: settings that take no part in the prices, but in the
    factors."""
    measured = [m for m in read_measured(document) if "lora" not in m.timed.name]
    over = {m.setting: m.ratio for m in measured if m.timed.name == "engine"}
    engine = [  # other optimizers' steps were taken by autograd: what the engine would have taken for them
        m if m.timed.variant.startswith("engine") else replace(m, ms=m.ms + (over[m.setting] - 1) * m.ms / m.ratio)
        for m in measured
    ]
    table = ShippedTable(name, fit_prices(engine), {}, {}, 256, about, "")
    plain = [m.ms / (1000 * table.work_s(m.cfg, m.timed.step, m.timed.optim)) for m in measured if m.timed.name == "plain"]
    factors = {"plain": float(f"{statistics.median(plain):.3g}")}
    table = replace(table, factors={"eager": factors})
    for item in sorted([*read_measured(document), *read_measured(beside)], key=lambda m: len(kinds(m.cfg, m.timed.step))):
        found = [kind for kind in kinds(item.cfg, item.timed.step) if kind != SECOND]
        if SECOND in kinds(item.cfg, item.timed.step) and not found:
            found = [SECOND]
        if not found and item.timed.name == "engine":
            found = ["engine"]
        if not found:
            continue
        base = replace(item.timed, step=replace(item.timed.step, plan=type(item.timed.step.plan)(), active=None))
        priced = table.work_s(item.cfg, item.timed.step, item.timed.optim)
        priced *= factors[SECOND] if SECOND in kinds(item.cfg, item.timed.step) and found != [SECOND] else 1.0
        plain_s = factors["plain"] * table.work_s(item.cfg, base.step, base.optim)
        factors[found[0]] = max(factors.get(found[0], 0.0), float(f"{item.ratio * plain_s / priced:.3g}"))
    components: dict[str, float] = {}
    for rounds in scoring.values():
        for key, values in rounds.items():
            components[key] = max(components.get(key, 0.0), float(f"{np.quantile(values, 0.1):.3g}"))
    return replace(table, factors={"eager": factors, "compiled": factors}, components_ps=components)


def extended(table: ShippedTable, document: Mapping[str, Any]) -> ShippedTable:
    """The table with prices of the counts, and factors of the kinds of steps, that it lacks; what it has stays.

    The new prices are fitted to what the steps took beyond the plain one beside them, weighed by the intervals, then raised
    together until no step is priced more than 1 % below what it was measured to take.
    """
    measured = [item for item in read_measured(document) if item.timed.name != "plain"]
    work = [work_of(item.cfg, item.timed.step, item.timed.optim) for item in measured]
    new = sorted({name for found in work for name in found} - set(table.prices_ps))
    rows, beyond = [], []
    for item, found in zip(measured, work, strict=True):
        if set(new) & set(found):
            plain_ps = 1e12 * table.work_s(item.cfg, item.timed.step, OptimConfig(name=item.timed.optim.name))
            rows.append([found.get(name, 0.0) * GUESS_PS[name] / plain_ps / item.half_width for name in new])
            beyond.append((item.ratio - 1) / item.half_width)
    if rows:
        hold = HOLD * np.eye(len(new)) * np.abs(rows).max()
        share, _ = nnls(np.vstack((rows, hold)), np.concatenate((beyond, hold.sum(1))))
        wide = [item.half_width for item, found in zip(measured, work, strict=True) if set(new) & set(found)]
        priced = np.array(rows) @ share * wide
        least = np.array([0.99 * (1 + b * w) - 1 for b, w in zip(beyond, wide, strict=True)])
        share = share * max(1.0, float((least / priced).max()))
        prices = {name: float(f"{part * GUESS_PS[name]:.3g}") for name, part in zip(new, share, strict=True)}
        table = replace(table, prices_ps={**table.prices_ps, **prices})
    factors: dict[str, float] = {}
    for item in measured:
        if lacking := [kind for kind in kinds(item.cfg, item.timed.step) if kind not in table.factors["eager"]]:
            plain = replace(item.timed.step, plan=type(item.timed.step.plan)())
            plain = replace(plain, batch=plain.batch // item.timed.step.plan.bag, length=item.cfg.context)
            plain_s = table.factors["eager"]["plain"] * table.work_s(item.cfg, plain, item.timed.optim)
            needed = item.ratio * plain_s / table.work_s(item.cfg, item.timed.step, item.timed.optim)
            factors[lacking[0]] = max(factors.get(lacking[0], 0.0), float(f"{needed:.3g}"))
    return replace(table, factors={mode: {**found, **factors} for mode, found in table.factors.items()})


def check(table: ShippedTable, document: Mapping[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """(setting, step, measured ratio to the plain step, its half interval, priced ratio)."""
    found, plain = [], 1.0
    for item in read_measured(document):
        engine = item.timed.name == "engine"
        seconds = sum(table.step_s(item.cfg, item.timed.optim, item.timed.step, "eager", engine).values())
        if item.timed.name == "plain":
            plain = seconds
        found.append((item.setting, item.timed.name, item.ratio, item.half_width, seconds / plain))
    return found


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and print how well it predicts what was measured. Exit code 0."""
    parser = argparse.ArgumentParser(prog="spikegate bench clock_fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", type=Path, help="what `bench clock` wrote")
    parser.add_argument("scoring", type=Path, nargs="?", help="what `bench clock --scoring` wrote")
    parser.add_argument("--extend", type=Path, help="a table that gets what it lacks, from `steps` alone")
    parser.add_argument("--beside", type=Path, help="more settings, for the factors and the check alone")
    parser.add_argument("--out", type=Path, required=True, help="the table; its name is the file's")
    parser.add_argument("--about", type=json.loads, default={}, help="provenance, a JSON object")
    add_json_argument(parser)
    given = parser.parse_args(arguments)
    document = json.loads(given.steps.read_text())
    beside = json.loads(given.beside.read_text()) if given.beside else {"settings": []}
    known: list[Any] = []
    if given.extend:
        table = extended(read_table(given.extend), document)
        known = list(table.about["check"])
        table = replace(table, about={**table.about, **given.about})
    elif given.scoring:
        table = fit(document, beside, json.loads(given.scoring.read_text()), given.about, given.out.stem)
    else:
        parser.error("give what `bench clock --scoring` wrote, or --extend TABLE")
    rows = [
        [s["model"], s["vocab"], s["batch"], s["which"], name, *(round(number, 3) for number in interval_of(ratio, name))]
        for s in [*document["settings"], *beside["settings"]]
        for name, ratio in s["ratios"].items()
    ]
    table = replace(table, about={**table.about, "check": [*known, *rows]})
    content = {key: value for key, value in vars(table).items() if key != "sha256"}
    write_json(given.out, {"schema": SCHEMA, **content})
    table = read_table(given.out)
    for setting, name, ratio, half, priced in [*check(table, document), *check(table, beside)]:
        print(f"{setting:<16}{name:<16}{ratio:>7.3f} +-{half:>6.1%}{priced:>8.3f}{priced / ratio:>8.2f}")
    finish({"table": table.name, "sha256": table.sha256}, "bench-clock_fit", file=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
