"""What stands between this machine and a Loihi board. It only probes; Lava itself runs in the worker's own interpreter.

What a board run needs is read from lava-nc 0.10.0, ``lava/utils/loihi.py`` and ``lava/utils/slurm.py``: the closed
Lava-Loihi extension, ``LOIHI_GEN``, and a way to the host, by SLURM (``sinfo`` and ``BOARD`` or ``PARTITION``) or by
Ethernet (``NXSDKHOST`` and ``HOST_BINARY``). Asking Lava for a board without these ends in ``NameError``. The code that
runs on a board is ``neuro/lava_worker/board.py``; it was tested against a stand-in of the extension, never on a board.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hardware.chips.chip import Chip, load_chip
from hardware.interpreters import clean_environment, found_interpreter
from hardware.placement import DoesNotFit, LayerDemand, place
from hardware.text import quoted

GENERATIONS = ("N2A2", "N3B2", "N3B3", "N3C1", "N3D1")
"""Values of LOIHI_GEN that lava-nc 0.10.0 knows."""

EXTENSION = ("lava.utils.loihi2_profiler", "lava.utils.loihi2_state_probes", "lava.proc.embedded_io.spike")
"""Modules of the Lava-Loihi extension that a board run imports; Lava itself looks for the first."""

PATH_VARIABLE = "SPIKEGATE_LAVA_PATH"
"""Folders in which Lava's interpreter also looks for packages, as in PATH: where the extension was unpacked, say."""

_SCRIPT = """
import json, os, sys
sys.path[1:1] = [path for path in os.environ.get("SPIKEGATE_LAVA_PATH", "").split(os.pathsep) if path]
from importlib import metadata, util
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
def found(name):
    try:
        return util.find_spec(name) is not None
    except ImportError:
        return False
print(json.dumps({"python": "%d.%d.%d" % sys.version_info[:3], "lava": version("lava-nc"),
                  "extension": [name for name in sys.argv[1:] if found(name)]}))
"""


@dataclass(frozen=True)
class Check:
    """One thing a board run needs. ``detail``: what was seen; ``remedy``: what to do when it is missing."""

    name: str
    present: bool
    detail: str
    remedy: str


