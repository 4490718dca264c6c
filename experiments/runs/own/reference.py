"""PACKAGE:FUNCTION to what the function returns; what goes wrong is told with the line that it went wrong in."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

from experiments.runs.hydra_app import ConfigError
from hardware.text import short

EXAMPLE = "module=my_model:task"


def check_module(word: str, returns: str = "your task") -> None:
    """Raise ConfigError for what does not name a function in a module."""
    module, colon, function = word.partition(":")
    if not word:
        raise ConfigError(f"module has no value: name the function that returns {returns}, such as {EXAMPLE}")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ConfigError(f"module = {short(word)}: written PACKAGE:FUNCTION, such as {EXAMPLE}")


def called(word: str, plain: tuple[type[Exception], ...] = (), returns: str = "your task") -> Any:
    """Import the module, from the working directory too, call the function, and return what it returns.

    Args:
        word: PACKAGE:FUNCTION.
        plain: errors of the function whose message says all.
        returns: what the function should return, for the message where none is named.

    Raises ConfigError where there is no such module or function, or where it fails.
    """
    check_module(word, returns)
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
        return make()
    except plain as error:
        raise ConfigError(f"module = {word}: {error}") from error
    except Exception as error:
        raise ConfigError(f"module = {word}: {function}() failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    """The error, and the last line of somebody's own code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {short(str(error))}{at}"
