"""`python -m experiments.bench account`: what is compared, what is not and why, and the recount."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import bench
from experiments.benches import account as bench_account
from hardware.energy.measured_networks import Layer, Network, load_networks
from hardware.interval import Interval

NETWORKS = load_networks()
ANCHOR = NETWORKS["pilotnet_snn"]


def test_the_last_line_is_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["account"]) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    assert set(NETWORKS) <= set(document)
    for entry in document.values():
        assert set(entry) == {"status", "relative_error", "inside_interval"}
        assert entry["status"] in ("calibration", "counts unpublished", "compared", "bounded")
        assert (entry["relative_error"] is None) == (entry["status"] != "compared")
        assert (entry["inside_interval"] is None) == (entry["status"] not in ("compared", "bounded"))
    calibrating = [name for name, entry in document.items() if entry["status"] == "calibration"]
    assert calibrating == ["braille_recurrent.static", "braille_recurrent.static_cores", "pilotnet_snn"]
    for name in ("s4d", "delay_snn", "video_audio_2023", "region_masking", "ndns_sdnn"):  # ratios, no joules
        assert document[name]["status"] == "counts unpublished"
        (line,) = (line for line in printed if line.startswith(f"{name} "))
        assert NETWORKS[name].stated in line
    step = document["pilotnet_snn.step"]
    assert step["inside_interval"] is True
    assert abs(step["relative_error"]) < 1
    assert any("golden spikes of one frame" in line for line in printed)


def test_an_error_by_hand() -> None:
    entry = bench_account.compare(Interval.of(1, 3, 4, "mJ"), Interval.of(2, 2, 2, "mJ"), "J")
    assert entry == {"status": "compared", "relative_error": 0.5, "inside_interval": True}
    entry = bench_account.compare(Interval.of(1, 3, 4, "mJ"), Interval.of(5, 5, 5, "mJ"), "J")
    assert entry == {"status": "compared", "relative_error": -0.4, "inside_interval": False}


def test_a_network_that_was_not_used_for_calibration_is_compared() -> None:
    twin = dataclasses.replace(ANCHOR, name="twin", calibration=False)
    entry, text = bench_account.energy_entry(twin, ANCHOR)
    assert entry["status"] == "compared"
    assert entry["relative_error"] == pytest.approx(0, abs=1e-3)
    assert "extrapolated" in text


def test_bounds_of_a_published_architecture_by_hand() -> None:
    # 48 inputs, 450 recurrent neurons, 28 outputs, 270 steps
    pair = bench_account.bounds_entry(NETWORKS["braille_recurrent"])
    assert pair is not None
    entry, text = pair
    quiet_pj = (450 + 28) * 270 * 45.2096
    synops = ((48 + 450) * 450 + 450 * 28) * 270
    events = ((48 + 450) + 450) * 270
    busy_pj = synops * 39.6535 + (48 + 450 + 28) * 270 * 158.7257 + events * 161.5182
    assert f"{1e-6 * quiet_pj:.3g} uJ without a spike, {1e-6 * busy_pj:.4g} uJ with all of them" in text
    assert entry == {"status": "bounded", "relative_error": None, "inside_interval": True}
    # the rate at which Davies' middle values give 132.4 uJ
    none_pj = (450 + 28) * 270 * 52.0
    all_pj = synops * 23.6 + (48 + 450 + 28) * 270 * 81.0 + events * 8.7
    rate = (132.4e6 - none_pj) / (all_pj - none_pj)
    assert f"to {100 * rate:.2g} % of neurons and steps" in text
    measured = dict(NETWORKS["braille_recurrent"].measured) | {"dynamic_energy": Interval.of(1, 1, 1, "uJ")}
    refuted = bench_account.bounds_entry(dataclasses.replace(NETWORKS["braille_recurrent"], measured=measured))
    assert refuted is not None
    assert refuted[0]["inside_interval"] is False
    assert bench_account.bounds_entry(ANCHOR) is None
    with pytest.raises(ValueError, match="no architecture with its steps"):
        ANCHOR.extreme_counts(True)


def test_static_power_beside_the_profiles() -> None:
    pair = bench_account.static_entry(NETWORKS["lsnn_smnist"])
    assert pair is not None
    # one core of the chip in use: the profile's 104 mW is that of a chip in full use, and the bench says so
    assert pair[0]["relative_error"] == pytest.approx(104 / 1.155 - 1, abs=1e-3)
    assert pair[0]["inside_interval"] is False
    assert bench_account.static_entry(NETWORKS["nxtf_mnist"]) is None
    assert bench_account.static_entry(ANCHOR) is None


def small() -> Network:
    """One convolution and one dense layer, in the anchor's place."""
    geometry = {"shape": [3, 1, 1], "kernel": [2, 1], "stride": [1, 1], "padding": [0, 0], "weight_bits": 8}
    layers = (
        Layer("input", 4, 0, 0, 0, 0, 0, {"shape": [4, 1, 1]}),
        Layer("conv", 3, 0, 0, 0, 0, 0, geometry),
        Layer("dense", 2, 0, 0, 0, 0, 0, {"weight_bits": 8}),
    )
    return dataclasses.replace(ANCHOR, layers=layers, steps_per_inference=2)


def test_the_recount_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_account, "GOLDEN", ("input", "conv-0"))
    spikes = np.zeros((4, 1, 1, 4), dtype=bool)
    spikes[0, 0, 0, :2] = True  # an edge neuron, twice: one synapse each
    spikes[1, 0, 0, 1] = True  # an inner neuron: two synapses
    spikes[2, 0, 0, 3] = True  # after the two steps: not counted
    np.save(tmp_path / "input.npy", spikes)
    fired = np.zeros((3, 1, 1, 4), dtype=bool)
    fired[2, 0, 0, 1:] = True  # steps 1 and 2 count, one later than the input's
    np.save(tmp_path / "conv-0.npy", fired)
    given, conv, dense = bench_account.recount(small(), tmp_path)
    assert (given.active, given.inactive) == (3, 5)
    # 3 events, 1 + 1 + 2 synapses; 4 dense positions: 1 + 2 + 2 + 1 = 6 MACs
    assert (conv.events, conv.synops, conv.active, conv.inactive, conv.dense_macs) == (3, 4, 2, 4, 6)
    assert (dense.events, dense.synops, dense.active, dense.inactive, dense.dense_macs) == (2, 4, 0, 4, 6)
    np.save(tmp_path / "conv-0.npy", fired[..., :2])
    with pytest.raises(ValueError, match=r"conv-0\.npy has shape .*3 neurons and 3 steps are needed"):
        bench_account.recount(small(), tmp_path)


def test_a_missing_folder_is_an_error_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_account.main(["--golden", str(tmp_path)]) == 2
    assert "bench account: " in capsys.readouterr().err


def test_the_ratio_against_fp32_by_hand() -> None:
    split = bench_account.against_fp32(ANCHOR.counts())
    synops, macs = (sum(getattr(layer, name) for layer in ANCHOR.layers) for name in ("synops", "dense_macs"))
    assert split.open == ("chip",)
    assert split.known["sparsity"][1] == pytest.approx(macs / synops)
    assert split.known["precision"][1] == pytest.approx((4.6 + 10) / (0.3 + 2.5))
    low, mid, high = split.known["precision"]
    assert low <= mid <= high
    assert split.ratio[1] == pytest.approx(mid * macs / synops * split.rest[1])
