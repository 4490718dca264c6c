"""Everything that an objective on tasks has: the stream it trains on, the sets it is judged by, the verifiers.

Shape letters: N rows, T predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparse_update.data.tokens import Tokenizer
from sparse_update.generation.sampler import Sampler
from sparse_update.generation.settings import GenerateConfig
from sparse_update.generation.text import stop_tokens
from sparse_update.objectives.examples.rows import (
    ExampleStream,
    PromptStream,
    Rows,
    example_row,
    prompt_tokens,
    together,
)
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.tasks.base import END, Instance, Task, TaskError
from sparse_update.tasks.encoding import PromptTooLong, encoded
from sparse_update.tasks.splits import TaskStream, distinct
from sparse_update.transformer import Transformer

JUDGING_SEED = 1_000_003
"""Seed of the questions that a model is judged by: the same for every run."""
HEADLINE = "val"
"""Name of the set of all trained tasks together."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The tasks of a run in one place.

    Raises TaskError for tasks, levels and options that there are not; PromptTooLong where a question that the model is
    judged by does not fit `context` with its answer.
    """

    cfg: TaskConfig
    tokenizer: Tokenizer
    context: int
    """tokens that the model reads"""
    seed: int
    """of the order of training"""

    def __post_init__(self) -> None:
        if not self.cfg.tasks:
            raise TaskError("no task to train on: task=sums, or task.tasks=[sums:1-2,sorting]")

    @cached_property
    def tasks(self) -> list[tuple[Task, tuple[int, ...]]]:
        """What is trained on."""
        return self.cfg.made(self.cfg.tasks)

    @cached_property
    def unseen(self) -> list[tuple[Task, tuple[int, ...]]]:
        """What is judged only."""
        return self.cfg.made(self.cfg.unseen)

    @cached_property
    def by_label(self) -> dict[str, Task]:
        return {task.label: task for task, _ in (*self.tasks, *self.unseen)}

    def score(self, instance: Instance, text: str) -> float:
        """The verifier's score of an answer, in [0, 1]. Raises VerifierError as `Task.score`, TaskError for an instance
        of a task that is none of these."""
        task = self.by_label.get(instance.task)
        if task is None:
            raise TaskError(f"an instance of {instance.task}: this run has {', '.join(self.by_label)}")
        return task.score(instance, text)

    def text(self, tokens: np.ndarray) -> str:
        """What a model answered, without what closes it; bytes that are no UTF-8 are shown as U+FFFD."""
        return self.tokenizer.decode(tokens).partition(END.encode())[0].decode(errors="replace")

    @cached_property
    def stop(self) -> list[int]:
        """Tokens that close an answer."""
        return stop_tokens(self.tokenizer)

    # streams

    def examples(self) -> ExampleStream:
        """Questions with their answers, for training."""
        cfg = self.cfg
        return ExampleStream(
            self.tasks, "train", self.tokenizer, cfg.form, self.context, self.seed, cfg.rows, packed=cfg.packed
        )

    def prompts(self, room: int) -> PromptStream:
        """Prompts with room for so many tokens, for training."""
        cfg = self.cfg
        return PromptStream(self.tasks, "train", self.tokenizer, cfg.form, self.context, self.seed, cfg.rows, room=room)

    # what it is judged by

    @cached_property
    def judged(self) -> dict[str, list[Instance]]:
        """Questions of the split to judge by, no question twice, by the task's label; fewer than `task.judged` where its
        levels have no more."""
        return {
            task.label: distinct(TaskStream([(task, levels)], self.cfg.split, JUDGING_SEED), self.cfg.judged, fewer=True)
            for task, levels in (*self.tasks, *self.unseen)
        }

    @cached_property
    def held_out(self) -> dict[str, Rows]:
        """The same as rows with the reference answers, one in each: by task, and "val" for those that are trained on."""
        trained = [instance for task, _ in self.tasks for instance in self.judged[task.label]]
        return {HEADLINE: self._rows(trained), **{name: self._rows(found) for name, found in self.judged.items()}}

    def _rows(self, instances: Sequence[Instance]) -> Rows:
        found = encoded(self.tokenizer, instances, self.cfg.form, self.context)
        rows = [
            example_row([(instance, one.tokens, one.answer_mask)], self.context)
            for instance, one in zip(instances, found, strict=True)
        ]
        return together(rows, packed=False)

    def greedy(self, model: Transformer, instances: Sequence[Instance]) -> list[float]:
        """Score of the likeliest answer to each question. Raises PromptTooLong where one leaves no room for a token."""
        prompts = [prompt_tokens(self.tokenizer, instance, self.cfg.form) for instance in instances]
        longest = max(map(len, prompts))
        room = min(self.cfg.new_tokens, model.cfg.context - longest)
        if room < 1:
            raise PromptTooLong(
                f"a question that the model is judged by has {longest} tokens, and its context is "
                f"{model.cfg.context}: take "
                "lower levels, task.form=short, or a longer context"
            )
        sampler = Sampler(model, GenerateConfig(new_tokens=room, temperature=0.0), self.stop)
        outputs = sampler.sample(prompts, [instance.id for instance in instances])
        return [
            self.score(instance, self.text(tokens)) if stopped else 0.0
            for instance, tokens, stopped in zip(instances, outputs, outputs.stopped_R, strict=True)
        ]

    def accuracy(self, model: Transformer) -> dict[str, float]:
        """Share of each task's questions that greedy decoding solves (the mean score, where scores lie between 0 and 1):
        "accuracy" over the trained tasks, "accuracy/TASK" for each, and "accuracy_unseen" over those never trained on."""
        each = {name: mean(self.greedy(model, found)) for name, found in self.judged.items()}
        found = {"accuracy": mean(each[task.label] for task, _ in self.tasks)}
        if self.unseen:
            found["accuracy_unseen"] = mean(each[task.label] for task, _ in self.unseen)
        return found | {f"accuracy/{name}": value for name, value in each.items()}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
