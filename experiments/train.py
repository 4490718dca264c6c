"""Train one arm: `python -m experiments.train gate=surprise experiment=noisy`, or `spikegate train ...`.

`spikegate train module=PACKAGE:FUNCTION ...` trains it on a model of one's own (`experiments.runs.own`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.runs.claim import Start, begin
from experiments.runs.folder import RunError, disk_errors, new_record, read_json
from experiments.runs.hydra_app import ConfigError, run_app
from experiments.runs.lock import exclusive
from experiments.runs.output import finish
from experiments.runs.own.run import EXPECTED as EXPECTED_OF_OWN
from experiments.runs.own.settings import OwnConfig
from experiments.runs.own.single import train_own
from experiments.runs.plain_json import write_json, write_text
from experiments.runs.training.arm import run_arm
from experiments.runs.training.component_times import component_times
from experiments.runs.training.config import MAY_DIFFER, TrainConfig, check_size, check_vocabulary, pick_device
from experiments.runs.training.launch import launched, starts_processes
from experiments.runs.training.ranks import is_first, joined, mesh_record, rank_device
from experiments.runs.training.source import corpus_of
from sparse_update.clock.cost import ComponentTimes, ComponentTimesError
from sparse_update.data.records import CorpusError
from sparse_update.loop.checkpoint import CheckpointError
from sparse_update.loop.records import TrainingDiverged
from sparse_update.objectives.objective import ObjectiveError
from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.reinforcement.settings import ReinforcementError
from sparse_update.objectives.sampled import RewardError
from sparse_update.parallel.mesh import Mesh, MeshError
from sparse_update.signals import SignalError
from sparse_update.tasks.base import TaskError, VerifierError
from sparse_update.tasks.encoding import PromptTooLong
from sparse_update.weights.lowrank import PeersError

__all__ = ["EXPECTED", "TrainConfig", "main", "train"]

EXPECTED = (
    RunError, CorpusError, CheckpointError, ComponentTimesError, TrainingDiverged, SignalError, PeersError, MeshError,
    RewardError, VerifierError,
)  # fmt: skip


HEADLINE = ["status", "folder", "stream", "arm", "seed", "loss_nats", "bits_per_byte", "held_out"]
HEADLINE += [
    "budget_reference_s",
    "budget_offered_tokens",
    "tokens",
    "steps",
    "flops",
    "reference_s",
    "gate_reference_s",
    "wall_s",
    "peak_bytes",
    "keep_fraction",
]
HEADLINE += ["objective", "task", "empty_steps", "source_keep", "skipped_steps", "params", "corpus"]


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Run one arm in its folder and return its record, the content of `result.json`.

    A run that is finished already is not run again: its record is returned (`claim.begin`). With `mesh.processes` the
    processes are started here; where torchrun has started them, this is one of them.
    """
    if starts_processes(cfg):
        return launched(cfg, EXPECTED)
    device = rank_device(pick_device(cfg.trainer.device))
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    with joined(cfg.mesh, device) as mesh, disk_errors(cfg.folder):
        try:
            return _on_rank(cfg, cfg.folder, device, mesh)
        except (
            MeshError,
            TaskError,
            PreferenceError,
            PromptTooLong,
            ObjectiveError,
            ReinforcementError,
        ) as error:  # settings that do not go together
            raise ConfigError(str(error)) from None


def _on_rank(cfg: TrainConfig, folder: Path, device: torch.device, mesh: Mesh) -> dict[str, Any]:
    """The first rank holds the folder and decides how the run begins."""
    with exclusive(folder, f"training {cfg.arm_name}") if mesh.first else nullcontext():
        begun = begin(folder, cfg, cfg.resume, MAY_DIFFER).name if mesh.first else ""
        start = Start[mesh.said_by_first(begun)]
        if start is Start.FINISHED:
            if mesh.first:
                print(f"{folder} holds the finished run already: nothing to do", file=sys.stderr)
            return read_json(folder / "result.json") | {"folder": str(folder)}  # as it is called from here
        return _train(cfg, folder, device, start is Start.GO_ON, mesh)


def _train(cfg: TrainConfig, folder: Path, device: torch.device, goes_on: bool, mesh: Mesh) -> dict[str, Any]:
    record = new_record("train", stream=cfg.stream_name, arm=cfg.arm_name, seed=cfg.seed)
    record["mesh"] = mesh_record(cfg.mesh, mesh, device)
    if goes_on:
        with suppress(RunError):
            record["started"] = read_json(folder / "run.json").get("started", record["started"])
    if not mesh.first:  # what the first one fetches, tokenises and keeps, the others find
        mesh.wait()
    corpus = corpus_of(cfg)
    if mesh.first:
        mesh.wait()
    check_size(cfg, corpus)
    cfg.model.vocab_size = check_vocabulary(cfg, corpus)
    timed = component_times(cfg, device, goes_on).to_json() if mesh.first else ""
    times = ComponentTimes.of(json.loads(mesh.said_by_first(timed)))
    record |= {"component_times_sha256": times.sha256, "component_times": times.source, "corpus_sha256": corpus.sha256}
    if mesh.first:
        write_text(folder / "config.yaml", yaml.safe_dump(asdict(cfg), sort_keys=False))
        write_json(folder / "run.json", record)
        times.save(folder / "component_times.json")
    try:
        result = run_arm(cfg, corpus, times, device, folder, goes_on, mesh)
        result["mesh"] = record["mesh"]
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record |= {"status": status, "error": f"{type(error).__name__}: {error}"}
        if mesh.first:
            with suppress(OSError):  # a full disk: the error that is on its way says so
                write_json(folder / "run.json", record)
        raise
    if not mesh.first:
        return result
    if result["status"] == "finished":
        write_json(folder / "result.json", result)
    else:
        again = f"the same command goes on from there ({folder})"
        print(f"interrupted at step {result['steps']}; {again}", file=sys.stderr)
    write_json(folder / "run.json", record | {"status": result["status"]})
    return result


def _tell(document: Mapping[str, Any]) -> None:
    """What came out, for people, and the document's line; an interrupted run has no result.json yet."""
    file = Path(document["folder"]) / "result.json" if document["status"] == "finished" else None
    if file is not None:
        loss, reference_s, wall_s = (float(document[key]) for key in ("loss_nats", "reference_s", "wall_s"))
        bits, task = document["bits_per_byte"], document.get("task") or {}
        said = "" if bits is None else f" ({float(bits):.4f} bits per byte)"
        print(f"{document['stream']} {document['arm']}, seed {document['seed']}: {loss:.4f} nats{said}")
        if "task/accuracy" in task:
            more = f", {task['task/accuracy_unseen']:.1%} of unseen tasks" if "task/accuracy_unseen" in task else ""
            print(f"{task['task/accuracy']:.1%} of the held-out questions solved{more}")
        print(f"{document['tokens']:,} tokens, {document['steps']:,} steps, {reference_s:.1f} reference s, {wall_s:.0f} s")
        print(f"all of it: {file}")
    finish(document, "train", file=file, headline=HEADLINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate train`; see `run_app` for exit codes."""
    words = sys.argv[1:] if argv is None else argv
    if not is_first():  # the first process reports
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            return run_app("train", TrainConfig, train, argv, expected=EXPECTED, tell=_tell)
    if any(word.startswith("module=") for word in words):
        return run_app("own", OwnConfig, train_own, argv, expected=EXPECTED_OF_OWN, tell=_tell, command="train")
    return run_app("train", TrainConfig, train, argv, expected=EXPECTED, tell=_tell)


if __name__ == "__main__":
    sys.exit(main())
