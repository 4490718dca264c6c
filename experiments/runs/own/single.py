"""One arm on a model of one's own: `spikegate train module=PACKAGE:FUNCTION`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.comparison import Plan, table
from experiments.runs.own.finding import find_task
from experiments.runs.own.run import TABLE, OwnRun, run_own
from experiments.runs.own.settings import OwnConfig
from hardware.declared import made
from hardware.names import as_file_name
from hardware.text import short
from sparse_update.library.settings import AttachConfig
from sparse_update.own.arms import OwnArm
from sparse_update.own.loop import OwnTrainerConfig, pick
from sparse_update.own.measure import dense_step_s
from sparse_update.own.prices import Prices


def train_own(cfg: OwnConfig) -> dict[str, Any]:
    """Run the arm in its folder and return its record, the content of `result.json`.

    Raises ConfigError for a task that cannot be found and for settings that a gate on it does not have.
    """
    arm = cfg.own_arm()
    task = find_task(cfg.module)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = pick(cfg.device)
    stream = cfg.stream or task.title
    folder = Path(cfg.run) if cfg.run else Path("runs/train") / as_file_name(f"{stream}-{arm.name}-s{cfg.seed}")
    trainer = OwnTrainerConfig(
        budget_reference_s=cfg.budget_reference_s,
        evaluations=cfg.evaluations,
        log_every_steps=cfg.log_every_steps,
        checkpoint_every_s=cfg.checkpoint_every_s,
        learning_rate=cfg.learning_rate,
        device=cfg.device,
    )
    clock = cfg.clock
    if cfg.resume and (folder / TABLE).exists() and (folder / "run.json").exists():
        clock = str(folder / TABLE)  # the clock of a run does not change while it goes on
    asked = Plan(task, {}, [cfg.seed], folder, stream, clock=clock, progress=cfg.progress)
    prices = table(asked, [arm], device)
    if not cfg.budget_reference_s:
        trainer = replace(trainer, budget_reference_s=cfg.budget_steps * dense_step_s(task, prices, cfg.seed, device))
    run = OwnRun(
        run=str(folder),
        stream=stream,
        arm=arm.name,
        seed=cfg.seed,
        module=cfg.module,
        model=task.title,
        trainer=trainer,
        resume=cfg.resume,
        progress=cfg.progress,
    )
    return run_own(task, arm, prices, run)


def repeat_own(folder: Path, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Run the settings of a finished run again, on its own table of prices and budget, into `out`.

    Args:
        folder: of the run.
        settings: what its `config.yaml` holds; the module that they name is imported.
        out: folder of the repetition.

    Raises ConfigError for settings that this version does not have, or where the task's module is not found.
    """
    where = f"{folder / 'config.yaml'}"
    trainer = made(OwnTrainerConfig, settings.get("trainer", {}), where, ConfigError)
    run = made(OwnRun, {**settings, "run": str(out), "resume": False, "trainer": trainer}, where, ConfigError)
    try:
        arm = OwnArm(run.arm, AttachConfig.from_dict(run.gate) if run.gate else None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: gate: {short(str(error))}") from error
    return run_own(find_task(run.module), arm, Prices.load(folder / TABLE), run)
