"""Measured joules: NVIDIA GPUs through NVML, CPU packages through RAPL. "Not measured" is None with a reason, never 0.

Facts about the counters:

- NVML counts millijoules since the driver was loaded (Volta or newer, no privilege needed) and updates every 20 to
  100 ms (PETSc manual, PetscLogGpuEnergyMeter), so a window should last a second or more.
- RAPL counts microjoules in ``energy_uj``, updates about every millisecond (Intel SDM vol. 3B, RAPL) and wraps at
  ``max_energy_range_uj``, after minutes on a large CPU. Root alone may read it on Linux 5.10 or later. Only package
  domains are read: core and uncore lie inside them, psys contains them, and a separate DRAM domain is left out.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")
NVML_UPDATE_S = 0.1
RAPL_UPDATE_S = 0.001
MAX_PACKAGE_W = 1000.0
"""Our bound on one CPU package (data sheets end at about 500 W): says how soon a RAPL counter can have wrapped, and that a
counter which was set back (after a suspend, say) has not wrapped."""


@dataclass(frozen=True)
class Reading:
    """One meter over one window.

    Attributes:
        joules: energy of the window, or None when it was not measured.
        source: meter and device, e.g. ``"NVML: GPU 0, NVIDIA H200"``.
        window_s: length of the window, seconds.
        resolution_j: energy of one update interval at the window's mean power, joules; the reading is no finer.
        reason: why ``joules`` is None, or a caution about a coarse reading.
        idle_w: power of the same device with nothing of ours running, watts, from :func:`measure_idle`; None where that
            was not measured.
    """

    joules: float | None
    source: str
    window_s: float
    resolution_j: float | None
    reason: str | None
    idle_w: float | None = None

    def __post_init__(self) -> None:
        if self.idle_w is not None and not (math.isfinite(self.idle_w) and self.idle_w >= 0):
            raise ValueError(f"{self.source}: idle_w is {self.idle_w}; a measured power is finite and not negative")
        if self.joules is None and not self.reason:
            raise ValueError(f"{self.source}: a reading without joules needs a reason")
        if self.joules is not None and not (math.isfinite(self.joules) and self.joules >= 0):
            raise ValueError(f"{self.source}: joules is {self.joules}; a measured energy is finite and not negative")

    @property
    def mean_w(self) -> float | None:
        """Mean power of the window, watts; None when not measured."""
        return None if self.joules is None or self.window_s <= 0 else self.joules / self.window_s

    @property
    def above_idle_j(self) -> float | None:
        """``joules`` less idle power times the window: stands beside ``joules``, never in its place.

        None when either was not measured. It may come out below zero, within ``resolution_j``, and is left so.
        """
        return None if self.joules is None or self.idle_w is None else self.joules - self.idle_w * self.window_s

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``joules`` and what follows from it are null when not measured."""
        return asdict(self) | {"above_idle_j": self.above_idle_j}


def total(readings: Iterable[Reading]) -> float | None:
    """Sum in joules, or None when there is no reading or any of them is missing."""
    joules = [reading.joules for reading in readings]
    known = [value for value in joules if value is not None]
    return math.fsum(known) if known and len(known) == len(joules) else None


def total_known(readings: Iterable[Reading]) -> float | None:
    """Sum in joules of the readings that there are: a lower bound where others are missing; None where all are."""
    known = [reading.joules for reading in readings if reading.joules is not None]
    return math.fsum(known) if known else None


def total_above_idle(readings: Iterable[Reading]) -> float | None:
    """Sum of ``above_idle_j`` in joules, or None when there is no reading or any of them lacks joules or idle power."""
    joules = [reading.above_idle_j for reading in readings]
    known = [value for value in joules if value is not None]
    return math.fsum(known) if known and len(known) == len(joules) else None


def measure_idle(
    window_s: float = 10.0, *, sleep: Callable[[float], object] = time.sleep, **meter: Any
) -> tuple[Reading, ...]:
    """Readings of a window in which this program does nothing; hand them to ``Meter(idle=...)``.

    Other programs on the machine count as idle power too: measure right before the work, with the same load beside it.

    Args:
        window_s: length of the window, seconds; NVML needs one or more.
        sleep: what waits; it is not called where no meter counts.
        meter: arguments of :class:`Meter`.

    Raises:
        ValueError: a window that is not above zero.
    """
    if not window_s > 0:
        raise ValueError(f"an idle window of {window_s} s measures nothing; it must be above zero")
    with Meter(**meter) as idle:
        if idle.counting:
            sleep(window_s)
    return idle.readings


