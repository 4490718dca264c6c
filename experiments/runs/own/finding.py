"""PACKAGE:FUNCTION to the task that it returns."""

from __future__ import annotations

from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.reference import called
from sparse_update.own.task import TaskError, UserTask


def find_task(word: str) -> UserTask:
    """Import the module, from the working directory too, and call the function.

    Raises ConfigError where there is no such module or function, or where it returns anything but a `UserTask`. What goes
    wrong inside the function is told with the line that it went wrong in.
    """
    task = called(word, plain=(TaskError,))
    if not isinstance(task, UserTask):
        function = word.partition(":")[2]
        raise ConfigError(
            f"module = {word}: {function}() returns {type(task).__name__}, not a sparse_update.UserTask(model=..., "
            "train=..., held_out=...)"
        )
    return task
