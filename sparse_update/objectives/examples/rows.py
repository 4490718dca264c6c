"""Rows of tokens with what an objective needs beside them, and the streams that give them.

A row is a pure function of its number, and `Batch.window` is that number. So a gate, a mesh or a checkpoint handles windows
of tokens as ever, and whatever belongs to a row (which tokens count, which texts lie in it, whose question it is) is looked
up by the number when it is needed.

Shape letters: N rows, T predicted tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_update.data.records import Batch
from sparse_update.data.stream import EpochOrder, Stream
from sparse_update.data.tokens import Tokenizer
from sparse_update.tasks.base import Instance, Task, TaskError
from sparse_update.tasks.draw import number_of
from sparse_update.tasks.encoding import PromptTooLong, encoded, prompt_text
from sparse_update.tasks.splits import TaskStream
from sparse_update.transformer import Packing

ENDLESS = 1 << 40
"""Rows of a stream that ends nowhere."""
KEPT = 4096
"""Rows that are kept in memory, made."""
DRAWS = 4096
"""Draws of the tasks' stream that belong to one row, far more than one uses."""
MISSES = 4
"""Examples that do not fit a row any more before it is left as it is."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row, NumPy arrays of int64 (float32 for the weight)."""

    tokens_T1: np.ndarray
    weight_T: np.ndarray
    segment_T: np.ndarray
    position_T: np.ndarray
    length: int
    """tokens before what is empty"""
    instances: tuple[Instance, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows together."""

    tokens_NT1: Tensor
    """int64"""
    weight_NT: Tensor
    """float32: 1 for a predicted token that counts, 0 for others, such as a prompt's"""
    packing: Packing | None
    """int64 (N, T) each; None where a row holds one text, from its beginning"""
    lengths_N: Tensor
    """int64: tokens of each row before what is empty"""
    instances: tuple[tuple[Instance, ...], ...]
    """the questions in each row, in order"""

    def __len__(self) -> int:
        return len(self.instances)

    def part(self, which: slice) -> Rows:
        """Some of them."""
        packing = self.packing and Packing(self.packing.segment_BT[which], self.packing.position_BT[which])
        return Rows(self.tokens_NT1[which], self.weight_NT[which], packing, self.lengths_N[which], self.instances[which])


def together(rows: Sequence[Row], packed: bool) -> Rows:
    """Several rows as tensors."""

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    packing = Packing(stacked("segment_T"), stacked("position_T")) if packed else None
    lengths_N = torch.tensor([row.length for row in rows])
    return Rows(stacked("tokens_T1"), stacked("weight_T"), packing, lengths_N, tuple(row.instances for row in rows))


class RowStream(Stream):
    """A stream whose windows are rows, each a function of its number and the seed.

    Args:
        tasks: each with the levels wanted of it, () for all.
        split: of `tasks.SPLITS`.
        context: tokens that the model reads.
        rows: different rows, shown in another order each epoch; 0: without end.
    """

    def __init__(
        self,
        tasks: Sequence[tuple[Task, Sequence[int]]],
        split: str,
        tokenizer: Tokenizer,
        form: str,
        context: int,
        seed: int,
        rows: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.split, self.tokenizer, self.form = list(tasks), split, tokenizer, form
        self.context, self.seed = context, seed
        self.windows = rows or ENDLESS
        self.source_names = tuple(task.label for task, _ in self.tasks)
        self._order = EpochOrder(seed, rows) if rows else None
        self._made: OrderedDict[int, Row] = OrderedDict()

    @abstractmethod
    def make(self, number: int) -> Row:
        """The row of that number."""

    @property
    def packed(self) -> bool:
        """Whether a row may hold several texts."""
        return False

    def row(self, number: int) -> Row:
        """The row of that number, from memory where it was made lately."""
        found = self._made.get(number)
        if found is None:
            found = self._made[number] = self.make(number)
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        return found

    def rows(self, window_N: Tensor) -> Rows:
        """What belongs to the windows of these numbers, int64 (N,): `Batch.window`."""
        return together([self.row(int(number)) for number in window_N], self.packed)

    def read(self, start: int, n: int) -> Batch:
        place = np.arange(start, start + n, dtype=np.int64)
        number = place if self._order is None else self._order.at(place)
        rows = [self.row(int(one)) for one in number]
        tokens = torch.from_numpy(np.stack([row.tokens_T1 for row in rows]))
        source = [self.source_names.index(row.instances[0].task) for row in rows]
        return Batch(tokens, torch.tensor(source, dtype=torch.int8), torch.from_numpy(number))

    def _check_batch(self, n: int) -> None:
        if not 1 <= n <= self.windows:
            raise TaskError(
                f"a batch of {n} rows: task.rows = {self.windows}, and no row may come twice in a batch; raise "
                "task.rows, or "
                "set it to 0"
            )

    def _identity(self) -> dict[str, int | float]:
        what = [(task.label, tuple(levels)) for task, levels in self.tasks]
        told = number_of(what, self.split, self.form, self.packed, self.tokenizer.vocab_size) >> 12  # fits a float64
        return {"windows": self.windows, "context": self.context, "seed": self.seed, "tasks": told}

    def _draws(self, number: int) -> TaskStream:
        """The questions of a row: a stretch of the tasks' stream of its own, that begins with another task each time."""
        stream = TaskStream(self.tasks, self.split, self.seed)
        stream.position = number * (len(self.tasks) * DRAWS + 1)
        return stream


class ExampleStream(RowStream):
    """Rows of questions with their reference answers, whose tokens count; as many in a row as fit, or one.

    Raises PromptTooLong, while reading, for a question that does not fit the context with its answer.
    """

    def __init__(self, *args: object, packed: bool = True, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self._packed = packed

    @property
    def packed(self) -> bool:
        return self._packed

    def make(self, number: int) -> Row:
        draws, room, misses = self._draws(number), self.context + 1, 0
        chosen: list[tuple[Instance, np.ndarray, np.ndarray]] = []
        while misses < MISSES and (self._packed or not chosen):
            instance = next(draws)
            one = encoded(self.tokenizer, [instance], self.form, self.context)[0]
            if len(one.tokens) > room:
                misses += 1
                continue
            chosen.append((instance, one.tokens, one.answer_mask))
            room -= len(one.tokens)
        return example_row(chosen, self.context)


def example_row(chosen: Sequence[tuple[Instance, np.ndarray, np.ndarray]], context: int) -> Row:
    """A row of examples one after the other: (instance, tokens (L,), answer mask (L - 1,)) each."""
    tokens = np.zeros(context + 1, dtype=np.int64)
    weight = np.zeros(context + 1, dtype=np.float32)
    segment = np.full(context + 1, len(chosen), dtype=np.int64)
    position = np.zeros(context + 1, dtype=np.int64)
    at = 0
    for place, (_, own, mask) in enumerate(chosen):
        end = at + len(own)
        tokens[at:end], segment[at:end], position[at:end] = own, place, np.arange(len(own))
        weight[at : end - 1] = mask
        at = end
    position[at:] = np.arange(context + 1 - at)
    return Row(tokens, weight[:-1], segment[:-1], position[:-1], at, tuple(instance for instance, _, _ in chosen))


class PromptStream(RowStream):
    """Rows of one prompt each, from their beginning; nothing of them counts: what follows is sampled.

    Args:
        room: tokens that are to be sampled, which must fit behind a prompt.

    Raises PromptTooLong, while reading, for a prompt that leaves less.
    """

    def __init__(self, *args: object, room: int = 1, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.room = room

    def make(self, number: int) -> Row:
        instance = next(self._draws(number))
        prompt = prompt_tokens(self.tokenizer, instance, self.form)
        if len(prompt) + self.room > self.context:
            raise PromptTooLong(
                f"{instance.task}, level {instance.level}, seed {instance.seed}, index {instance.index}: the prompt has "
                f"{len(prompt)} tokens, and {self.room} new ones do not fit a context of {self.context}: lower the tokens "
                "that are sampled, take a lower level, task.form=short, or a model with a longer context"
            )
        tokens = np.zeros(self.context + 1, dtype=np.int64)
        tokens[: len(prompt)] = prompt
        place = np.arange(self.context)
        none = np.zeros(self.context, dtype=np.float32)
        return Row(tokens, none, np.zeros(self.context, dtype=np.int64), place, len(prompt), (instance,))


def prompt_tokens(tokenizer: Tokenizer, instance: Instance, form: str) -> np.ndarray:
    """What a model reads before it answers, int64 (tokens,)."""
    return tokenizer.encode([prompt_text(instance, form).encode()])[0].astype(np.int64)
