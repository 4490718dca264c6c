"""bench simulator measures and names both settings, the default and the fused scan, in processes of their own."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.benches import simulator
from neuro.simulators.lava.client import LavaError
from tests.experiments.console import document as printed


def test_both_settings_stand_in_the_lines_and_in_the_json(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen = []

    def apart(graph: Any, batch: int, steps: int, fused: bool | None, threads: int) -> simulator.Measured:
        seen.append((batch, fused))
        return simulator.measured(graph, batch, steps, fused, threads, runs=1)

    monkeypatch.setattr(simulator, "measured_apart", apart)
    monkeypatch.setattr(simulator, "lava_seconds", lambda graph, steps: 1e-3)
    monkeypatch.setattr(simulator, "best_of", lambda call, least_s=0.0, runs=1: (call(), 1e-3)[1])
    assert simulator.main(["--widths", "16", "--steps", "8", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = printed(lines[-1])
    assert document.keys() == {"n16"}
    assert document["n16"].keys() == {"default", "fused"}
    for found in document["n16"].values():
        assert found.keys() == {"b1", "b256", "gemm_fraction"}
        assert found["b1"] == pytest.approx(8.0)  # Lava's 1 ms a step over 1 ms for 8 steps
    assert seen == [(1, None), (1, True), (256, None), (256, True)]
    for name, setting in (("default", "None"), ("fused", "True")):
        assert any(f"batch 1, {name} (fused={setting}): " in line for line in lines)


def test_a_setting_is_measured_in_a_process_of_its_own() -> None:
    found = simulator.measured_apart(simulator.network(16), 2, 4, None, 1)
    assert found.first_s > 0
    assert 0 < found.step_s < 1
    assert len(found.firing) == 2


def test_without_lava_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def absent(*_: Any) -> float:
        raise LavaError("no Lava here")

    monkeypatch.setattr(simulator, "lava_seconds", absent)
    assert simulator.main(["--widths", "16"]) == 1
    assert "bench simulator: no Lava here" in capsys.readouterr().err
