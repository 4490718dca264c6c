"""Which tasks a run trains on, and by which it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hardware.text import quoted
from sparse_update.plugins import import_plugins
from sparse_update.tasks.base import FORMS, Task, TaskError, make_task
from sparse_update.tasks.splits import SPLITS


@dataclass
class TaskConfig:
    """Tasks of a run. Raises ValueError at construction for values outside their range."""

    name: str = ""
    """Name in tables; empty: those of the tasks."""
    tasks: list[str] = field(default_factory=list)
    """Tasks to train on, NAME, NAME:LEVEL or NAME:FIRST-LAST, for instance sums:1-2; gym:DATASET is one of reasoning-gym,
    gym:DATASET:1-2 with levels."""
    unseen: list[str] = field(default_factory=list)
    """Tasks that are judged too and never trained on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a task by its name, for instance {modular: {largest: 9}}."""
    form: str = "instruction"
    """instruction (a request in natural language) or short ("17+25=")"""
    rows: int = 0
    """Different rows, or prompts, that training shows, again and again in new orders; 0: new ones without end."""
    packed: bool = True
    """Several examples in a row, which do not see each other; false: one in each, the rest of the row stays empty."""
    judged: int = 256
    """Questions by which the model is judged, of each task, or as many as its levels have; the same in every run."""
    split: str = "held_out"
    """held_out, or development to choose settings by"""
    new_tokens: int = 32
    """Tokens of an answer that is judged, at most."""
    plugins: list[str] = field(default_factory=list)
    """Modules imported first: they register tasks of your own."""

    def __post_init__(self) -> None:
        import_plugins("task.plugins", self.plugins)
        if self.form not in FORMS:
            raise ValueError(f"task.form = {quoted(self.form)}: one of {', '.join(FORMS)}")
        if self.split not in SPLITS[1:]:
            raise ValueError(f"task.split = {quoted(self.split)}: one of {', '.join(SPLITS[1:])}")
        for name in ("judged", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} = {getattr(self, name)}: must be at least 1")
        if self.rows < 0:
            raise ValueError(f"task.rows = {self.rows}: must not be negative (0: without end)")
        if self.unseen and not self.tasks:
            raise ValueError("task.unseen without task.tasks: name the tasks to train on")
        for spec in (*self.tasks, *self.unseen):
            parsed(spec)
        if both := sorted({parsed(spec)[0] for spec in self.tasks} & {parsed(spec)[0] for spec in self.unseen}):
            raise ValueError(
                f"task.unseen holds {', '.join(both)}, which task.tasks trains on: leave it out of one of them"
            )

    @property
    def label(self) -> str:
        """What tables call the stream."""
        return self.name or "+".join(parsed(spec)[0].replace(":", "_") for spec in self.tasks)

    def made(self, specs: list[str]) -> list[tuple[Task, tuple[int, ...]]]:
        """The tasks of these texts with the levels asked for, () for all. Raises TaskError, as `make_task`."""
        found = []
        for spec in specs:
            name, levels = parsed(spec)
            options = dict(self.options.get(name.partition(":")[0], {}))
            if name.startswith("gym:"):
                options["dataset"] = name.partition(":")[2]
            task = make_task(name.partition(":")[0], options)
            if levels and not set(levels) <= set(task.levels):
                raise TaskError(f"task {spec}: {task.label} has levels {task.levels.start} to {task.levels[-1]}")
            found.append((task, levels))
        return found


def parsed(spec: str) -> tuple[str, tuple[int, ...]]:
    """("sums", (1, 2)) of "sums:1-2". Raises ValueError for a text that names no levels that way."""
    parts = spec.split(":")
    named = 2 if parts[0] == "gym" else 1
    if not parts[0] or len(parts) > named + 1 or len(parts) < named:
        raise ValueError(f"task {quoted(spec)}: NAME, NAME:LEVEL or NAME:FIRST-LAST, or gym:DATASET")
    name, levels = ":".join(parts[:named]), parts[named:]
    if not levels:
        return name, ()
    first, _, last = levels[0].partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(first) > int(last or first):
        raise ValueError(f"task {quoted(spec)}: levels are LEVEL or FIRST-LAST, such as {name}:2 or {name}:1-3")
    return name, tuple(range(int(first), int(last or first) + 1))
