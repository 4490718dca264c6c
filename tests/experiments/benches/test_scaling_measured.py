"""The measured part of `bench scale`."""

from __future__ import annotations

import pytest

from experiments.benches.scaling.measured import figures, summary


def test_speedups_are_medians_of_the_ratios_of_rounds():
    tokens = {f"{mesh} {gate}": [100, 100, 100] for mesh in ("single", "ddp") for gate in ("off", "on")}
    seconds = {
        "single off": [2.0, 4.0, 3.0],
        "ddp off": [1.0, 2.5, 1.0],
        "single on": [2.0, 2.0, 2.0],
        "ddp on": [2.0, 1.0, 1.6],
    }
    found = summary(seconds, tokens)
    assert found["gate_off"]["speedup"] == pytest.approx(2.0)  # of 2, 1.6, 3
    assert (found["gate_off"]["low"], found["gate_off"]["high"]) == pytest.approx((1.6, 3.0))
    assert found["gate_on"]["speedup"] == found["speedup"] == pytest.approx(1.25)  # of 1, 2, 1.25
    assert found["gate_on"]["tokens_per_s"] == pytest.approx({"single": 50.0, "ddp": 62.5})


@pytest.mark.soak
def test_two_real_processes_are_measured():
    found = figures(["--fast"])
    assert found["ddp"]["speedup"] > 0
    assert 0.45 < found["fsdp"]["bytes_ratio"] <= 0.55
    assert 0.45 < found["tp"]["bytes_ratio"] <= 0.55
    assert found["fsdp"]["blocks"]["bytes_ratio"] < 0.3
    assert 0 < found["gate_share"] < 1
