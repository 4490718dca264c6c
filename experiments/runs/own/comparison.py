"""All arms and seeds of a task: one table of prices, one budget, a run each, and what may be said of them."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from experiments.compare import CompareConfig, compare
from experiments.runs.folder import read_json
from experiments.runs.hydra_app import ConfigError
from experiments.runs.lock import exclusive
from experiments.runs.own.run import TABLE, OwnRun, run_own, settings_of
from experiments.runs.plain_json import plain, write_json
from hardware.names import as_file_name
from hardware.text import short
from sparse_update.loop.records import TrainingDiverged
from sparse_update.nested import get_rng_state, set_rng_state
from sparse_update.own.arms import DENSE, OwnArm, arms_of
from sparse_update.own.loop import OwnTrainerConfig, pick
from sparse_update.own.measure import dense_step_s, measure
from sparse_update.own.prices import MEASURED, MODELLED, Prices, shipped_prices
from sparse_update.own.task import UserTask

PLAN = "sweep.json"
"""What was asked for, beside the runs; `compare` knows by it that tuning runs are no arms."""
TUNING_SEED = 1000
DEMONSTRATION = "one seed is a demonstration and proves nothing: three to five seeds make a result"


@dataclass
class Plan:
    """What `does_it_pay` was asked for, settled."""

    task: UserTask
    gates: Mapping[str, Any]
    seeds: Sequence[int]
    folder: Path
    stream: str
    module: str = ""
    budget_steps: int = 200
    budget_reference_s: float = 0.0
    clock: str = MEASURED
    learning_rates: Sequence[float] = ()
    trainer: OwnTrainerConfig = field(default_factory=OwnTrainerConfig)
    progress: bool = True
    tensorboard: bool = True


def does_all(plan: Plan) -> dict[str, Any]:
    """Run what is missing in the plan's folder, compare, and return the outcome (see `experiments.does_it_pay`).

    Raises ConfigError for a folder that holds another comparison, ValueError for a gate that leaves nothing out.
    """
    arms = arms_of(plan.gates)
    with exclusive(plan.folder, "comparison of arms"), _generators_kept():
        prices, budget = _settle(plan, arms)
        plan = replace(plan, trainer=replace(plan.trainer, budget_reference_s=budget))
        rate = _tuned(plan, prices)
        if rate is None:
            return {"status": "interrupted", "folder": str(plan.folder)}
        plan = replace(plan, trainer=replace(plan.trainer, learning_rate=rate))
        runs, failed = [], {}
        for seed in plan.seeds:
            for arm in arms:
                try:
                    result = _run(plan, arm, seed, prices, plan.folder / as_file_name(f"{arm.name}-s{seed}"), plan.stream)
                except TrainingDiverged as error:
                    failed[f"{arm.name}-s{seed}"] = str(error)
                    continue
                if result["status"] != "finished":
                    return {"status": "interrupted", "folder": str(plan.folder)}
                if not math.isfinite(float(result["loss_nats"])):
                    failed[f"{arm.name}-s{seed}"] = f"its held-out loss is {result['loss_nats']}"
                runs.append(result)
        return _conclude(plan, runs, failed, prices)


def table(plan: Plan, arms: Sequence[OwnArm], device: torch.device) -> Prices:
    """The table of prices that the plan asks for, measured now where it says so."""
    if plan.clock == MODELLED:
        return shipped_prices()
    if plan.clock == MEASURED:
        return measure(plan.task, arms, plan.seeds[0], device, lambda text: say(plan, text))
    return Prices.load(Path(plan.clock))


def _settle(plan: Plan, arms: Sequence[OwnArm]) -> tuple[Prices, float]:
    """The table and the budget in counted seconds: those of the folder where it has been begun."""
    note, place = plan.folder / PLAN, plan.folder / TABLE
    asked = plain(
        {
            "arms": {arm.name: settings_of(arm) for arm in arms},
            "budget": [plan.budget_steps, plan.budget_reference_s],
            "clock": plan.clock,
            "learning_rates": list(plan.learning_rates),
        }
    )
    if note.exists() and place.exists():
        before = read_json(note)
        differ = [key for key in asked if before.get(key) != asked[key]]
        if differ:
            raise ConfigError(
                f"{plan.folder} holds a comparison with other settings ({differ[0]} was {short(before.get(differ[0]))}, is "
                f"{short(asked[differ[0]])}): take another folder, or give the same settings to go on"
            )
        return Prices.load(place), float(before["budget_reference_s"])
    device = pick(plan.trainer.device)
    prices = table(plan, arms, device)
    budget = plan.budget_reference_s or plan.budget_steps * dense_step_s(plan.task, prices, plan.seeds[0], device)
    write_json(place, prices.to_json())
    write_json(note, {**asked, "budget_reference_s": budget})
    say(plan, f"budget of every run: {budget:.4g} reference seconds, {prices.words}")
    return prices, budget


def _tuned(plan: Plan, prices: Prices) -> float | None:
    """The learning rate of all arms: dense's best of those to try, 0 for the task's own; None where it was interrupted."""
    if not plan.learning_rates:
        return plan.trainer.learning_rate
    losses: dict[float, float] = {}
    for rate in plan.learning_rates:
        tried = replace(plan, trainer=replace(plan.trainer, learning_rate=rate))
        folder = plan.folder / "tuning" / f"dense-{rate:g}"
        try:
            result = _run(tried, OwnArm(DENSE), TUNING_SEED, prices, folder, f"tuning {plan.stream} {rate:g}")
        except TrainingDiverged:
            continue
        if result["status"] != "finished":
            return None
        losses[rate] = float(result["loss_nats"])
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ConfigError(
            f"learning_rates = {short(list(plan.learning_rates))}: dense diverged with all of them; try lower"
        )
    best = min(finite, key=finite.__getitem__)
    say(plan, f"learning rate {best:g}: {', '.join(f'{rate:g} {loss:.4f} nats' for rate, loss in losses.items())}")
    return best


def _run(plan: Plan, arm: OwnArm, seed: int, prices: Prices, folder: Path, stream: str) -> dict[str, Any]:
    cfg = OwnRun(
        run=str(folder),
        stream=stream,
        arm=arm.name,
        seed=seed,
        module=plan.module,
        model=plan.task.title,
        trainer=plan.trainer,
        resume="auto",
        progress=plan.progress,
    )
    return run_own(plan.task, arm, prices, cfg)


def _conclude(plan: Plan, runs: Sequence[Mapping[str, Any]], failed: Mapping[str, str], prices: Prices) -> dict[str, Any]:
    folders = [str(run["folder"]) for run in runs]
    found = compare(CompareConfig(runs=folders, out=str(plan.folder / "comparison"), tensorboard=plan.tensorboard))
    check = step_check(runs)
    for line in check_lines(check):
        print(line)
    for name, reason in failed.items():
        print(f"missing: {name}: {reason}")
    if len(plan.seeds) == 1:
        print(DEMONSTRATION)
    outcome = {
        **found,
        "status": "finished",
        "folder": str(plan.folder),
        "comparison": str(plan.folder / "comparison"),
        "missing": dict(failed),
        "demonstration": len(plan.seeds) == 1,
        "clock": {"source": prices.source, "component_times": prices.words, "component_times_sha256": prices.sha256},
        "steps": check,
    }
    write_json(plan.folder / "outcome.json", outcome)
    return outcome


def step_check(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """What a step of each arm takes over a dense one: by the clock, and by the wall; means over the seeds."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_arm.setdefault(str(run["arm"]), []).append(run["clock"])
    found: dict[str, dict[str, float | None]] = {}
    for arm, clocks in by_arm.items():
        counted = math.fsum(clock["counted_ms_per_step"] for clock in clocks) / len(clocks)
        walls = [clock["wall_ms_per_step"] for clock in clocks if clock["wall_ms_per_step"] is not None]
        found[arm] = {"counted_ms": counted, "wall_ms": math.fsum(walls) / len(walls) if walls else None}
    dense = found.get(DENSE)
    for one in found.values():
        wall, base = one["wall_ms"], dense["wall_ms"] if dense else None
        one["counted_over_dense"] = one["counted_ms"] / dense["counted_ms"] if dense else None  # type: ignore[operator]
        one["wall_over_dense"] = wall / base if wall and base else None
    return found


def check_lines(check: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """One line for each arm beside dense, for people."""
    lines = []
    for arm, one in check.items():
        counted, wall = one["counted_over_dense"], one["wall_over_dense"]
        if arm == DENSE or counted is None:
            continue
        by_wall = "not timed" if wall is None else f"{wall:.2f} by the wall (a busy machine moves it)"
        lines.append(f"a step of {arm} over a dense one: {counted:.2f} by the clock, {by_wall}")
    return lines


@contextlib.contextmanager
def _generators_kept() -> Any:
    """The caller's random generators are where they were, whatever the runs draw."""
    before = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def say(plan: Plan, text: str) -> None:
    if plan.progress:
        print(text, file=sys.stderr, flush=True)
