"""Zeus as a second opinion on a window's joules (optional: pip install 'spikegate[energy-check]').

With no GPU and no readable RAPL, Zeus 0.16 constructs without complaint and returns ``total_energy`` 0; with RAPL it
leaves the CPU out of that total. So ``total_energy`` is never used here: only what a named device returned is a reading.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from hardware.meters.meter import NVML_UPDATE_S, RAPL_UPDATE_S, Reading

WINDOW = "spikegate"


class ZeusCheck:
    """Context manager like ``Meter``; ``.readings`` has what Zeus measured, or one that says why it measured nothing.

    ``with Meter() as meter, ZeusCheck() as check: work()``, then :func:`compare`.
    """

    def __init__(self) -> None:
        self.readings: tuple[Reading, ...] = ()

    def __enter__(self) -> ZeusCheck:
        self.readings = ()
        self._monitor: Any = None
        self._why = ""
        self._start_s = time.monotonic()
        try:
            self._monitor = importlib.import_module("zeus.monitor").ZeusMonitor()
            self._monitor.begin_window(WINDOW)
        except ImportError:
            self._why = "zeus is not installed; pip install 'spikegate[energy-check]'"
        except Exception as error:  # whatever a driver or a missing permission raises inside Zeus
            self._monitor, self._why = None, f"zeus does not start ({error})"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        window_s = time.monotonic() - self._start_s
        found: list[Reading] = []
        if self._monitor is not None:
            try:
                result = self._monitor.end_window(WINDOW)
                found = _readings(result, window_s)
                self._why = "zeus found no meter: no GPU and no readable RAPL (its total of 0 J is not a measurement)"
            except Exception as failure:
                self._why = f"zeus did not finish its window ({failure})"
        self.readings = tuple(found) or (Reading(None, "Zeus", window_s, None, self._why),)


def _readings(result: Any, window_s: float) -> list[Reading]:
    found = []
    devices = (
        ("GPU", getattr(result, "gpu_energy", None), NVML_UPDATE_S),
        ("CPU", getattr(result, "cpu_energy", None), RAPL_UPDATE_S),
    )
    for kind, energies, update_s in devices:
        for index, joules in (energies or {}).items():
            source = f"Zeus: {kind} {index}"
            if not joules:
                found.append(Reading(None, source, window_s, None, "zeus returned 0 J: the counter did not move"))
            else:
                resolution_j = joules * update_s / window_s if window_s > 0 else joules
                found.append(Reading(float(joules), source, window_s, resolution_j, None))
    return found


def compare(own: Reading, zeus: Reading) -> str:
    """One line: both figures and whether they agree within their resolutions; names what was not measured."""
    if own.joules is None or zeus.joules is None:
        lost = own if own.joules is None else zeus
        return f"{own.source}: no cross-check, {lost.source} was not measured: {lost.reason}"
    apart = abs(own.joules - zeus.joules)
    within = apart <= (own.resolution_j or 0.0) + (zeus.resolution_j or 0.0)
    verdict = f"{'agree' if within else 'differ'} ({apart:.3g} J)"
    return f"{own.source}: {own.joules:.6g} J, {zeus.source}: {zeus.joules:.6g} J, {verdict}"


def compare_all(own: Sequence[Reading], zeus: Sequence[Reading]) -> list[str]:
    """:func:`compare` for each of our readings and what Zeus read of the same device."""
    theirs = {reading.source: reading for reading in zeus}
    lost = next((reading for reading in zeus if reading.joules is None), None)
    found = []
    for reading in own:
        device = re.match(r"NVML: (GPU \d+)|RAPL: package-(\d+)", reading.source)
        name = f"Zeus: {device[1] or f'CPU {device[2]}'}" if device else "Zeus"
        absent = Reading(None, name, reading.window_s, None, lost.reason if lost else "zeus did not read this device")
        found.append(compare(reading, theirs.get(name, absent)))
    return found