class _Unreadable(Exception):
    """A counter could not be read; the text is the reason that people see."""


class _Counter:
    """An energy counter that only grows, except where it wraps."""

    def __init__(
        self, source: str, read: Callable[[], int], *, unit_j: float, update_s: float, range_counts: int | None = None
    ) -> None:
        self.source = source
        self._read = read
        self._unit_j = unit_j
        self._update_s = update_s
        self._range = range_counts
        self._failure: str | None = None
        self._sum = 0
        self._last = 0
        self._start_s = self._last_s = 0.0

    def start(self, now_s: float) -> None:
        self._start_s = self._last_s = now_s
        try:
            self._last = self._read()
        except _Unreadable as error:
            self._failure = str(error)

    def sample(self, now_s: float) -> None:
        """Fold the counts since the last call into the sum."""
        if self._failure is not None:
            return
        try:
            value = self._read()
        except _Unreadable as error:
            self._failure = str(error)
            return
        delta, gap_s = value - self._last, now_s - self._last_s
        self._last, self._last_s = value, now_s
        if self._range is not None and gap_s * MAX_PACKAGE_W > self._range * self._unit_j:
            self._failure = f"the counter was not read for {gap_s:.0f} s and may have wrapped more than once"
        elif delta < 0 and self._range is None:
            self._failure = "the counter went backwards; the driver was reloaded during the window"
        else:
            self._sum += delta + (self._range or 0) * (delta < 0)

    def finish(self, now_s: float) -> Reading:
        self.sample(now_s)
        window_s = now_s - self._start_s
        if self._failure is not None:
            return Reading(None, self.source, window_s, None, self._failure)
        if window_s < self._update_s or self._sum == 0:
            reason = (
                f"a window of {window_s * 1e3:.3g} ms is too short for a counter that updates every "
                f"{self._update_s * 1e3:g} ms"
                if window_s < 10 * self._update_s
                else f"the counter did not move in {window_s:.3g} s"
            )
            return Reading(None, self.source, window_s, None, reason)
        joules = self._sum * self._unit_j
        most_j = MAX_PACKAGE_W * (window_s + self._update_s)
        if self._range is not None and joules > most_j:
            reason = (
                f"{joules:.4g} J in {window_s:.3g} s is more than {MAX_PACKAGE_W:g} W: the counter was set back meanwhile"
            )
            return Reading(None, self.source, window_s, None, reason)
        resolution_j = max(self._unit_j, joules * self._update_s / window_s)
        caution = None
        if window_s < 10 * self._update_s:
            caution = f"coarse: the window spans fewer than 10 updates of the counter ({self._update_s * 1e3:g} ms each)"
        return Reading(joules, self.source, window_s, resolution_j, caution)


