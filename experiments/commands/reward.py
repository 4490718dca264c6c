"""`spikegate reward RUN FOLDER`: a reward model from pairs of a tuned run's own answers.

The run's model answers questions of its tasks, simulated annotators prefer one of two answers, and a copy of the model with
a head for one number is fitted to what they prefer. `objective=reward` follows it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs.folder import RunError
from experiments.runs.output import add_json_argument, finish

if TYPE_CHECKING:
    from sparse_update.objectives.examples.examples import Examples
    from sparse_update.objectives.preference.pairs import Annotator, Pair
    from sparse_update.transformer import Transformer

HELP = "a reward model from pairs of a tuned run's answers, for objective=reward"
HEADLINE = ("folder", "pairs", "accuracy", "accuracy_interval", "calibration_error")
LEAST_PAIRS = 10
"""Pairs to judge by, at least: as many as there are bins of confidence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("start", metavar="RUN", type=Path, help="folder of a finished run on tasks, whose model answers")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the reward model goes")
    parser.add_argument("--prompts", type=int, default=600, help="questions that pairs are made of (default: 600)")
    parser.add_argument("--outputs", type=int, default=8, help="answers to each (default: 8)")
    parser.add_argument(
        "--quality", type=float, default=4.0, metavar="NATS", help="log-odds for a right answer (default: 4)"
    )
    parser.add_argument(
        "--length", type=float, default=0.0, metavar="NATS", help="log-odds for each token: a liking of long answers (0)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over the pairs (default: 3)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: 0.002)")
    parser.add_argument("--seed", type=int, default=0)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 done; 2 the run, the folder or a setting is wrong."""
    from experiments.runs.trained import EXPECTED
    from sparse_update.objectives.preference.errors import PreferenceError
    from sparse_update.tasks.base import TaskError
    from sparse_update.tasks.encoding import PromptTooLong

    try:
        document = made(args)
    except (*EXPECTED, PreferenceError, TaskError, PromptTooLong, OSError) as error:
        print(f"reward: {error}", file=sys.stderr)
        return 2
    low, high = document["accuracy_interval"]
    print(
        f"{args.folder}: from {document['pairs']} pairs; of {document['judged']} others it agrees with "
        f"{document['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    )
    if low <= 0.5:
        print("reward: this is not told apart from guessing; give more --prompts, or a better tuned run", file=sys.stderr)
    print(f"follow it: spikegate train objective=reward 'objective.reward.models=[{args.folder}]' init={args.start} ...")
    finish(document, "reward", headline=list(HEADLINE))
    return 0


def made(args: argparse.Namespace) -> dict[str, Any]:
    """Make and save the reward model; its record."""
    import torch

    from experiments.runs.solving import questions_of
    from experiments.runs.trained import load_run
    from sparse_update.objectives.preference.calibration import calibration, log_odds
    from sparse_update.objectives.preference.errors import PreferenceError
    from sparse_update.objectives.preference.pairs import Annotator
    from sparse_update.objectives.preference.reward import RewardModel
    from sparse_update.objectives.preference.training import FitConfig, fit_reward

    if args.prompts < 8 or args.outputs < 2:
        raise PreferenceError(f"--prompts {args.prompts}, --outputs {args.outputs}: at least 8 questions, 2 answers each")
    annotator, fit = Annotator(args.quality, args.length), FitConfig(epochs=args.epochs, lr=args.lr, seed=args.seed)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise RunError(f"{args.folder} is there already: name a folder that is not, or remove it")
    if not (args.start / "run.json").exists():
        raise RunError(f"{args.start} is no run: name the folder of a finished spikegate train objective=instruct task=...")
    model, corpus, _, _ = load_run(args.start)
    questions = questions_of(args.start, model.cfg.context, judged=1)
    if questions is None:
        raise RunError(f"{args.start} is a run on text: a reward model judges answers, so name a run on tasks")
    examples = questions.examples
    learned_from = _pairs(model, examples, "train", args.prompts, args.outputs, annotator, args.seed)
    judged_by = _pairs(model, examples, "development", args.prompts // 2, args.outputs, annotator, args.seed)
    if len(judged_by) < LEAST_PAIRS:
        raise PreferenceError(f"{len(judged_by)} pairs of other questions to judge by: give more --prompts or --outputs")
    torch.manual_seed(args.seed)
    reward = RewardModel.of(model, corpus.tokenizer).requires_grad_(True)
    fit_reward(reward, learned_from, fit)
    reward.calibrate([row for pair in learned_from for row in pair.rows])
    found = calibration(log_odds(reward, judged_by))
    document = {
        "folder": str(args.folder), "run": str(args.start), "pairs": len(learned_from), "judged": found.pairs,
        "accuracy": found.accuracy, "accuracy_interval": list(found.accuracy_interval), "calibration_error": found.error,
        "calibration_error_interval": list(found.error_interval), "calibration_floor": found.floor,
        "annotator": asdict(annotator), "fit": asdict(fit), "tasks": list(examples.cfg.tasks),
    }  # fmt: skip
    reward.save(args.folder, {"reward": document})
    return document


def _pairs(
    model: Transformer, examples: Examples, split: str, prompts: int, outputs: int, annotator: Annotator, seed: int
) -> list[Pair]:
    """Pairs of the model's answers to questions of a split, closing tokens included."""
    from sparse_update.generation.sampler import Sampler
    from sparse_update.generation.settings import GenerateConfig
    from sparse_update.objectives.examples.rows import prompt_tokens
    from sparse_update.objectives.preference.pairs import sampled_pairs
    from sparse_update.tasks.encoding import PromptTooLong
    from sparse_update.tasks.splits import TaskStream

    instances = TaskStream(examples.tasks, split, 500 + seed).take(prompts)
    asked = [prompt_tokens(examples.tokenizer, instance, examples.cfg.form) for instance in instances]
    room = min(examples.cfg.new_tokens, examples.context - max(map(len, asked)))
    if room < 1:
        raise PromptTooLong(f"a question has {max(map(len, asked))} tokens, and the model reads {examples.context}")
    sampler = Sampler(model, GenerateConfig(new_tokens=room, n=outputs, seed=seed), examples.stop)
    found = sampler.sample(asked, [instance.id for instance in instances])
    rows, stopped = list(found), found.stopped_R.tolist()
    starts = range(0, len(rows), outputs)
    quality = [
        [examples.score(instance, examples.text(rows[at])) if stopped[at] else 0.0 for at in range(start, start + outputs)]
        for start, instance in zip(starts, instances, strict=True)
    ]
    answers = [[row.astype("int64") for row in rows[start : start + outputs]] for start in starts]
    return sampled_pairs(asked, answers, quality, annotator, seed)
