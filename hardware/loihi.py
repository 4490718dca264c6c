"""What stands between this machine and a Loihi board. It only probes; Lava itself runs in the worker's own interpreter.

What a board run needs is read from lava-nc 0.10.0, ``lava/utils/loihi.py`` and ``lava/utils/slurm.py``: the closed
Lava-Loihi extension, ``LOIHI_GEN``, and a way to the host, by SLURM (``sinfo`` and ``BOARD`` or ``PARTITION``) or by
Ethernet (``NXSDKHOST`` and ``HOST_BINARY``). Asking Lava for a board without these ends in ``NameError``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GENERATIONS = ("N2A2", "N3B2", "N3B3", "N3C1", "N3D1")
"""Values of LOIHI_GEN that lava-nc 0.10.0 knows."""

_SCRIPT = """
import json, sys
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
                  "extension": found("lava.utils.loihi2_profiler")}))
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

    Two routes lead to a host (SLURM, Ethernet); one is enough. That a board answers is not probed.
    """

    checks: tuple[Check, ...]
    routes: tuple[Check, ...]

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
        return "\n".join(lines)


class BoardUnavailable(RuntimeError):
    """No board can be reached; the message lists each missing thing with its remedy, ``.report`` the whole probe."""

    def __init__(self, report: BoardReport) -> None:
        self.report = report
        items = "\n".join(f"  - {check.name}: {check.detail}. Remedy: {check.remedy}" for check in report.missing)
        super().__init__(
            f"no Loihi board can be reached from this machine; missing:\n{items}\n"
            "What still works: the integer simulator, and Lava on the CPU (make lava)."
        )


def lava_python(env: Mapping[str, str] | None = None) -> Path | None:
    """The interpreter meant to run Lava, if it is there.

    ``SPIKEGATE_LAVA_PYTHON`` decides when set (None if it names no executable); else ``.venv-lava/bin/python`` in the
    current folder, then in the repository.
    """
    named = (os.environ if env is None else env).get("SPIKEGATE_LAVA_PYTHON")
    if named:
        candidates = [Path(named)]
    else:
        candidates = [root / ".venv-lava/bin/python" for root in (Path.cwd(), Path(__file__).resolve().parents[1])]
    return next((path for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def probe(env: Mapping[str, str] | None = None, *, timeout_s: float = 30.0) -> BoardReport:
    """List what a board run needs, each present or missing. Starts the Lava interpreter once, at most ``timeout_s``.

    Args:
        env: the environment to judge, by default this process's.
        timeout_s: seconds until the interpreter counts as not answering.
    """
    env = os.environ if env is None else env
    python = lava_python(env)
    seen: dict[str, Any] = {}
    detail = f"{env['SPIKEGATE_LAVA_PYTHON']} is no executable file" if env.get("SPIKEGATE_LAVA_PYTHON") else "none found"
    if python is not None:
        try:
            seen, detail = _ask(python, timeout_s), f"{python}"
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            detail = f"{python} does not answer ({error})"
    version = str(seen.get("python", ""))
    fits = version.startswith("3.10.")
    lava = seen.get("lava")
    generation = env.get("LOIHI_GEN", "")
    checks = (
        Check(
            "Python 3.10 for Lava",
            fits,
            f"{detail}, Python {version}" if version else detail,
            "make lava, or set SPIKEGATE_LAVA_PYTHON to a Python 3.10 that has lava-nc",
        ),
        Check("lava-nc", bool(lava), str(lava or "not found in that interpreter"), "make lava"),
        Check(
            "Lava-Loihi extension",
            bool(seen.get("extension")),
            "found" if seen.get("extension") else "lava.utils.loihi2_profiler not found",
            "closed source, for members of Intel's research community (INRC); install it beside lava-nc",
        ),
        Check(
            "LOIHI_GEN",
            generation in GENERATIONS,
            repr(generation) if generation else "not set",
            f"set it to the board's generation, one of {', '.join(GENERATIONS)}",
        ),
    )
    return BoardReport(checks, (_slurm(env), _ethernet(env)))


def require_board(env: Mapping[str, str] | None = None) -> BoardReport:
    """The report, when nothing that can be probed is missing; else raises :class:`BoardUnavailable`."""
    report = probe(env)
    if not report.ready:
        raise BoardUnavailable(report)
    return report


def _ask(python: Path, timeout_s: float) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), "-c", _SCRIPT],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    answer = json.loads(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    if not isinstance(answer, dict):
        raise ValueError(f"unexpected answer {answer!r}")
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
