"""One arm of a task, from a folder of its own to its record; the same files as of every training run."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.comparison.settings import experiment_settings
from experiments.runs.claim import Start, begin
from experiments.runs.folder import RunError, disk_errors, new_record, read_json
from experiments.runs.lock import exclusive
from experiments.runs.own.record import document, scalars
from experiments.runs.plain_json import plain, write_json, write_text
from experiments.runs.progress import Bar
from experiments.views.hparam_rows import run_row
from experiments.views.tracking import Tracker, hparam_metrics, training_energy_markdown
from hardware.markdown import fenced
from hardware.meters.meter import Meter
from sparse_update.clock.cost import ComponentTimesError
from sparse_update.data.records import CorpusError
from sparse_update.library.linear import GateError
from sparse_update.loop.checkpoint import CheckpointError, newest
from sparse_update.loop.records import TrainingDiverged
from sparse_update.own.arms import OwnArm
from sparse_update.own.loop import OwnTrainer, OwnTrainerConfig
from sparse_update.own.prices import Prices
from sparse_update.own.task import TaskError, UserTask
from sparse_update.signals import SignalError

EXPECTED = (
    RunError, TaskError, GateError, CheckpointError, ComponentTimesError, TrainingDiverged, SignalError, CorpusError,
)  # fmt: skip
"""Errors whose message says all."""
MAY_DIFFER = {"run", "resume", "progress", "trainer.checkpoint_every_s", "trainer.keep_checkpoints"}
TABLE = "component_times.json"


@dataclass
class OwnRun:
    """Settings of one run, as its `config.yaml` keeps them."""

    run: str
    stream: str
    arm: str
    seed: int
    module: str = ""
    """PACKAGE:FUNCTION; empty where the task was given from Python."""
    model: str = ""
    """Class of the model."""
    gate: dict[str, Any] = field(default_factory=dict)
    """Settings of the gate as `attach` takes them; empty for plain training."""
    trainer: OwnTrainerConfig = field(default_factory=OwnTrainerConfig)
    resume: bool | str = True
    progress: bool = True

    @property
    def folder(self) -> Path:
        return Path(self.run)


def settings_of(arm: OwnArm) -> dict[str, Any]:
    """The arm's gate as plain values."""
    found: dict[str, Any] = {} if arm.config is None else plain(asdict(arm.config))
    return found


def run_own(task: UserTask, arm: OwnArm, prices: Prices, cfg: OwnRun) -> dict[str, Any]:
    """Run one arm in its folder and return its record, the content of `result.json`.

    A run that is finished already is not run again: its record is returned. An interrupted one says so in `status`, and
    goes on from its checkpoint when it is called again (`claim.begin`).
    """
    folder = cfg.folder
    cfg.gate = settings_of(arm)
    with exclusive(folder, f"training {cfg.arm}"), disk_errors(folder):
        start = begin(folder, cfg, cfg.resume, MAY_DIFFER)
        if start is Start.FINISHED:
            return read_json(folder / "result.json") | {"folder": str(folder)}
        goes_on = start is Start.GO_ON
        record = new_record("train", stream=cfg.stream, arm=cfg.arm, seed=cfg.seed, module=cfg.module or None)
        if goes_on:
            with suppress(RunError):
                record["started"] = read_json(folder / "run.json").get("started", record["started"])
            prices = Prices.load(folder / TABLE)
        record |= {"component_times_sha256": prices.sha256, "component_times": prices.words}
        write_text(folder / "config.yaml", yaml.safe_dump(plain(cfg), sort_keys=False))
        write_json(folder / "run.json", record)
        write_json(folder / TABLE, prices.to_json())
        try:
            result = _train(task, arm, prices, cfg, goes_on)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):  # a full disk: the error that is on its way says so
                write_json(folder / "run.json", record | {"status": status, "error": f"{type(error).__name__}: {error}"})
            raise
        if result["status"] == "finished":
            write_json(folder / "result.json", result)
        else:
            print(f"interrupted at step {result['steps']}; the same command goes on from there ({folder})", file=sys.stderr)
        write_json(folder / "run.json", record | {"status": result["status"]})
    return result


def _train(task: UserTask, arm: OwnArm, prices: Prices, cfg: OwnRun, goes_on: bool) -> dict[str, Any]:
    folder = cfg.folder
    resolved = plain(cfg)
    kept = newest(folder / "checkpoint") if goes_on else None
    resumed = kept.checkpoint if kept else None
    for damaged in kept.damaged if kept else ():
        print(damaged, file=sys.stderr)
    with (
        Tracker(
            folder,
            resume_step=int(resumed.meta["step"]) if resumed else None,
            written=resumed.meta.get("records") if resumed else None,
        ) as tracker,
        Bar(f"{cfg.stream} {cfg.arm} seed {cfg.seed}", 100, "% of the budget", cfg.progress) as bar,
    ):

        def tell(trainer: OwnTrainer, evaluated: bool) -> None:
            line = scalars(trainer)
            if evaluated:
                line["val_loss_nats"] = trainer.tally.held_out
            tracker.log(trainer.tally.step, line)
            shown = line["val_loss_nats" if evaluated else "loss_nats"]
            bar.to(trainer.progress * bar.total, f"{'held-out ' if evaluated else ''}loss {shown:.3f}")

        trainer = OwnTrainer(
            task, arm, cfg.seed, prices, cfg.trainer, folder, {"config": resolved}, tell, resumed, tracker.written
        )  # fmt: skip
        if resumed is None:
            tracker.text("config", fenced(yaml.safe_dump(resolved, sort_keys=False)))
        with Meter(idle=()) as meter:
            finished = trainer.run()
        result = document(cfg, trainer, finished, meter.readings, goes_on)
        if not finished:
            result["interrupted_by"] = trainer.interrupted_by
        result["checkpoints"] = {**trainer.keeper.account(), "resumed_at_step": resumed.meta["step"] if resumed else None}
        result["checkpoints"]["damaged"] = list(kept.damaged) if kept else []
        if finished:
            bar.to(bar.total)
            tracker.text("energy", training_energy_markdown(result))
            row = run_row(cfg.stream, cfg.arm, cfg.seed, str(folder), experiment_settings(resolved))
            tracker.hparams(row, hparam_metrics(result))
    return result