class Meter:
    """Context manager that measures the energy of its block; ``.readings`` then has one entry per device or reason.

    ``with Meter() as meter: work()``. Both meters count the whole device, other programs and idle power included.
    GPU work runs asynchronously: synchronise before the block ends. A background thread reads the RAPL counters every
    ``poll_s`` seconds, so that no wrap is missed; it exists only inside the block and only where RAPL can be read.

    Args:
        gpu, cpu: which meters to use; a meter that is switched off gives no reading.
        gpus: NVML indices (PCI order, blind to ``CUDA_VISIBLE_DEVICES``); None measures every GPU of the machine.
        powercap: the sysfs folder of the power-capping framework.
        poll_s: seconds between background reads of RAPL.
        clock: monotonic seconds.
        idle: readings of :func:`measure_idle`: their mean power goes into the reading of the same source.
    """

    def __init__(
        self,
        *,
        gpu: bool = True,
        cpu: bool = True,
        gpus: Sequence[int] | None = None,
        powercap: Path = POWERCAP,
        poll_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        idle: Sequence[Reading] = (),
    ) -> None:
        self._gpu, self._cpu, self._gpus = gpu, cpu, gpus
        self._powercap, self._poll_s, self._clock = powercap, poll_s, clock
        self._idle_w = {reading.source: reading.mean_w for reading in idle}
        self._readings: tuple[Reading, ...] | None = None
        self._counters: list[_Counter] = []

    @property
    def counting(self) -> bool:
        """Whether any device was found to count; inside the block."""
        return bool(self._counters)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """One reading per device, or per meter that is not there; raises RuntimeError before the block has ended."""
        if self._readings is None:
            raise RuntimeError("Meter: readings exist only after the with-block has ended")
        return self._readings

    def __enter__(self) -> Meter:
        self._readings = None
        self._absent: list[tuple[str, str]] = []
        self._close: Callable[[], object] | None = None
        nvml = self._open_nvml() if self._gpu else []
        rapl = self._open_rapl() if self._cpu else []
        self._counters = [*nvml, *rapl]
        self._stop, self._thread = threading.Event(), None
        self._start_s = self._clock()
        for counter in self._counters:
            counter.start(self._start_s)
        if rapl:
            self._thread = threading.Thread(target=self._poll, args=(rapl,), name="rapl-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        now_s = self._clock()
        readings = [counter.finish(now_s) for counter in self._counters]
        readings += [Reading(None, source, now_s - self._start_s, None, why) for source, why in self._absent]
        self._readings = tuple(replace(reading, idle_w=self._idle_w.get(reading.source)) for reading in readings)
        if self._close is not None:
            with contextlib.suppress(Exception):  # the readings are there; a driver that went away is no reason to fail
                self._close()

    def _poll(self, counters: Sequence[_Counter]) -> None:
        while not self._stop.wait(self._poll_s):
            for counter in counters:
                counter.sample(self._clock())

    def _open_nvml(self) -> list[_Counter]:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            self._absent.append(("NVML", "pynvml is not installed; pip install 'spikegate[gpu-energy]'"))
            return []
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self._absent.append(("NVML", f"no NVIDIA driver answers ({error})"))
            return []
        self._close = nvml.nvmlShutdown
        counters: list[_Counter] = []
        try:
            indices = range(nvml.nvmlDeviceGetCount()) if self._gpus is None else self._gpus
        except nvml.NVMLError as error:
            self._absent.append(("NVML", f"the driver does not list its GPUs ({error})"))
            return []
        if not indices:
            self._absent.append(("NVML", "the driver answers, but there is no GPU to measure"))
        for index in indices:
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                name = nvml.nvmlDeviceGetName(handle)  # bytes, in older bindings
                source = f"NVML: GPU {index}, {name.decode() if isinstance(name, bytes) else name}"
            except nvml.NVMLError as error:
                self._absent.append((f"NVML: GPU {index}", f"the driver does not give access to it ({error})"))
                continue
            counters.append(_Counter(source, _nvml_reader(nvml, handle), unit_j=1e-3, update_s=NVML_UPDATE_S))
        return counters

    def _open_rapl(self) -> list[_Counter]:
        root = self._powercap
        counters: list[_Counter] = []
        if not root.is_dir():
            why = f"{root} does not exist: no RAPL here (usual in virtual machines), or try: sudo modprobe intel_rapl_msr"
            self._absent.append(("RAPL", why))
            return counters
        for zone in sorted(path for path in root.iterdir() if re.fullmatch(r"intel-rapl:\d+", path.name)):
            try:
                name = (zone / "name").read_text(encoding="ascii").strip()
                if not name.startswith("package"):
                    continue
                limit = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            except (OSError, ValueError) as error:
                self._absent.append((f"RAPL: {zone.name}", f"its description cannot be read ({error})"))
                continue
            reader = _rapl_reader(zone / "energy_uj")
            counters.append(_Counter(f"RAPL: {name}", reader, unit_j=1e-6, update_s=RAPL_UPDATE_S, range_counts=limit))
        if not counters and not any(source.startswith("RAPL") for source, _ in self._absent):
            self._absent.append(("RAPL", f"{root} has no CPU package domain (intel-rapl:N); usual in virtual machines"))
        return counters


def _nvml_reader(nvml: Any, handle: Any) -> Callable[[], int]:
    def read() -> int:
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except nvml.NVMLError as error:
            raise _Unreadable(f"the GPU's energy counter cannot be read ({error}); Volta or newer is needed") from error

    return read


def _rapl_reader(path: Path) -> Callable[[], int]:
    def read() -> int:
        try:
            return int(path.read_text(encoding="ascii"))
        except PermissionError as error:
            raise _Unreadable(
                f"permission denied: {path} is readable by root only; "
                f"until the next boot: sudo chmod a+r {path.parent.parent}/intel-rapl:*/energy_uj; "
                "for good: a udev rule that gives a group read access"
            ) from error
        except (OSError, ValueError) as error:
            raise _Unreadable(f"{path} cannot be read ({error})") from error

    return read
