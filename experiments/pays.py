"""Does it pay on my model? `does_it_pay(task, gate=...)`, or `spikegate pays module=my_model:task gate=surprise_tokens`.

Plain training, a gate, and the same gate by chance, each seed of each for the same counted seconds; then the comparison and
its verdicts. The same command again goes on where it stopped.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.compare import NothingToCompare, headline_record
from experiments.runs.hydra_app import ConfigError, run_app
from experiments.runs.output import finish
from experiments.runs.own.comparison import Plan, does_all
from experiments.runs.own.finding import find_task
from experiments.runs.own.run import EXPECTED
from experiments.runs.own.settings import PaysConfig
from sparse_update.library.settings import AttachConfig
from sparse_update.own.loop import OwnTrainerConfig
from sparse_update.own.task import UserTask

__all__ = ["PaysConfig", "does_it_pay", "main", "pays"]


def does_it_pay(
    task: UserTask,
    gate: AttachConfig | Mapping[str, Any] | None = None,
    *,
    gates: Mapping[str, AttachConfig | Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    budget_steps: int = 200,
    budget_reference_s: float = 0.0,
    learning_rates: Sequence[float] = (),
    folder: str | Path = "",
    clock: str = "measured",
    evaluations: int = 8,
    checkpoint_every_s: float = 60.0,
    device: str = "auto",
    progress: bool = True,
    tensorboard: bool = True,
    show: bool = True,
) -> dict[str, Any]:
    """Train plain, by chance and gated on the same counted seconds, compare, and say whether the gate wins.

    Args:
        task: model, data, loss, optimizer.
        gate: settings as `sparse_update.attach` takes them; its arm is called "gated".
        gates: or several, by the name of their arm.
        seeds: one run of every arm for each. One seed is a demonstration; tests need two, a result three to five.
        budget_steps: each run may spend what so many plain steps cost.
        budget_reference_s: or these counted seconds.
        learning_rates: tried for dense at the full budget on a seed of its own; all arms take the best.
        folder: of runs and comparison; empty: runs/pays/TASK. The same call on the same folder goes on where it stopped.
        clock: "measured" on this machine, "modelled" by the shipped table, or the path of a table of an earlier comparison.
        evaluations: held-out evaluations along each run, off the clock.
        checkpoint_every_s: wall seconds between checkpoints.
        device: "auto", "cpu", "cuda".
        progress: bars and remarks on standard error.
        tensorboard: write the comparison's TensorBoard folder too.
        show: print the comparison's table and the verdicts.

    Returns:
        What `comparison.json` holds, with "status" ("finished", or "interrupted" after Ctrl-C), "verdicts" (sentences),
        "streams" (records by arm), "steps" (a step of each arm over a dense one, by the clock and by the wall), "missing"
        (runs that diverged) and "folder".

    Raises:
        ValueError: settings out of range, a gate that leaves nothing out, a folder that holds another comparison.
        TaskError, GateError: parts that cannot be trained or gated so.
    """
    if (gate is None) == (gates is None):
        raise ValueError("does_it_pay: give gate = the settings of one gate, or gates = {name: settings}")
    plan = Plan(
        task=task,
        gates=gates if gates is not None else {"gated": gate},
        seeds=list(seeds),
        folder=Path(folder) if folder else Path("runs/pays") / file_name(task.title),
        stream=task.title,
        budget_steps=budget_steps,
        budget_reference_s=budget_reference_s,
        clock=clock,
        learning_rates=list(learning_rates),
        trainer=OwnTrainerConfig(evaluations=evaluations, checkpoint_every_s=checkpoint_every_s, device=device),
        progress=progress,
        tensorboard=tensorboard,
    )
    PaysConfig(  # the ranges that the command checks
        module="a:b", seeds=list(seeds), budget_steps=budget_steps, budget_reference_s=budget_reference_s,
        learning_rates=list(learning_rates),
    )  # fmt: skip
    with nullcontext() if show else redirect_stdout(io.StringIO()):
        return does_all(plan)


def file_name(text: str) -> str:
    """`text` as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.") or "task"


def pays(cfg: PaysConfig) -> dict[str, Any]:
    """The command: the arms of one gate on the task that `module` names. Returns the outcome."""
    task = find_task(cfg.module)
    settings = cfg.gate_settings()
    if not settings:
        raise ConfigError(
            "gate = dense leaves nothing out, so there is nothing to compare: choose a gate, such as gate=surprise_tokens, "
            "a subset, such as subset=blocks, or a published method, such as attach.method=lisa"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    base = str(cfg.attach.get("method") or ("gated" if cfg.gate.name == "dense" else cfg.gate.name))
    name = base if cfg.subset.kind == "all" else f"{base}+{cfg.subset.name}"
    if cfg.gate.signal == "random":
        raise ConfigError("gate = random is the control, which is run anyway: choose the gate that it is to control")
    trainer = OwnTrainerConfig(
        evaluations=cfg.evaluations,
        log_every_steps=cfg.log_every_steps,
        checkpoint_every_s=cfg.checkpoint_every_s,
        learning_rate=cfg.learning_rate,
        device=cfg.device,
    )
    plan = Plan(
        task=task,
        gates={name: settings},
        seeds=cfg.seeds,
        folder=Path(cfg.folder) if cfg.folder else Path("runs/pays") / file_name(f"{task.title}-{name}"),
        stream=task.title,
        module=cfg.module,
        budget_steps=cfg.budget_steps,
        budget_reference_s=cfg.budget_reference_s,
        clock=cfg.clock,
        learning_rates=cfg.learning_rates,
        trainer=replace(trainer),
        progress=cfg.progress,
        tensorboard=cfg.tensorboard,
    )
    try:
        return does_all(plan)
    except ValueError as error:
        if isinstance(error, (ConfigError, *EXPECTED)):
            raise
        raise ConfigError(str(error)) from error


def _tell(document: Mapping[str, Any]) -> None:
    if document["status"] == "interrupted":
        print(f"interrupted; the same command goes on from there ({document['folder']})", file=sys.stderr)
        finish(document, "pays")
        return
    shown = headline_record(document) | {key: document[key] for key in ("status", "demonstration", "steps", "missing")}
    finish(shown, "pays", file=Path(document["folder"]) / "outcome.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate pays`; see `run_app` for exit codes."""
    return run_app("pays", PaysConfig, pays, argv, expected=(*EXPECTED, NothingToCompare), tell=_tell)


if __name__ == "__main__":
    sys.exit(main())
