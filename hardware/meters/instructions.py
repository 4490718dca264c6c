"""Instructions that a command executes, counted: a figure beside a time that other work on the machine cannot move.

`perf stat` is asked first, since it counts what really ran. Where it is absent or the machine gives it no counter (most
virtual machines), `valgrind --tool=callgrind` counts a simulated run, tens of times slower, on a processor without AVX-512
or AMX: libraries that look at the processor take other kernels there than they do outside. Counts of the two are not
compared.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PERF, CALLGRIND = "perf stat", "callgrind"


@dataclass(frozen=True)
class Instructions:
    """A count and who counted."""

    count: int
    by: str


def count_instructions(
    command: Sequence[str], timeout_s: float = 600.0, env: Mapping[str, str] | None = None
) -> Instructions | None:
    """Instructions of a whole process in user mode, its start included; None where nothing here can count them in time.

    What a part of a program takes is the difference of two counts, such as those of one and of two rounds.

    Args:
        env: all variables of the process; None hands on this process's.

    Raises:
        ValueError: the command fails by itself (its exit code is not 0), or there is none.
    """
    if not command:
        raise ValueError("count_instructions: an empty command has no instructions")
    for count in (_by_perf, _by_callgrind):
        try:
            found = count(list(command), timeout_s, None if env is None else dict(env))
        except subprocess.TimeoutExpired:
            continue
        if found is not None:
            return found
    return None


def _by_perf(command: list[str], timeout_s: float, env: dict[str, str] | None) -> Instructions | None:
    if shutil.which("perf") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "perf"
        words = ["perf", "stat", "-x", ",", "-e", "instructions:u", "-o", str(out), "--", *command]
        _run(words, command, timeout_s, env)
        found = re.search(r"^(\d+),[^,]*,instructions", out.read_text() if out.exists() else "", re.M)
    return None if found is None else Instructions(int(found.group(1)), PERF)


def _by_callgrind(command: list[str], timeout_s: float, env: dict[str, str] | None) -> Instructions | None:
    if shutil.which("valgrind") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        words = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--quiet", *command]
        _run(words, command, timeout_s, env)
        found = re.search(r"^(?:summary|totals): (\d+)", out.read_text() if out.exists() else "", re.M)
    return None if found is None else Instructions(int(found.group(1)), CALLGRIND)


def _run(words: list[str], command: list[str], timeout_s: float, env: dict[str, str] | None) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, env=env, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)[:120]}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
