"""`spikegate study reinforcement FAMILY`: does reinforcement lift a tuned model, and does a gate halve its time?

A small model is tuned on questions with their answers until it solves about half of the held-out ones. From there each arm
goes on alone, for the same reference seconds or half of them, with generation on the clock: reinforcement without a gate,
with the gate that looks at the surprise of a reference answer before anything is sampled, with a random gate at the same
rate, with DAPO's filter after generation, with GRESO; rejection sampling with fine-tuning; more of the tuning itself.

Each run is kept as a JSON file in `--out`, and a run that is there is not made again, so that a long study may be made in
pieces. Accuracy is that of greedy answers to questions of the split, the same for all runs. The last line is JSON. Exit
codes: 0 all runs are there; 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from experiments.comparison.statistics import interval, paired_test
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.checkpoint import load_checkpoint, save_checkpoint
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.objectives.choice import make_objective, task_stream
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.objectives.reinforcement.settings import PromptGateConfig, RlConfig, preset
from sparse_update.objectives.settings import ObjectiveConfig, SampleConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig

CPU = torch.device("cpu")
PROMPTS = 16
"""Prompts of a phase, in every arm that samples."""


@dataclass(frozen=True)
class Family:
    """What is asked, and how long."""

    tasks: tuple[str, ...]
    context: int
    new_tokens: int
    tune_s: float
    """reference seconds of tuning, after which about half of the questions are solved"""
    budget_s: float
    """reference seconds of an arm"""
    tune_lr: float = 3e-3
    lr: float = 3e-4
    pool: int = 4
    """candidates for each prompt that is taken"""
    n: int = 8


FAMILIES = {
    "sums": Family(("sums:1-2",), 48, 6, 7.0, 24.0),
    "brackets": Family(("brackets:1-6",), 48, 14, 5.0, 16.0),
    "sorting": Family(("sorting:1",), 48, 12, 12.0, 24.0),
    "arithmetic": Family(("gym:basic_arithmetic:1",), 64, 8, 8.0, 20.0),
}


@dataclass(frozen=True)
class Way:
    """One arm."""

    kind: str
    share: float = 1.0
    """of the family's budget"""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """of `PromptGateConfig`, beside the share that is kept"""
    gated: bool = False
    """whether it is shown `Family.pool` times as many prompts as it takes"""


ARMS = {
    "none": Way("rl"),
    "surprise": Way("rl", prompts={"kind": "surprise"}, gated=True),
    "surprise/2": Way("rl", 0.5, {"kind": "surprise"}, True),
    "random/2": Way("rl", 0.5, {"kind": "random"}, True),
    "predicted/2": Way("rl", 0.5, {"kind": "predicted"}, True),
    "dapo/2": Way("rl", 0.5, {"filter_after": True}, True),
    "greso/2": Way("rl", 0.5, {"kind": "greso"}, True),
    "rejection": Way("rejection"),
    "instruct": Way("instruct"),
}


def examples_of(family: Family, split: str, seed: int, judged: int) -> Examples:
    cfg = TaskConfig(tasks=list(family.tasks), form="short", judged=judged, new_tokens=family.new_tokens, split=split)
    return Examples(cfg, ByteTokenizer(), family.context, seed)


