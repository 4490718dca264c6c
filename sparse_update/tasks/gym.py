"""Tasks that nobody here wrote: the data sets of reasoning-gym (Apache-2.0, extra `tasks`), with their own scorers.

    make_task("gym", {"dataset": "chain_sum"})

A data set of theirs gives instance `i` from `Random(seed + i)`, so that two seeds share nearly all instances; here each
instance has a number of its own, 31 bits of the hash of (seed, index, level), under their seed 0. Splits go by the
question, as everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hardware.text import quoted
from sparse_update.tasks.base import Instance, Made, Task, TaskError, register_task
from sparse_update.tasks.draw import Draw

INSTALL = "pip install 'spikegate[tasks]' (reasoning-gym>=0.1.25)"
RUNS_ANSWERS = "its scorer runs the answer as Python code, and an answer is what a model wrote"
NOT_THE_SAME = "its instances depend on Python's hash seed, so that two processes have different ones"
NO_REFERENCE = "it has no reference answer that its own scorer takes for right"
MADE_AT_ONCE = "its instances are chosen all at once when it is made, so that none can be had by a number"
TOO_KIND = "its scorer gives wrong answers that begin like the right one a score of 1, and above it by rounding"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("binary_matrix", "countdown", "intermediate_integration", "n_queens"), RUNS_ANSWERS),
    **dict.fromkeys(("polynomial_multiplication", "puzzle24", "simple_integration"), RUNS_ANSWERS),
    **dict.fromkeys(("spiral_matrix", "string_insertion"), RUNS_ANSWERS),
    **dict.fromkeys(("isomorphic_strings", "ransom_note"), NOT_THE_SAME),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), NO_REFERENCE),
    **dict.fromkeys(("acre", "composite", "gsm_symbolic", "list_functions", "word_ladder"), MADE_AT_ONCE),
    "knight_swap": "it refuses the first level of its own curriculum",
    "spell_backward": TOO_KIND,
}
"""Data sets of reasoning-gym 0.1.25 that are not taken, and why."""
BITS = 31


@register_task("gym")
class Gym(Task):
    """One data set of reasoning-gym. Its levels are those of its curriculum, if it has one: at level k every attribute
    has its k-th value, or its last, up to the last level that the data set takes.

    A scorer of theirs that raises on a text has not found an answer in it: 0.

    Args:
        dataset: its name there.
        settings: of the data set's configuration, over those of the level.

    Raises TaskError where reasoning-gym is missing, for a data set that there is not, one of `REFUSED`, and settings that
    it refuses.
    """

    wordings = ("{}",)

    def __init__(self, dataset: str, settings: Mapping[str, Any] | None = None) -> None:
        library = _library()
        names = [name for name in sorted(library.DATASETS) if name not in REFUSED]
        if dataset in REFUSED:
            raise TaskError(f"task gym: data set {dataset} is not taken: {REFUSED[dataset]}")
        if dataset not in names:
            raise TaskError(f"task gym: reasoning-gym has no data set {quoted(dataset)}: one of {', '.join(names)}")
        self.dataset, self.settings = dataset, dict(settings or {})
        self._library = library
        self._made: dict[int, Any] = {}
        self._configured: list[dict[str, Any]] = []
        for level in range(1, self._count() + 1):
            try:
                self._configured.append(self._settings(level))
            except (AssertionError, TypeError, ValueError) as error:
                if level == 1:
                    reason = quoted(str(error))
                    raise TaskError(f"task {self.label}: reasoning-gym refuses these settings: {reason}") from error
                break  # a curriculum may go on to values that its own data set refuses
        self.levels = range(1, len(self._configured) + 1)

    @property
    def label(self) -> str:
        return f"gym[{self.dataset}]"

    def make(self, draw: Draw, level: int) -> Made:
        number = draw.between(0, 2**BITS - 1)
        entry = self._at(level)[number]
        answer = entry["answer"]
        if not isinstance(answer, str):
            raise TaskError(f"task {self.label}: {NO_REFERENCE} (instance {number})")
        return Made(entry["question"], (answer,), {"entry": entry})

    def verify(self, instance: Instance, answer: str) -> float:
        try:
            return float(self._at(instance.level).score_answer(answer.strip(), instance.facts["entry"]))
        except (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError):
            return 0.0

    def _count(self) -> int:
        """Levels of the curriculum; 1 without one."""
        if not self._library.has_curriculum(self.dataset):
            return 1
        attributes = self._library.create_curriculum(self.dataset).attributes.values()
        return max((len(attribute.levels) for attribute in attributes), default=1)

    def _settings(self, level: int) -> dict[str, Any]:
        """Of the data set at a level, as its configuration takes them."""
        given = {"seed": 0, "size": 2**BITS, **self.settings}
        if self._library.has_curriculum(self.dataset):
            curriculum = self._library.create_curriculum(self.dataset)
            for name, attribute in curriculum.attributes.items():
                curriculum.set_attr_level(name, min(level, len(attribute.levels)) - 1)
            given = {**vars(curriculum.generate_configuration()), **given}
        config = self._library.DATASETS[self.dataset][1](**given)
        if hasattr(config, "validate"):
            config.validate()
        return given

    def _at(self, level: int) -> Any:
        """Their data set at a level."""
        if level not in self._made:
            self._made[level] = self._library.create_dataset(self.dataset, **self._configured[level - 1])
        return self._made[level]


def gym_datasets() -> list[str]:
    """Names of the data sets that `dataset` may be. Raises TaskError where reasoning-gym is missing."""
    return [name for name in sorted(_library().DATASETS) if name not in REFUSED]


def _library() -> Any:
    try:
        importlib.import_module("reasoning_gym")
        return importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        raise TaskError(f"task gym needs the package reasoning-gym: {INSTALL} ({error})") from error
