"""PACKAGE:FUNCTION to the task that it returns."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.settings import EXAMPLE, check_module
from hardware.text import short
from sparse_update.own.task import TaskError, UserTask


def find_task(word: str) -> UserTask:
    """Import the module, from the working directory too, and call the function.

    Raises ConfigError where there is no such module or function, or where it returns anything but a `UserTask`. What goes
    wrong inside the function is told with the line that it went wrong in.
    """
    check_module(word)
    name, _, function = word.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"module = {word}: there is no module {error.name} that Python can import, in {here} or elsewhere; written "
                f"without .py, such as {EXAMPLE}"
            ) from None
        raise ConfigError(f"module = {word}: {name} imports {error.name}, which is not installed") from None
    except Exception as error:
        raise ConfigError(f"module = {word}: {name} cannot be imported: {_told(error)}") from error
    make = getattr(module, function, None)
    if make is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"module = {word}: {name} has no {function}; it has {short(', '.join(known)) or 'no function'}")
    if not callable(make):
        raise ConfigError(f"module = {word}: {function} is no function but {type(make).__name__}")
    try:
        task = make()
    except TaskError as error:
        raise ConfigError(f"module = {word}: {error}") from error
    except Exception as error:
        raise ConfigError(f"module = {word}: {function}() failed: {_told(error)}") from error
    if not isinstance(task, UserTask):
        raise ConfigError(
            f"module = {word}: {function}() returns {type(task).__name__}, not a sparse_update.UserTask(model=..., "
            "train=..., held_out=...)"
        )
    return task


def _told(error: Exception) -> str:
    """The error, and the last line of somebody's own code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {short(str(error))}{at}"
