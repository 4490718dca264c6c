"""Interpreters of other environments, in which programs run that do not go together with ours; none is started to look."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hardware.text import quoted


def found_interpreter(variable: str, folder: str, env: Mapping[str, str] | None = None) -> Path | None:
    """The interpreter that a variable names, else that of a folder here or in the repository; None where it is not there.

    Args:
        variable: of the environment; where it is set, it alone decides.
        folder: of the environment, such as ".venv-lava".
        env: the variables, by default this process's.
    """
    named = (os.environ if env is None else env).get(variable)
    candidates = (Path(named),) if named else _places(folder)
    return next((path for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def find_interpreter(variable: str, folder: str, what: str, remedy: str, refused: type[Exception]) -> Path:
    """As `found_interpreter`, with an error in the place of None.

    Args:
        variable, folder: as there.
        what, remedy: for the error: what the environment holds, and how to get one.
        refused: what is raised.

    Raises:
        refused: there is none; says where it was looked for, and the remedy.
    """
    found = found_interpreter(variable, folder)
    if found is not None:
        return found
    if named := os.environ.get(variable):
        raise refused(f"{variable} is {quoted(named)}, which is no program; {remedy}")
    raise refused(f"no {what} environment at {' or '.join(map(str, _places(folder)))}; {remedy}")


def _places(folder: str) -> tuple[Path, ...]:
    roots = (Path.cwd(), Path(__file__).resolve().parents[1])
    return tuple(dict.fromkeys(root / folder / "bin" / "python" for root in roots))
