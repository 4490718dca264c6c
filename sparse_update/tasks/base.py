"""What a task is, and how one is found by name: `make_task("sums").instance(seed=0, index=0, level=2)`.

A task makes instances, each a question with its reference answers, and scores what a model answered. An instance is a pure
function of (seed, index, level), so that nothing is stored and any process can make any instance.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hardware.text import quoted
from sparse_update.tasks.draw import Draw, number_of

FORMS = ("short", "instruction")
"""How an instance is put into words: as short as it goes, or as a request in natural language."""
END = "\x03"
"""Closes every answer ("end of text" of ASCII): one byte, a token of every tokenizer here, and in no question."""


class TaskError(ValueError):
    """A task, a level, an option or a split that there is not, or a task that breaks its contract."""


class VerifierError(RuntimeError):
    """A verifier that raised, or gave something else than a number from 0 to 1."""


@dataclass(frozen=True)
class Instance:
    """One question of a task."""

    task: str
    """Name of the task, with its data set where it has several."""
    level: int
    seed: int
    index: int
    short: str
    """The question in few characters, such as "17+25="."""
    instruction: str
    """The question as a request in natural language."""
    answers: tuple[str, ...]
    """Right answers; the first one is the reference that likelihood is trained on. There may be others, which only the
    verifier knows."""
    key: str
    """What the split is drawn from; equal questions have equal keys."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier needs: plain values."""

    @property
    def answer(self) -> str:
        """The reference."""
        return self.answers[0]

    @property
    def id(self) -> int:
        """64-bit number of the question, for random streams that belong to it."""
        return number_of(self.task, self.key)

    def question(self, form: str = "instruction") -> str:
        """The question in one of `FORMS`. Raises TaskError for another form."""
        if form not in FORMS:
            raise TaskError(f"form {quoted(form)}: one of {', '.join(FORMS)}")
        return self.short if form == "short" else self.instruction


class Task(ABC):
    """A family of questions with levels of difficulty and a verifier. A subclass gives `make` and `verify`."""

    name: ClassVar[str] = ""
    levels: range = range(1, 2)
    """Levels of difficulty, ascending."""
    wordings: tuple[str, ...] = ("{}",)
    """Requests in natural language with a place for the question; one is drawn for each instance."""

    @property
    def label(self) -> str:
        """Its name in instances and tables."""
        return self.name

    @abstractmethod
    def make(self, draw: Draw, level: int) -> Made:
        """One instance, from nothing but `draw` and the level."""

    @abstractmethod
    def verify(self, instance: Instance, answer: str) -> float:
        """Score of an answer in [0, 1]: 1 for a right one. Called by `score`, which checks it."""

    def instance(self, seed: int, index: int, level: int) -> Instance:
        """The instance with this number. Raises TaskError for an unknown level, and for a task that gives no answer or
        one that holds the closing character."""
        if level not in self.levels:
            raise TaskError(f"task {self.label} has no level {level}: {self.levels.start} to {self.levels[-1]}")
        made = self.make(Draw(self.label, seed, index, level), level)
        if not made.answers or any(END in text for text in (made.question, made.short, *made.answers)):
            raise TaskError(
                f"task {self.label}, seed {seed}, index {index}, level {level}: a question needs an answer, and neither "
                f"may hold the closing character {END!r}; got {quoted(str(made.answers))}"
            )
        key = made.key or made.question
        wording = self.wordings[number_of("wording", key) % len(self.wordings)]
        instruction = wording.replace("{}", made.question)
        short = made.short or made.question
        return Instance(self.label, level, seed, index, short, instruction, made.answers, key, made.facts)

    def score(self, instance: Instance, answer: str) -> float:
        """Score of what a model answered, in [0, 1]; the text after the closing character is not part of it.

        Raises VerifierError where the verifier raises, or gives NaN or a number outside [0, 1]; TaskError for another
        task's instance.
        """
        if instance.task != self.label:
            raise TaskError(f"task {self.label} was given an instance of {instance.task}: ask the task that made it")
        text = answer.partition(END)[0]
        where = f"verifier of {self.label}, seed {instance.seed}, index {instance.index}, level {instance.level}"
        try:
            found = self.verify(instance, text)
            score = float(found)
        except Exception as error:
            raise VerifierError(
                f"{where}: {type(error).__name__} on the answer {quoted(text)} ({quoted(str(error))}); a verifier must "
                "score every text, 0 where it is no answer"
            ) from error
        if math.isnan(score) or not 0 <= score <= 1:
            raise VerifierError(f"{where}: score {score} for the answer {quoted(text)}; a number from 0 to 1 is needed")
        return score

    def score_all(self, instance: Instance, answers: Sequence[str]) -> list[float]:
        """`score` of several answers to one question."""
        return [self.score(instance, answer) for answer in answers]


@dataclass(frozen=True)
class Made:
    """What a task makes of a draw: the question as it stands in a request, and what belongs to it."""

    question: str
    answers: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    short: str = ""
    """"" for the question itself."""
    key: str = ""
    """What the split is drawn from, "" for the question: a key that several questions share keeps them in one split."""


TASKS: dict[str, type[Task]] = {}
C = TypeVar("C", bound=type[Task])


def register_task(name: str) -> Callable[[C], C]:
    """Class decorator: makes a Task known under `name`, so that settings can ask for it. A taken name is refused."""

    def keep(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, Task)):
            raise TaskError(f"task {name!r}: {cls!r} is no subclass of sparse_update.tasks.Task")
        if name in TASKS:
            raise TaskError(f"task {name!r} is taken by {TASKS[name].__qualname__}: choose another name")
        cls.name = name
        TASKS[name] = cls
        return cls

    return keep


def task_names() -> list[str]:
    """Known tasks."""
    return sorted(TASKS)


def task_options(name: str) -> list[str]:
    """Names of the options of task `name`. Raises TaskError for an unknown one, with the list."""
    if name not in TASKS:
        raise TaskError(f"there is no task {quoted(name)}: one of {', '.join(task_names())}, or register_task your own")
    if TASKS[name].__init__ is object.__init__:
        return []
    return [option for option in inspect.signature(TASKS[name].__init__).parameters if option != "self"]


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task `name` with its options. Raises TaskError for an unknown name or option, with the known ones."""
    known, chosen = task_options(name), dict(options or {})
    if unknown := sorted(set(chosen) - set(known)):
        raise TaskError(f"task {name!r} has no option {', '.join(unknown)}: it takes {', '.join(known) or 'none'}")
    return TASKS[name](**chosen)
