"""Instances as tokens: the question, a line break, the answer, the closing character.

Question and answer are encoded apart, so that a question has the same tokens whatever follows it: what a model was trained
on is what it is asked later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_update.data.tokens import Tokenizer
from sparse_update.tasks.base import END, Instance

BREAK = "\n"


class PromptTooLong(ValueError):
    """A question that leaves no room in the model's context."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """An instance as token numbers, int64."""

    prompt: np.ndarray
    """(P,) question and line break"""
    answer: np.ndarray
    """(A,) an answer and the closing character"""

    @property
    def tokens(self) -> np.ndarray:
        """(P + A,)"""
        return np.concatenate((self.prompt, self.answer))

    @property
    def answer_mask(self) -> np.ndarray:
        """bool (P + A - 1,): which predicted tokens, of `tokens[1:]`, are the answer's."""
        return np.arange(1, len(self.prompt) + len(self.answer)) >= len(self.prompt)


def prompt_text(instance: Instance, form: str = "instruction") -> str:
    """What a model reads before it answers."""
    return instance.question(form) + BREAK


def encoded(
    tokenizer: Tokenizer, instances: Sequence[Instance], form: str = "instruction", context: int | None = None
) -> list[Encoded]:
    """Every instance with its reference answer.

    Args:
        form: "short" or "instruction".
        context: tokens that the model reads in a row, None for no limit. A row is trained on without its last token.

    Raises:
        PromptTooLong: a question and its answer do not fit the context; names the instance.
    """
    prompts = tokenizer.encode([prompt_text(instance, form).encode() for instance in instances])
    answers = tokenizer.encode([(instance.answer + END).encode() for instance in instances])
    found = [
        Encoded(prompt.astype(np.int64), answer.astype(np.int64)) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for instance, one in zip(instances, found, strict=True):
        length = len(one.prompt) + len(one.answer)
        if context is not None and length - 1 > context:
            raise PromptTooLong(
                f"{instance.task}, level {instance.level}, seed {instance.seed}, index {instance.index}: question and "
                f"answer are {length} tokens, the model reads {context} in a row: take a lower level, form=short, or a "
                "longer context"
            )
    return found
