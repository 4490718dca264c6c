"""Meters against a fake sysfs tree, a fake NVML module and a hand-driven clock. "Not measured" is never 0."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from hardware import Meter, Reading, total
from hardware.meters.meter import total_known

RANGE_UJ = 262_143_328_850


class Clock:
    """Seconds that move only when told."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path / "energy_uj"


def rapl(root: Path, clock: Clock) -> Meter:
    return Meter(gpu=False, powercap=root, clock=clock)


def test_packages_are_counted_once(tmp_path: Path) -> None:
    clock = Clock()
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    inner = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    psys = zone(tmp_path, "intel-rapl:2", "psys", 0)
    twin = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 10
        first.write_text("43500000")
        second.write_text("12500000")
        for other in (inner, psys, twin):
            other.write_text("99000000")
    assert [reading.source for reading in meter.readings] == ["RAPL: package-0", "RAPL: package-1"]
    assert [reading.joules for reading in meter.readings] == [pytest.approx(42.5), pytest.approx(7.5)]
    assert total(meter.readings) == pytest.approx(50.0)
    assert meter.readings[0].window_s == 10
    # 42.5 J in 10 s are 4.25 W, of which one update of 1 ms holds 4.25 mJ
    assert meter.readings[0].resolution_j == pytest.approx(4.25e-3)
    assert meter.readings[0].reason is None


def test_a_wrapped_counter(tmp_path: Path) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 10
        energy.write_text("3000000")
    assert meter.readings[0].joules == pytest.approx(5.0)


def test_a_counter_set_back_is_not_taken_for_a_wrap(tmp_path: Path) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000_000)
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 60
        energy.write_text("1000000")  # as after a suspend; a wrap would be 257 kJ in a minute
    assert meter.readings[0].joules is None
    assert str(meter.readings[0].reason) == ("2.571e+05 J in 60 s is more than 1000 W: the counter was set back meanwhile")


@pytest.mark.parametrize("lost", ["max_energy_range_uj", "name", "energy_uj"])
def test_a_missing_file_of_a_package_is_named(tmp_path: Path, lost: str) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    energy.with_name(lost).unlink()
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 10
    (reading,) = meter.readings
    assert reading.joules is None
    assert lost in str(reading.reason)


def test_a_counter_that_may_have_wrapped_twice_is_not_measured(tmp_path: Path) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 300  # at 1 kW a range of 262 kJ is used up after 262 s
        energy.write_text("3000000")
    assert meter.readings[0].joules is None
    assert "300 s and may have wrapped more than once" in str(meter.readings[0].reason)


