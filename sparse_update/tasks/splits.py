"""Training, development and held-out instances that share no question, drawn by hash and never stored.

Which split a question belongs to follows from its key alone (BLAKE2b of it), so that it is the same for every seed, level,
index and process: what one run trains on, no other run is judged by. The shares are 80, 10 and 10 % of the questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hardware.text import quoted
from sparse_update.tasks.base import Instance, Task, TaskError
from sparse_update.tasks.draw import number_of

SPLITS = ("train", "development", "held_out")
PARTS = 10
"""Of ten equal parts of all questions, the last is held out, the one before is for development."""
MOST_MISSES = 2000
"""Draws in a row that give nothing new until a level counts as too small."""


def split_of(instance: Instance) -> str:
    """The split of a question: one of `SPLITS`."""
    part = number_of("split", instance.key) % PARTS
    return SPLITS[max(0, part - (PARTS - len(SPLITS)))]


class TaskStream:
    """Instances of one split, one after the other, over tasks and levels; resumable to the instance.

    Draw i of the stream is task i mod (number of tasks), at a level that is drawn evenly from those asked for; draws of
    another split are passed over. `position` is the next draw's number.

    Args:
        tasks: each with the levels wanted of it, none for all of its levels.
        split: one of `SPLITS`.
        seed: another seed, another order (the splits stay).

    Raises TaskError for no task, an unknown split or level, and, while reading, where a task has no instance of the split
    at the levels asked for.
    """

    def __init__(self, tasks: Sequence[tuple[Task, Sequence[int]]], split: str, seed: int = 0) -> None:
        if not tasks:
            raise TaskError("a stream of no tasks: name at least one")
        if split not in SPLITS:
            raise TaskError(f"split {quoted(split)}: one of {', '.join(SPLITS)}")
        self.tasks = [(task, tuple(levels) or tuple(task.levels)) for task, levels in tasks]
        for task, levels in self.tasks:
            for level in levels:
                if level not in task.levels:
                    known = f"{task.levels.start} to {task.levels[-1]}"
                    raise TaskError(f"task {task.label} has no level {level}: {known}")
        self.split, self.seed = split, seed
        self.position = 0

    def __iter__(self) -> Iterator[Instance]:
        return self

    def __next__(self) -> Instance:
        return self.pair()[1]

    def pair(self) -> tuple[Task, Instance]:
        """The next instance with the task that scores it."""
        for _ in range(MOST_MISSES * len(self.tasks)):
            number = self.position
            self.position += 1
            task, levels = self.tasks[number % len(self.tasks)]
            level = levels[number_of("level", self.seed, number) % len(levels)]
            found = task.instance(self.seed, number, level)
            if split_of(found) == self.split:
                return task, found
        names = ", ".join(task.label for task, _ in self.tasks)
        raise TaskError(
            f"{names}: no {self.split} instance among {MOST_MISSES * len(self.tasks)} draws: ask for a level with more "
            "questions"
        )

    def take(self, count: int) -> list[Instance]:
        """The next so many, which may hold a question twice."""
        return [next(self) for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {"task_stream_position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["task_stream_position"])


def distinct(stream: TaskStream, count: int, fewer: bool = False) -> list[Instance]:
    """The next `count` instances with no question twice, to judge a model by.

    Where `MOST_MISSES` instances in a row are old, the levels have too few questions: TaskError, or all that were found
    where `fewer` will do.
    """
    found: dict[str, Instance] = {}
    misses = 0
    while len(found) < count:
        instance = next(stream)
        known = instance.key in found
        misses = misses + 1 if known else 0
        if misses >= MOST_MISSES:
            if fewer:
                break
            raise TaskError(
                f"{instance.task}: only {len(found)} different {stream.split} questions found, {count} were asked for: "
                "take fewer, or a higher level"
            )
        if not known:
            found[instance.key] = instance
    return list(found.values())
