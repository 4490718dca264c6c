"""Parts of the study on learned objectives: runs as commands of their own, a reward model from a run's own answers, and how
many right answers a model knows.

Shape letters: P questions, N outputs of each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.runs.folder import RunError, read_json
from sparse_update.data.tokens import Tokenizer, tokenizer_from_record
from sparse_update.generation import GenerateConfig, Sampler, stop_tokens
from sparse_update.loop.checkpoint import load_checkpoint
from sparse_update.loop.stored_model import stored_model
from sparse_update.objectives.preference.calibration import Calibration, calibration, log_odds
from sparse_update.objectives.preference.pairs import Annotator, Pair, sampled_pairs
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.training import FitConfig, fit_reward
from sparse_update.tasks import END, Instance, TaskStream, distinct, encoded, make_task
from sparse_update.transformer import Transformer

SAMPLING_SEED = 77


@dataclass(frozen=True)
class Questions:
    """The task of the study."""

    task: str = "countdown"
    levels: tuple[int, ...] = (1, 2)
    new_tokens: int = 12

    def stream(self, split: str, seed: int) -> TaskStream:
        return TaskStream([(make_task(self.task), self.levels)], split, seed)

    @property
    def words(self) -> list[str]:
        """For `spikegate train`."""
        tasks = f"task.tasks=[{self.task}:{self.levels[0]}-{self.levels[-1]}]"
        return [f"task={self.task}", tasks, "task.form=short", f"task.new_tokens={self.new_tokens}"]


def run(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The result of a training run, made where it is not there yet; `words`: its settings.

    Raises RunError where it fails, with the end of what it said.
    """
    if (folder / "result.json").exists() and read_json(folder / "result.json").get("status") == "finished":
        return read_json(folder / "result.json")
    command = [sys.executable, "-m", "experiments.train", *words, f"run={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RunError(f"{' '.join(command[3:])} ended with {done.returncode}: {done.stderr[-600:]}")
    return read_json(folder / "result.json")


def trained(folder: Path) -> tuple[Transformer, Tokenizer]:
    """The model of a finished run, and its tokenizer."""
    found = load_checkpoint(folder / "checkpoint")
    return stored_model(found).requires_grad_(False).eval(), tokenizer_from_record(found.meta["tokenizer"])


def sampled(
    model: Transformer, tokenizer: Tokenizer, instances: Sequence[Instance], n: int, new_tokens: int
) -> tuple[list[np.ndarray], list[list[np.ndarray]], list[list[str]]]:
    """Prompts, and for each n answers as tokens and as texts without what closes them."""
    prompts = [row.prompt for row in encoded(tokenizer, instances, "short")]
    sampler = Sampler(model, GenerateConfig(new_tokens=new_tokens, n=n, seed=SAMPLING_SEED), stop_tokens(tokenizer))
    rows = list(sampler.sample(prompts, [instance.id for instance in instances]))
    texts = [tokenizer.decode(row).decode(errors="replace").partition(END)[0] for row in rows]
    starts = range(0, len(rows), n)
    return prompts, [rows[i : i + n] for i in starts], [texts[i : i + n] for i in starts]


def pairs_of(
    model: Transformer, tokenizer: Tokenizer, asked: Questions, split: str, count: int, seed: int, annotator: Annotator
) -> list[Pair]:
    """Pairs of the model's own answers to `count` questions of a split."""
    instances = asked.stream(split, 500 + seed).take(count)
    prompts, rows, texts = sampled(model, tokenizer, instances, 8, asked.new_tokens)
    task = make_task(asked.task)
    quality = [task.score_all(instance, found) for instance, found in zip(instances, texts, strict=True)]
    return sampled_pairs(prompts, rows, quality, annotator, seed)


def learned_reward(start: Path, folder: Path, asked: Questions, questions: int, seed: int) -> Calibration:
    """A reward model in `folder`, learned from pairs of the answers of the run `start`, judged on development questions.

    Annotators prefer right answers with log-odds of 4, and have no other liking.
    """
    model, tokenizer = trained(start)
    annotator = Annotator(quality_weight=4.0)
    learned_from = pairs_of(model, tokenizer, asked, "train", questions, seed, annotator)
    judged_by = pairs_of(model, tokenizer, asked, "development", questions // 4, seed, annotator)
    torch.manual_seed(seed)
    reward = RewardModel.of(model, tokenizer).requires_grad_(True)
    fit_reward(reward, learned_from, FitConfig(epochs=3, lr=2e-3, seed=seed))
    reward.calibrate([row for pair in learned_from for row in pair.rows])
    reward.save(folder, {"pairs": len(learned_from)})
    return calibration(log_odds(reward, judged_by))


@dataclass(frozen=True)
class Knows:
    """What a model answers when it is asked often."""

    right: float
    """Share of sampled answers that are right"""
    solved: float
    """Share of questions with a right answer among N"""
    different: float
    """Right answers that differ, a question that was solved"""
    reference: float
    """Share of the right answers that are the reference, to the letter"""


def knows(folder: Path, asked: Questions, questions: int, n: int) -> Knows:
    """Sample N answers to each of some held-out questions, by the model of a run."""
    model, tokenizer = trained(folder)
    instances = distinct(asked.stream("held_out", 900), questions)
    _, _, texts = sampled(model, tokenizer, instances, n, asked.new_tokens)
    task = make_task(asked.task)
    right = [
        [text for text, score in zip(found, task.score_all(instance, found), strict=True) if score == 1]
        for instance, found in zip(instances, texts, strict=True)
    ]
    total, solved = sum(map(len, right)), [found for found in right if found]
    same = sum(text == instance.answer for instance, found in zip(instances, right, strict=True) for text in found)
    return Knows(
        total / (questions * n),
        len(solved) / questions,
        float(np.mean([len(set(found)) for found in solved])) if solved else 0.0,
        same / total if total else 0.0,
    )