def test_the_background_thread_follows_several_wraps(tmp_path: Path) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    reads: list[float] = []

    def ticking() -> float:
        if threading.current_thread().name == "rapl-meter":
            reads.append(clock.now_s)
        return clock.now_s

    with Meter(gpu=False, powercap=tmp_path, clock=ticking, poll_s=0.002) as meter:
        for step in range(1, 7):  # six times half the range plus 1 J: three wraps
            clock.now_s += 150  # 874 W
            energy.with_suffix(".new").write_text(str((step * (RANGE_UJ // 2 + 1_000_000)) % RANGE_UJ))
            energy.with_suffix(".new").replace(energy)
            seen, deadline = len(reads), time.monotonic() + 10
            while len(reads) < seen + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
    assert meter.readings[0].joules == pytest.approx(6 * (RANGE_UJ // 2 + 1_000_000) * 1e-6)
    assert not any(thread.name == "rapl-meter" for thread in threading.enumerate())


def test_permission_denied_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    plain = Path.read_text

    def guarded(self: Path, *args: object, **kwargs: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", guarded)
    clock = Clock()
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 10
    (reading,) = meter.readings
    assert reading.joules is None
    assert "permission denied" in str(reading.reason)
    assert "sudo chmod a+r" in str(reading.reason)
    assert "udev rule" in str(reading.reason)
    assert total(meter.readings) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: None, "does not exist: no RAPL here"),
        (lambda root: root.mkdir(), "has no CPU package domain"),
        (lambda root: zone(root, "intel-rapl:0", "psys", 0), "has no CPU package domain"),
        (lambda root: (root / "intel-rapl:0").mkdir(parents=True), "its description cannot be read"),
        (lambda root: zone(root, "intel-rapl:0", "package-0", 0).write_text("??"), "energy_uj cannot be read"),
        (lambda root: zone(root, "intel-rapl:0", "package-0", 7), "the counter did not move in 10 s"),
    ],
)
def test_what_cannot_be_measured_has_a_reason(tmp_path: Path, make: object, reason: str) -> None:
    root, clock = tmp_path / "powercap", Clock()
    make(root)  # type: ignore[operator]
    with rapl(root, clock) as meter:
        clock.now_s += 10
    (reading,) = meter.readings
    assert reading.joules is None
    assert reason in str(reading.reason)
    assert reading.to_dict()["joules"] is None


def test_short_windows_are_refused_or_flagged(tmp_path: Path) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 0.0005
        energy.write_text("10000")
    assert meter.readings[0].joules is None
    assert "too short for a counter that updates every 1 ms" in str(meter.readings[0].reason)
    with rapl(tmp_path, clock) as meter:
        clock.now_s += 0.005
        energy.write_text("510000")
    assert meter.readings[0].joules == pytest.approx(0.5)
    assert str(meter.readings[0].reason).startswith("coarse")


class FakeNvml(types.ModuleType):
    """Two GPUs, the second without an energy counter; counts in millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.energy_mj = {0: 1_000_000}
        self.driver = True
        self.count = 2
        self.open = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= self.count:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Fake {handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle not in self.energy_mj:
            raise self.NVMLError("Not Supported")
        return self.energy_mj[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    yield fake
    assert fake.open == 0, "nvmlInit without nvmlShutdown"


def test_gpu_energy_per_device(nvml: FakeNvml) -> None:
    clock = Clock()
    with Meter(cpu=False, clock=clock) as meter:
        clock.now_s += 20
        nvml.energy_mj[0] += 6_000_000
    first, second = meter.readings
    assert (first.source, first.joules, first.reason) == ("NVML: GPU 0, Fake 0", 6000.0, None)
    # 300 W, updated every 100 ms
    assert first.resolution_j == pytest.approx(30.0)
    assert second.joules is None
    assert "Not Supported" in str(second.reason)
    assert total(meter.readings) is None
    with Meter(cpu=False, clock=clock, gpus=[0]) as meter:
        clock.now_s += 0.5
        nvml.energy_mj[0] += 150_000
    assert total(meter.readings) == pytest.approx(150.0)
    assert "fewer than 10 updates" in str(meter.readings[0].reason)


@pytest.mark.parametrize(
    ("setting", "gpus", "reason"),
    [
        ({"driver": False}, None, "no NVIDIA driver answers (NVML Shared Library Not Found)"),
        ({"count": 0}, None, "there is no GPU to measure"),
        ({}, [5], "the driver does not give access to it (Invalid Argument)"),
    ],
)
def test_gpu_not_measured(nvml: FakeNvml, setting: dict[str, object], gpus: list[int] | None, reason: str) -> None:
    vars(nvml).update(setting)
    with Meter(cpu=False, gpus=gpus) as meter:
        pass
    (reading,) = meter.readings
    assert reading.joules is None
    assert reason in str(reading.reason)


def test_gpu_counter_that_went_backwards(nvml: FakeNvml) -> None:
    clock = Clock()
    with Meter(cpu=False, clock=clock, gpus=[0]) as meter:
        clock.now_s += 20
        nvml.energy_mj[0] = 5
    assert meter.readings[0].joules is None
    assert "the driver was reloaded" in str(meter.readings[0].reason)


def test_a_driver_that_goes_away_meanwhile(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with Meter(cpu=False, clock=clock, gpus=[0]) as meter:
        clock.now_s += 20
        nvml.energy_mj.clear()

        def gone() -> None:
            nvml.open = 0
            raise nvml.NVMLError("Uninitialized")

        monkeypatch.setattr(nvml, "nvmlShutdown", gone)
        meter._close = gone  # what it holds since it began
    assert meter.readings[0].joules is None
    assert "the GPU's energy counter cannot be read (Not Supported)" in str(meter.readings[0].reason)


def test_a_driver_that_lists_no_gpus_and_names_in_bytes(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(nvml, "nvmlDeviceGetName", lambda handle: b"Old binding")
    with Meter(cpu=False, clock=clock, gpus=[0]) as meter:
        clock.now_s += 20
        nvml.energy_mj[0] += 1000
    assert (meter.readings[0].source, meter.readings[0].joules) == ("NVML: GPU 0, Old binding", 1.0)

    def broken() -> int:
        raise nvml.NVMLError("Unknown Error")

    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", broken)
    with Meter(cpu=False, clock=clock) as meter:
        clock.now_s += 20
    assert [(r.joules, r.reason) for r in meter.readings] == [(None, "the driver does not list its GPUs (Unknown Error)")]


def test_without_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Meter(cpu=False) as meter:
        pass
    assert "pip install 'spikegate[gpu-energy]'" in str(meter.readings[0].reason)


def test_readings_come_after_the_block_even_when_it_fails(nvml: FakeNvml) -> None:
    clock = Clock()
    meter = Meter(cpu=False, clock=clock, gpus=[0])
    with pytest.raises(RuntimeError, match="only after"):
        _ = meter.readings

    def work() -> None:
        with meter:
            clock.now_s += 2
            nvml.energy_mj[0] += 100
            raise KeyError("training failed")

    with pytest.raises(KeyError):
        work()
    assert meter.readings[0].joules == pytest.approx(0.1)


def test_a_reading_cannot_pretend() -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        Reading(None, "RAPL", 1.0, None, None)
    with pytest.raises(ValueError, match="finite and not negative"):
        Reading(-1.0, "RAPL", 1.0, None, None)
    measured, missing = Reading(2.0, "a", 1.0, 0.1, None), Reading(None, "b", 1.0, None, "absent")
    assert total([measured, measured]) == 4.0
    assert total([measured, missing]) is None
    assert total([]) is None
    assert (total_known([measured, missing]), total_known([missing]), total_known([])) == (2.0, None, None)
