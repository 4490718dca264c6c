"""One run, from a folder of its own to its record: model, stream, tracker, loop."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.comparison.settings import experiment_settings
from experiments.runs.progress import Bar
from experiments.runs.training.component_times import clock_record, extended, say
from experiments.runs.training.config import TrainConfig
from experiments.runs.training.record import document, scalars, split
from experiments.runs.training.source import source_of
from experiments.views.hparam_rows import run_row
from experiments.views.live import BlockUpdates, Savings
from experiments.views.rasters import surprise_figure
from experiments.views.tracking import Tracker, hparam_metrics, training_energy_markdown
from hardware.markdown import fenced
from hardware.meters.meter import Meter, measure_idle
from hardware.meters.zeus import ZeusCheck, compare_all
from sparse_update.clock.component import Component
from sparse_update.clock.cost import ComponentTimes, Step
from sparse_update.data.records import Corpus
from sparse_update.loop.assembly import Arm, Place, Prices, make_trainer
from sparse_update.loop.checkpoint import Found, load_checkpoint, newest
from sparse_update.loop.evaluation import start_from
from sparse_update.loop.fast import Choice, choose
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import StepReport
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.single import ALONE
from sparse_update.transformer import Transformer


def run_arm(
    cfg: TrainConfig,
    corpus: Corpus,
    times: ComponentTimes,
    device: torch.device,
    folder: Path,
    goes_on: bool,
    mesh: Mesh = ALONE,
) -> dict[str, Any]:
    """Train until the budget is spent or Ctrl-C, and return the run's record; its `status` says which of them it was.

    `goes_on`: from the checkpoint in `folder`, instead of from the beginning. `mesh`: the processes that train together,
    each of which calls this; the first one writes.
    """
    torch.manual_seed(cfg.seed)
    resolved = asdict(cfg)
    cfg, choices = settled(cfg, times, mesh)
    cfg.model.attention = times.attention if cfg.model.attention == "auto" else cfg.model.attention
    model = Transformer(cfg.model).to(device)
    if cfg.trainer.init_from and not goes_on:
        start_from(model, cfg.trainer.init_from)
    source = source_of(cfg, corpus)
    windows = source.text.held_out
    meta = {
        "config": resolved,
        "model": asdict(cfg.model),
        "tokenizer": corpus.tokenizer.record(),
        "corpus_sha256": corpus.sha256,
    }
    kept = _kept(folder, mesh) if goes_on else None
    resumed = kept.checkpoint if kept else None
    with _tracker(folder, kept) if mesh.first else nullcontext() as tracker, bar(cfg, mesh) as shown:

        def measured_once(
            table: ComponentTimes, steps: Sequence[Step], components: Mapping[str, Component]
        ) -> ComponentTimes:
            found = extended(cfg, device, table, steps, components).to_json() if mesh.first else ""
            return ComponentTimes.of(json.loads(mesh.said_by_first(found)))

        def on_report(report: StepReport) -> None:
            updates.note(report.step, trainer.updates.subset.active)
            assert tracker is not None  # the first process alone is told
            tracker.log(report.step, scalars(report, cfg) | savings.scalars())
            shown.to(
                trainer.budget.progress * shown.total,
                f"loss {report.loss_nats:.3f}, kept {report.keep_fraction:.0%}, "
                f"{report.tokens / max(report.wall_s, 1e-9):,.0f} tokens/s",
            )

        def on_evaluation(report: StepReport, losses: dict[str, float]) -> None:
            assert tracker is not None
            line = scalars(report, cfg) | savings.scalars()
            line |= {"val_loss_nats": losses["val"], "val_bits_per_byte": source.bits("val", losses["val"])}
            line |= {f"held_out/{name}": loss for name, loss in losses.items() if name != "val"}
            tracker.log(report.step, line)
            if trainer.gate.last_score_N is not None:
                tracker.histogram("gate/surprise_nats", trainer.gate.last_score_N, report.step)
                tracker.figure("surprise", surprise_figure(trainer.gate.last_score_N), report.step)
            updates.note(report.step, trainer.updates.subset.active)
            if cfg.subset.kind != "all":
                tracker.figure("blocks updated", updates.figure(), report.step)

        trainer = make_trainer(
            model,
            Arm(cfg.gate, cfg.subset, cfg.optim, cfg.growth),
            cfg.trainer,
            source.text,
            Prices(times, measured_once),
            Place(folder, meta, tracker.written if tracker is not None else dict),
            cfg.seed,
            Listeners(on_report, on_evaluation),
            objective=source.objective,
            mesh=mesh,
        )
        savings, updates = Savings(trainer), BlockUpdates(model)
        if resumed is not None:
            trainer.resume(resumed)
        elif tracker is not None:
            tracker.text("config", fenced(yaml.safe_dump(resolved, sort_keys=False)))
        idle = measure_idle(cfg.idle_s) if cfg.idle_s else ()
        with Meter(idle=idle) as meter, ZeusCheck() if cfg.zeus else nullcontext() as check:
            result = trainer.run()
        found = document(cfg, corpus, model, result, meter.readings, device, source, goes_on)
        found["fast"] = [choice.record() for choice in choices]
        found |= {"checkpoints": {**result.checkpoints, "resumed_at_step": resumed.meta["step"] if resumed else None}}
        found["checkpoints"]["damaged"] = list(kept.damaged) if kept else []
        found |= {"clock": clock_record(trainer.budget.clock.times), "notes": trainer.budget.clock.times.warnings}
        found["energy_check"] = [] if check is None else compare_all(meter.readings, check.readings)
        if result.finished:
            shown.to(shown.total)
            if not cfg.objective.on_tasks:
                found["val_split"] = split(cfg, corpus, model, windows["val"])
        if result.finished and tracker is not None:
            tracker.text("energy", training_energy_markdown(found))
            row = run_row(cfg.stream_name, cfg.arm_name, cfg.seed, str(cfg.folder), experiment_settings(resolved))
            tracker.hparams(row, hparam_metrics(found))
    return found


def settled(cfg: TrainConfig, times: ComponentTimes, mesh: Mesh = ALONE) -> tuple[TrainConfig, list[Choice]]:
    """The settings that `trainer.fast` stands for in this run, and what was decided; `cfg` itself where nobody asks for it.
    The arm keeps its name."""
    if not cfg.trainer.fast:
        return cfg, []
    arm = Arm(cfg.gate, cfg.subset, cfg.optim, cfg.growth)
    arm, trainer, choices = choose(arm, cfg.trainer, cfg.model, times.dense_ms / 1000, bool(cfg.init), mesh.size)
    for choice in choices if mesh.first else ():
        say(cfg, f"fast: {choice.part} {choice.chosen}: {choice.why}")
    return replace(cfg, arm=cfg.arm_name, gate=arm.gate, growth=arm.growth, optim=arm.optim, trainer=trainer), choices


def _kept(folder: Path, mesh: Mesh) -> Found:
    """The newest whole checkpoint; the first process looks for it and verifies it, the others read what it found."""
    parts = mesh.splits_weights
    found = newest(folder / "checkpoint", lazily=parts) if mesh.first else None
    place = mesh.said_by_first(str(found.checkpoint.folder) if found else "")
    return found or Found(load_checkpoint(place, lazily=parts, checked=not parts), ())


def _tracker(folder: Path, kept: Found | None) -> Tracker:
    """The tracker of a run that begins, or of one that goes on from a checkpoint; says what was found damaged."""
    if kept is None:
        return Tracker(folder)
    meta = kept.checkpoint.meta
    for damaged in kept.damaged:
        print(f"{damaged}; going on from step {meta['step']}", file=sys.stderr)
    return Tracker(folder, resume_step=int(meta["step"]), written=meta.get("records"))


def bar(cfg: TrainConfig, mesh: Mesh = ALONE) -> Bar:
    """What of the budget is spent: reference seconds, or tokens where those are the budget."""
    tokens, seconds = cfg.trainer.budget_offered_tokens, cfg.trainer.budget_reference_s
    title = f"{cfg.stream_name} {cfg.arm_name}, seed {cfg.seed}"
    return Bar(title, tokens or round(seconds, 1), "tokens" if tokens else "ref s", cfg.progress and mesh.first)