def trained(
    model: Transformer, objective: ObjectiveConfig, examples: Examples, optim: OptimConfig, budget_s: float, windows: int,
    seed: int, place: Path, evaluations: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Train a model in place; its accuracy over reference seconds, and what the objective says of itself."""
    table, curve = shipped_table(), []
    times = table.times(model.cfg, optim, windows, CPU, "fp32", False)
    stream = task_stream(objective, examples)

    def on_evaluation(report: Any, losses: dict[str, float]) -> None:
        curve.append((report.reference_s, report.notes["task/accuracy"]))

    notes: dict[str, float] = {}
    trainer = make_trainer(
        model,
        Arm(optim=optim),
        TrainerConfig(budget_reference_s=budget_s, batch_windows=windows, evaluations=evaluations, checkpoint_every_s=1e9),
        Text(stream, {name: rows.tokens_NT1 for name, rows in examples.held_out.items()}),
        Prices(times, lambda found, steps, components: table.extended(found, model.cfg, optim, steps, components)),
        Place(place),
        seed,
        Listeners(on_evaluation=on_evaluation),
        objective=make_objective(objective, examples),
    )
    began = time.process_time()
    result = trainer.run()
    notes = dict(trainer.updates.objective.notes())
    return {
        "accuracy": result.scores["task/accuracy"],
        "curve": curve,
        "reference_s": result.reference_s,
        "beside_steps_s": result.gate_reference_s,
        "cpu_s": time.process_time() - began,
        "steps": result.step,
        "empty": result.empty,
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": {name: value for name, value in notes.items() if value == value},
    }


def shape_of(family: Family) -> ModelConfig:
    return ModelConfig("study", 64, 2, 4, family.context, vocab_size=256, attention="explicit")


def tuned(family: Family, examples: Examples, seed: int, out: Path) -> tuple[Transformer, dict[str, Any]]:
    """The model that the arms of a seed begin with; from its file where it was made before."""
    torch.manual_seed(seed)
    model, file, record = Transformer(shape_of(family)), out / f"tuned-{seed}", out / f"tuned-{seed}.json"
    if record.is_file():
        model.load_state_dict(load_checkpoint(file).model)
        return model, json.loads(record.read_text())
    optim = OptimConfig(lr=family.tune_lr, weight_decay=0.0)
    found = trained(model, ObjectiveConfig(kind="instruct"), examples, optim, family.tune_s, 16, seed, out / "run", 4)
    save_checkpoint(file, model.state_dict(), {}, {"seed": seed})
    write_json(record, found)
    return model, found


def objective_of(way: Way, family: Family) -> tuple[ObjectiveConfig, int]:
    """Settings of an arm, and windows of a step."""
    sample = SampleConfig(n=family.n, new_tokens=family.new_tokens, micro_rows=0)
    if way.kind != "rl":
        return ObjectiveConfig(kind=way.kind, sample=sample), PROMPTS
    prompts = PromptGateConfig(**{"keep_fraction": 1 / family.pool if way.gated else 1.0, **way.prompts})
    rl = RlConfig(preset("rloo"), prompts)
    return ObjectiveConfig(kind="rl", rl=rl, sample=sample), PROMPTS * (family.pool if way.gated else 1)


def run(name: str, family: Family, arm: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One arm from one tuned model, from its file where it was made before."""
    out = Path(asked.out) / name
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{arm.replace('/', '-')}-{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    examples = examples_of(family, asked.split, seed, asked.judged)
    model, before = tuned(family, examples, seed, out)
    way = ARMS[arm]
    objective, windows = objective_of(way, family)
    optim = OptimConfig(lr=family.lr, weight_decay=0.0, schedule="wsd", warmup_fraction=0.05, decay_fraction=0.3)
    found = trained(
        copy.deepcopy(model), objective, examples, optim, way.share * family.budget_s, windows, seed, out / "run"
    )
    found |= {"start": before["accuracy"], "family": name, "arm": arm, "seed": seed, "lr": family.lr}
    write_json(file, found)
    print(f"{name} {arm} seed {seed}: {before['accuracy']:.3f} to {found['accuracy']:.3f}", flush=True)
    return found


def table(name: str, found: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Lines of a Markdown table: mean accuracy and interval over seeds."""
    lines = ["| arm | reference s | start | accuracy | interval |", "|---|---|---|---|---|"]
    for arm, runs in found.items():
        spread = interval([one["accuracy"] for one in runs])
        start = interval([one["start"] for one in runs]).mean
        low = "one seed" if spread.low is None else f"{spread.low:.3f} to {spread.high:.3f}"
        seconds = interval([one["reference_s"] for one in runs]).mean
        lines.append(f"| {name}, {arm} | {seconds:.1f} | {start:.3f} | {spread.mean:.3f} | {low} |")
    return lines


def compared(found: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Of pairs of arms: the difference in accuracy with its interval, and p of "the first one solves more"."""
    pairs = {}
    for first, second in (
        ("surprise/2", "none"), ("surprise/2", "random/2"), ("surprise", "none"), ("predicted/2", "random/2"),
        ("surprise/2", "dapo/2"), ("surprise/2", "greso/2"), ("none", "rejection"), ("none", "instruct"),
    ):  # fmt: skip
        if first in found and second in found and len(found[first]) > 1:
            wrong = [[1 - one["accuracy"] for one in found[arm]] for arm in (first, second)]
            test = paired_test(*wrong)
            low, high = (None if bound is None else -bound for bound in (test.high, test.low))
            pairs[f"{first} over {second}"] = {"gain": -test.difference, "low": low, "high": high, "p": test.p}
    return pairs


def numbers(text: str) -> list[int]:
    """ "0,1,2" as numbers, for argparse."""
    return [int(part) for part in text.split(",")]


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing of the study and print what is there."""
    parser = argparse.ArgumentParser(prog="spikegate study reinforcement", description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--arms", default=",".join(ARMS), help="of %(default)s")
    parser.add_argument("--seeds", default="0,1,2", type=numbers)
    parser.add_argument("--out", default="runs/reinforcement")
    parser.add_argument("--split", default="held_out", choices=("held_out", "development"))
    parser.add_argument("--judged", type=int, default=400, help="questions that a model is judged by")
    for setting, kind in (("lr", float), ("n", int), ("pool", int), ("tune_s", float), ("budget_s", float)):
        parser.add_argument(f"--{setting.replace('_', '-')}", type=kind, help="in place of the family's own")
    add_json_argument(parser)
    asked = parser.parse_args(argv)
    arms, seeds = asked.arms.split(","), asked.seeds
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms {','.join(unknown)}: of {', '.join(ARMS)}")
    changes = {key: getattr(asked, key) for key in ("lr", "n", "pool", "tune_s", "budget_s") if getattr(asked, key)}
    family = replace(FAMILIES[asked.family], **changes)
    found = {arm: [run(asked.family, family, arm, seed, asked) for seed in seeds] for arm in arms}
    print("\n".join(table(asked.family, found)))
    pairs = compared(found)
    for pair, test in pairs.items():
        print(f"{pair}: {test['gain']:+.4f}, p = {test['p']:.4f}")
    means = {arm: interval([one["accuracy"] for one in runs]).mean for arm, runs in found.items()}
    document = {"study": "reinforcement", "family": asked.family, "accuracy": means, "pairs": pairs, "out": asked.out}
    finish(document, f"study-reinforcement-{asked.family}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
