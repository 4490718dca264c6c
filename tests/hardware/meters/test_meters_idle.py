"""Idle power beside the reading, subtracted and not; Zeus as a second opinion that is not believed without a meter."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from hardware import Meter, Reading, measure_idle, total, total_above_idle
from hardware.meters.zeus import ZeusCheck, compare, compare_all
from tests.hardware.meters.test_meters import RANGE_UJ, Clock, FakeNvml, zone


def test_idle_is_shown_both_ways_across_a_wrap(tmp_path: Path) -> None:
    clock = Clock()
    energy = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 10_000_000)

    def quiet(seconds: float) -> None:
        clock.now_s += seconds
        energy.write_text("10000000")  # 10 J to the wrap and 10 J after it: 20 J in 10 s

    idle = measure_idle(10, sleep=quiet, gpu=False, powercap=tmp_path, clock=clock)
    assert idle[0].mean_w == pytest.approx(2.0)
    with Meter(gpu=False, powercap=tmp_path, clock=clock, idle=idle) as meter:
        clock.now_s += 5
        energy.write_text("70000000")
    (reading,) = meter.readings
    assert reading.joules == pytest.approx(60)  # not subtracted
    assert reading.idle_w == pytest.approx(2.0)
    assert reading.above_idle_j == pytest.approx(50)  # 60 - 2 W x 5 s
    assert (total(meter.readings), total_above_idle(meter.readings)) == (pytest.approx(60), pytest.approx(50))
    assert reading.to_dict()["above_idle_j"] == pytest.approx(50)
    assert reading.window_s == 5
    assert reading.resolution_j == pytest.approx(60 * 0.001 / 5)


def test_without_idle_or_without_a_meter_there_is_no_difference(tmp_path: Path) -> None:
    plain = Reading(60.0, "RAPL: package-0", 5.0, 0.012, None)
    assert plain.above_idle_j is None
    assert plain.to_dict()["above_idle_j"] is None
    assert total_above_idle([plain]) is None
    assert total_above_idle([]) is None
    waited: list[float] = []
    nothing = measure_idle(10, sleep=waited.append, gpu=False, powercap=tmp_path / "absent")
    assert waited == []  # without a meter there is nothing to wait for
    assert nothing[0].joules is None
    assert nothing[0].mean_w is None
    with Meter(gpu=False, powercap=tmp_path / "absent", idle=nothing) as meter:
        pass
    (reading,) = meter.readings
    assert (reading.joules, reading.idle_w, reading.above_idle_j) == (None, None, None)
    assert "no RAPL here" in str(reading.reason)
    # Less than idle: shown as it is, not clipped to 0
    assert Reading(9.0, "x", 5.0, 1.0, None, idle_w=2.0).above_idle_j == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="idle_w is -1"):
        Reading(9.0, "x", 5.0, 1.0, None, idle_w=-1)
    with pytest.raises(ValueError, match="must be above zero"):
        measure_idle(0)


def test_idle_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeNvml(), Clock()
    monkeypatch.setitem(sys.modules, "pynvml", fake)

    def quiet(seconds: float) -> None:
        clock.now_s += seconds
        fake.energy_mj[0] += 800_000  # 800 J in 10 s

    idle = measure_idle(10, sleep=quiet, cpu=False, gpus=[0], clock=clock)
    with Meter(cpu=False, gpus=[0], clock=clock, idle=idle) as meter:
        clock.now_s += 20
        fake.energy_mj[0] += 6_000_000
    assert (meter.readings[0].joules, meter.readings[0].above_idle_j) == (6000.0, pytest.approx(4400))


class Result:
    def __init__(self, gpu: dict[int, float] | None, cpu: dict[int, float] | None) -> None:
        self.gpu_energy, self.cpu_energy = gpu, cpu
        self.total_energy = sum((gpu or {}).values())


def zeus(monkeypatch: pytest.MonkeyPatch, result: Result | Exception) -> None:
    class ZeusMonitor:
        def __init__(self) -> None:
            if isinstance(result, Exception):
                raise result

        def begin_window(self, name: str) -> None:
            self.name = name

        def end_window(self, name: str) -> Result:
            assert name == self.name
            assert isinstance(result, Result)
            return result

    module = types.ModuleType("zeus.monitor")
    module.ZeusMonitor = ZeusMonitor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus", types.ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


def test_a_zeus_total_of_zero_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for result in (Result({}, None), Result({0: 0.0}, {})):
        zeus(monkeypatch, result)
        assert result.total_energy == 0
        with ZeusCheck() as check:
            pass
        assert [reading.joules for reading in check.readings] == [None]
        assert check.readings[0].reason
    with ZeusCheck() as check:
        pass
    own = Reading(3.0, "NVML: GPU 0", 1.0, 0.3, None)
    assert "no cross-check" in compare(own, check.readings[0])


def test_zeus_beside_our_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    zeus(monkeypatch, Result({0: 100.0}, {0: 7.0}))
    with ZeusCheck() as check:
        pass
    assert [(r.source, r.joules) for r in check.readings] == [("Zeus: GPU 0", 100.0), ("Zeus: CPU 0", 7.0)]
    ours, theirs = Reading(101.0, "NVML: GPU 0", 10.0, 1.0, None), Reading(100.0, "Zeus: GPU 0", 10.0, 1.0, None)
    assert "agree (1 J)" in compare(ours, theirs)
    assert "differ (11 J)" in compare(Reading(111.0, "NVML: GPU 0", 10.0, 1.0, None), theirs)


def test_every_device_finds_its_counterpart() -> None:
    def own(source: str, joules: float | None) -> Reading:
        return Reading(joules, source, 10.0, None if joules is None else 1.0, "no meter" if joules is None else None)

    ours = [own("NVML: GPU 0, Fake 0", 101.0), own("NVML: GPU 1, Fake 1", 50.0), own("RAPL: package-0", 7.0)]
    theirs = [own("Zeus: GPU 0", 100.0), own("Zeus: CPU 0", 20.0)]
    agree, alone, differ = compare_all(ours, theirs)
    assert "agree (1 J)" in agree
    assert alone.endswith("no cross-check, Zeus: GPU 1 was not measured: zeus did not read this device")
    assert "differ (13 J)" in differ
    (nothing,) = compare_all([own("RAPL", None)], [own("Zeus", None)])
    assert nothing == "RAPL: no cross-check, RAPL was not measured: no meter"
    (without,) = compare_all([own("RAPL: package-0", 7.0)], [own("Zeus", None)])
    assert without.endswith("Zeus: CPU 0 was not measured: no meter")


def test_zeus_absent_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    with ZeusCheck() as check:
        pass
    assert "pip install 'spikegate[energy-check]'" in str(check.readings[0].reason)
    zeus(monkeypatch, RuntimeError("permission"))
    with ZeusCheck() as check:
        pass
    assert "zeus does not start (permission)" in str(check.readings[0].reason)
