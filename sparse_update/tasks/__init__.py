"""Tasks with verifiers: questions by (seed, index, level), reference answers, and a score in [0, 1] for any other answer.

`make_task("sums")` makes one, `@register_task("mine")` adds one, `TaskStream([(task, [1, 2])], "train")` reads one.
"""

from sparse_update.tasks import arithmetic, countdown, gym, texts  # noqa: F401
from sparse_update.tasks.base import (
    END,
    FORMS,
    TASKS,
    Instance,
    Made,
    Task,
    TaskError,
    VerifierError,
    make_task,
    register_task,
    task_names,
    task_options,
)
from sparse_update.tasks.draw import Draw
from sparse_update.tasks.encoding import Encoded, PromptTooLong, encoded, prompt_text
from sparse_update.tasks.gym import gym_datasets
from sparse_update.tasks.splits import SPLITS, TaskStream, distinct, split_of

__all__ = [
    "END",
    "FORMS",
    "SPLITS",
    "TASKS",
    "Draw",
    "Encoded",
    "Instance",
    "Made",
    "PromptTooLong",
    "Task",
    "TaskError",
    "TaskStream",
    "VerifierError",
    "distinct",
    "encoded",
    "gym_datasets",
    "make_task",
    "prompt_text",
    "register_task",
    "split_of",
    "task_names",
    "task_options",
]
