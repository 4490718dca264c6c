"""Interpreters of other environments, in which programs run that do not go together with ours: none is started to look, and
one that works is asked by `ask`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware.text import quoted, short

KEPT = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
        *(
            "CUDA_VISIBLE_DEVICES",
            "LOIHI_GEN",
            "SLURM",
            "NOSLURM",
            "BOARD",
            "PARTITION",
            "NXSDKHOST",
            "HOST_BINARY",
            "SPIKEGATE_LAVA_PATH",
        ),
    )
)
"""Variables that a program in another environment gets: where programs and folders are, the language, threads, devices and
boards."""
KEPT_BEGINNINGS = ("LC_", "SLURM_")


def clean_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a program in another environment may see of ours: the variables of `KEPT`, and those that begin like
    `KEPT_BEGINNINGS`. Keys of cloud accounts, tokens and settings of other programs stay here, and so does what would
    change which code a Python loads (`PYTHON...`, `LD_PRELOAD`).

    Args:
        env: the variables, by default this process's.
    """
    whole = os.environ if env is None else env
    return {key: value for key, value in whole.items() if key in KEPT or key.startswith(KEPT_BEGINNINGS)}


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


@dataclass(frozen=True)
class Worker:
    """A program of ours that runs in such an interpreter, and its errors in words.

    Attributes:
        what: the package that it holds, as a sentence begins with it.
        needs: packages whose absence is told apart from a failure.
        remedy: how to get them.
        answers: keys of a right answer.
        too_long: what is said where it was ended, behind `what`, with a place `{seconds}`.
        failed, missing, late: raised where it fails, where a package or the interpreter is missing, and at the limit.
    """

    what: str
    needs: tuple[str, ...]
    remedy: str
    answers: tuple[str, ...]
    too_long: str
    failed: type[Exception]
    missing: type[Exception]
    late: type[Exception]


def ask(worker: Worker, command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run a command to its end, with `clean_environment`, and return the JSON object that is its last line.

    Args:
        command: the interpreter first.
        timeout_s: seconds of wall clock after which it is ended.

    Raises:
        worker.late, worker.missing, worker.failed: as `Worker` says; a line that is no such answer is a failure too.
    """
    interpreter = command[0]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise worker.late(f"{worker.what} {worker.too_long.format(seconds=f'{timeout_s:g}')}") from None
    except OSError as error:
        raise worker.missing(f"{interpreter} could not be started: {error}") from error
    wrote = done.stderr.strip()
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
        raise worker.failed(f"{worker.what} was ended by {ended}; it wrote: {short(wrote) or 'nothing'}")
    if done.returncode:
        if missing := next((name for name in worker.needs if f"No module named '{name}'" in wrote), None):
            raise worker.missing(f"{interpreter} has no {missing}; {worker.remedy}")
        last = short(wrote.splitlines()[-1]) if wrote else "nothing said"
        raise worker.failed(f"{worker.what} failed with exit code {done.returncode}: {last}")
    try:
        said = dict(json.loads(done.stdout.splitlines()[-1]))
        if not said.keys() >= set(worker.answers):
            raise ValueError("not the worker's line")
    except (ValueError, IndexError, TypeError) as error:
        raise worker.failed(
            f"{interpreter} gave no answer that can be read; it wrote: {short(done.stdout) or 'nothing'}"
        ) from error
    return said