@dataclass(frozen=True)
class BoardReport:
    """Everything probed, in the order in which to solve it.

    Two routes lead to a host (SLURM, Ethernet); one is enough. ``works``: what needs no board, and works here.
    """

    checks: tuple[Check, ...]
    routes: tuple[Check, ...]
    works: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[Check, ...]:
        """What is missing; both routes when neither is there."""
        absent = tuple(check for check in self.checks if not check.present)
        return absent if any(route.present for route in self.routes) else (*absent, *self.routes)

    @property
    def ready(self) -> bool:
        """Nothing that can be probed is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"ready": self.ready, **asdict(self)}

    def __str__(self) -> str:
        lines = []
        for check in (*self.checks, *self.routes):
            lines.append(f"{'present' if check.present else 'MISSING'}  {check.name}: {check.detail}")
            if check in self.missing:
                lines.append(f"         remedy: {check.remedy}")
        lines += [f"works all the same: {what}" for what in self.works]
        return "\n".join(lines)


class BoardUnavailable(RuntimeError):
    """No board can be reached; the message lists each missing thing with its remedy, ``.report`` the whole probe."""

    def __init__(self, report: BoardReport) -> None:
        self.report = report
        items = "\n".join(f"  - {check.name}: {check.detail}. Remedy: {check.remedy}" for check in report.missing)
        super().__init__(
            f"no Loihi board can be reached from this machine; missing:\n{items}\n"
            f"What works all the same: {'; '.join(report.works)}."
        )


@dataclass(frozen=True)
class Route:
    """How Lava is to reach a board's host. ``kind``: "slurm", with ``board`` or ``partition``, or "ethernet", with
    ``host`` and ``binary`` (the driver's path on it); ``generation``: of the chip, one of :data:`GENERATIONS`."""

    kind: str
    generation: str
    board: str | None = None
    partition: str | None = None
    host: str | None = None
    binary: str | None = None

    @property
    def name(self) -> str:
        """What results call the board: its node, else its partition, else its host's address."""
        return f"Loihi board {self.board or self.partition or self.host} ({self.generation})"


def lava_python(env: Mapping[str, str] | None = None) -> Path | None:
    """The interpreter meant to run Lava, if it is there.

    ``SPIKEGATE_LAVA_PYTHON`` decides when set (None if it names no executable); else ``.venv-lava/bin/python`` in the
    current folder, then in the repository.
    """
    return found_interpreter("SPIKEGATE_LAVA_PYTHON", ".venv-lava", env)


def probe(
    env: Mapping[str, str] | None = None,
    *,
    demands: Sequence[LayerDemand] | None = None,
    chip: str | Chip = "loihi2",
    chips: int | None = None,
    timeout_s: float = 30.0,
) -> BoardReport:
    """List what a board run needs, each present or missing. Starts the Lava interpreter once, and asks the host once.

    Args:
        env: the environment to judge, by default this process's.
        demands: a network's layers (``neuro.graph.demand.layer_demands``); whether they fit is then one more check.
        chip, chips: the board's chip and how many there are, for that check; ``chips`` None: as many as it takes.
        timeout_s: seconds until the interpreter, or the host, counts as not answering.
    """
    env = os.environ if env is None else env
    python = lava_python(env)
    seen: dict[str, Any] = {}
    detail = f"{env['SPIKEGATE_LAVA_PYTHON']} is no executable file" if env.get("SPIKEGATE_LAVA_PYTHON") else "none found"
    if python is not None:
        try:
            seen, detail = _ask(python, env, timeout_s), f"{python}"
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            detail = f"{python} does not answer ({error})"
    version = str(seen.get("python", ""))
    fits = version.startswith("3.10.")
    lava = seen.get("lava")
    absent = [name for name in EXTENSION if name not in seen.get("extension", ())]
    generation = env.get("LOIHI_GEN", "")
    checks = [
        Check(
            "Python 3.10 for Lava",
            fits,
            f"{detail}, Python {version}" if version else detail,
            "make lava, or set SPIKEGATE_LAVA_PYTHON to a Python 3.10 that has lava-nc",
        ),
        Check("lava-nc", bool(lava), str(lava or "not found in that interpreter"), "make lava"),
        Check(
            "Lava-Loihi extension",
            not absent,
            f"{', '.join(absent)} not found" if absent else "found",
            "closed source, for members of Intel's research community (INRC); install it beside lava-nc, or name its folder"
            f" in {PATH_VARIABLE}",
        ),
        Check(
            "LOIHI_GEN",
            generation in GENERATIONS,
            repr(generation) if generation else "not set",
            f"set it to the board's generation, one of {', '.join(GENERATIONS)}",
        ),
    ]
    routes = (_slurm(env), _ethernet(env))
    checks.append(_board(env, routes, timeout_s))
    if demands is not None:
        checks.append(_placement(demands, chip, chips))
    works = ["the integer simulator, placement, energy estimates"]
    if fits and lava:
        works.append("Lava on the CPU")
    return BoardReport(tuple(checks), routes, tuple(works))


def require_board(
    env: Mapping[str, str] | None = None,
    *,
    demands: Sequence[LayerDemand] | None = None,
    chip: str | Chip = "loihi2",
    chips: int | None = None,
) -> BoardReport:
    """The report, when nothing that can be probed is missing; else raises :class:`BoardUnavailable`. As :func:`probe`."""
    report = probe(env, demands=demands, chip=chip, chips=chips)
    if not report.ready:
        raise BoardUnavailable(report)
    return report


def find_route(env: Mapping[str, str] | None = None) -> Route:
    """The way to the host that the environment names, SLURM first. Call it after :func:`require_board`.

    Raises:
        ValueError: it names none, or no known generation.
    """
    env = os.environ if env is None else env
    generation = env.get("LOIHI_GEN", "")
    if generation not in GENERATIONS:
        raise ValueError(f"LOIHI_GEN is {quoted(generation)}; known: {', '.join(GENERATIONS)}")
    if _slurm(env).present:
        board = env.get("BOARD") or None
        return Route("slurm", generation, board=board, partition=None if board else env["PARTITION"])
    if _ethernet(env).present:
        return Route("ethernet", generation, host=env["NXSDKHOST"], binary=env["HOST_BINARY"])
    raise ValueError("no route to a board's host: set BOARD or PARTITION (SLURM), or NXSDKHOST and HOST_BINARY")


def _ask(python: Path, env: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), "-c", _SCRIPT, *EXTENSION],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
        stdin=subprocess.DEVNULL,
        env={**clean_environment(), PATH_VARIABLE: env.get(PATH_VARIABLE, "")},
    )
    answer = json.loads(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    if not isinstance(answer, dict):
        raise ValueError(f"unexpected answer {quoted(answer)}")
    return answer


def _slurm(env: Mapping[str, str]) -> Check:
    sinfo = shutil.which("sinfo", path=env.get("PATH", ""))
    target = next((f"{key}={env[key]}" for key in ("BOARD", "PARTITION") if env.get(key)), None)
    return Check(
        "host route, SLURM",
        bool(sinfo and target),
        f"sinfo {'at ' + sinfo if sinfo else 'not on PATH'}, {target or 'neither BOARD nor PARTITION set'}",
        "run on a SLURM login node of the board's cluster and set BOARD or PARTITION; or use Ethernet",
    )


def _ethernet(env: Mapping[str, str]) -> Check:
    absent = [key for key in ("NXSDKHOST", "HOST_BINARY") if not env.get(key)]
    return Check(
        "host route, Ethernet",
        not absent,
        f"{' and '.join(absent)} not set" if absent else f"host {env['NXSDKHOST']}",
        "set NXSDKHOST to the host's address and HOST_BINARY to its driver (nxcore/bin/nx_driver_server); or use SLURM",
    )


def _board(env: Mapping[str, str], routes: tuple[Check, Check], timeout_s: float) -> Check:
    """Whether the board is there: by SLURM's table of nodes, or by a ping to its host."""
    name, remedy = "board", "find one that is up with `sinfo -N` and set BOARD or PARTITION to it; or ask its operator"
    slurm, ethernet = (route.present for route in routes)
    if not slurm and not ethernet:
        return Check(name, False, "cannot be asked for without a host route", "solve the host route first")
    command = ["sinfo", "-N"] if slurm else ["ping", "-c", "1", env["NXSDKHOST"]]
    program = shutil.which(command[0], path=env.get("PATH", ""))
    if program is None:
        return Check(name, False, f"{command[0]} is not on PATH, so {env['NXSDKHOST']} cannot be asked", "install ping")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, False, f"`{' '.join(command)}` failed ({error})", remedy)
    if not slurm:
        return Check(name, True, f"{env['NXSDKHOST']} answers", remedy)
    nodes = [line.split() for line in done.stdout.splitlines()[1:] if len(line.split()) >= 4]
    wanted, column = (env["BOARD"], 0) if env.get("BOARD") else (env["PARTITION"], 2)
    states = [node[3] for node in nodes if node[column].rstrip("*") == wanted]
    if not states:
        return Check(name, False, f"{wanted} is not among the {len(nodes)} nodes that sinfo lists", remedy)
    up = [state for state in states if not any(word in state for word in ("down", "drain", "fail"))]
    return Check(name, bool(up), f"{wanted}: {', '.join(dict.fromkeys(states))}", remedy)


def _placement(demands: Sequence[LayerDemand], chip: str | Chip, chips: int | None) -> Check:
    """Whether a network fits the board's chips."""
    name = "placement fits"
    try:
        found = place(demands, chip if isinstance(chip, Chip) else load_chip(chip), chips)
    except (DoesNotFit, ValueError) as error:
        return Check(name, False, str(error), "split or shrink what the message names, or give more chips")
    return Check(name, True, f"{len(found.cores)} cores of {found.chips} chip(s)", "")
