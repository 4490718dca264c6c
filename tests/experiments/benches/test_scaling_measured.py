"""The measured part of `bench scale`."""

from __future__ import annotations

import pytest

from experiments.benches.scaling.measured import figures, summary
from experiments.benches.scaling.rank import in_turn
from tests.sparse_update.parallel.pool import Pool


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


def in_two():
    calls = {"more": 0, "less": 0, "after": 0}

    def counted(name):
        calls[name] += 1
        sum(range(20_000))

    ways = {name: lambda name=name: counted(name) for name in ("more", "less")}
    asked = {"load_s": 30.0, "load_rounds": 12}
    return in_turn(ways, "less", asked, lambda: counted("after")), calls


def test_both_processes_measure_the_same_rounds_and_find_the_same(tmp_path):
    pool = Pool(2, tmp_path)
    try:
        (found, calls), (other, others_calls) = pool.run(in_two)
    finally:
        pool.close()
    assert found == other
    assert calls == others_calls
    rounds = found["rounds"] + 2  # of which two warm up
    assert calls == {"more": rounds, "less": rounds, "after": 2 * rounds}
    assert 10 <= found["rounds"] <= 12
    assert found["low"] <= found["ratio"] <= found["high"]
    assert (found["median"] is None) == (found["verdict"] == "too noisy")
    assert found["wall"]["low"] <= found["wall"]["ratio"] <= found["wall"]["high"]


@pytest.mark.soak
def test_two_real_processes_are_measured():
    found = figures(["--fast"])
    assert found["ddp"]["speedup"] > 0
    assert 0.45 < found["fsdp"]["bytes_ratio"] <= 0.55
    assert 0.45 < found["tp"]["bytes_ratio"] <= 0.55
    assert found["fsdp"]["blocks"]["bytes_ratio"] < 0.3
    assert found["fsdp"]["tenth"]["bytes_ratio"] < found["fsdp"]["blocks"]["bytes_ratio"]
    assert 0 < found["gate_share"] < 1
    assert found["resume"]["rounds"] == found["resume"]["stall"]["rounds"] == 2
    assert found["resume"]["ratio"] > 0
    assert found["resume"]["stall"]["wall"]["ratio"] > 0
