"""Loihi 2: whole networks scaled, never a figure per operation; and the published networks that this rests on."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hardware
from hardware import Board, Counts, DataFileError, Interval, Quantity, load_networks, load_profile
from hardware.energy.extrapolate import extrapolate
from hardware.energy.measured_networks import METHODS, read_networks

NETWORKS = load_networks()
ANCHOR = NETWORKS["pilotnet_snn"]
MIXTURE = load_profile("loihi1_davies2018")
FILES = Path(hardware.__file__).parent / "networks"


def test_the_anchor_gives_back_what_was_measured() -> None:
    span = Interval.exact(Quantity(152.85 * 16, "us"))
    report = extrapolate(ANCHOR.counts(), ANCHOR, MIXTURE, time=span, board=Board(1, 1))
    assert report.kind == "extrapolated"
    assert report.dynamic_j[1] == pytest.approx(1.094e-3)
    # 0.232 W x 2.4456 ms; total 1.661 mJ as published
    assert report.by_group()["static"][1] == pytest.approx(0.232 * 2.4456e-3)
    assert report.total_mid_j == pytest.approx(1.661e-3, rel=1e-3)
    assert report.total_low_j < 0.6 * report.total_mid_j < report.total_mid_j < 0.7 * report.total_high_j
    assert any(label.startswith("extrapolated: scaled from one measured network") for label in report.labels)
    assert report.lower_bound


def test_a_tenth_of_the_synops_by_hand() -> None:
    # An anchor of 100 synops, 10 active, 40 inactive updates and 10 events that took 1 J. A network with 10 synops, 10
    # active, 40 inactive and 5 events: ratios 0.1, 1, 1, 0.5.
    # Middle: (10 x 23.6 + 10 x 81 + 40 x 52 + 5 x 8.7) / (100 x 23.6 + 10 x 81 + 40 x 52 + 10 x 8.7) = 3169.5 / 5337
    layer = dataclasses.replace(ANCHOR.layers[1], synops=100, active=10, inactive=40, events=10)
    measured = {"static_power": Interval.of(2, 2, 2, "W"), "dynamic_energy": Interval.of(1, 1, 1, "J")}
    anchor = dataclasses.replace(ANCHOR, layers=(layer,), measured=measured)
    counts = [Counts("a", 1, 10, 5, 10, 40, 100, 100, False, 1)]
    report = extrapolate(counts, anchor, MIXTURE, time=Quantity(3, "s"), board=Board(powered=4, used=1))
    assert report.dynamic_j == pytest.approx((0.1, 3169.5 / 5337, 1.0))
    assert report.by_group()["static"][1] == pytest.approx(6)
    assert report.by_group()["idle chips"][1] == pytest.approx(18)


def test_what_it_does_not_know_is_named() -> None:
    host = Counts("head", 1, 0, 0, 0, 0, 600, 60, False, 0, host=True)
    counts = [Counts("a", 1, 10, 5, 10, 40, 100, 100, True, 16)]
    report = extrapolate([*counts, host], ANCHOR, MIXTURE)
    assert report.missing["static"].endswith("time or board not given")
    assert report.missing["host"] == "600 MACs on the host are not costed"
    assert any("graded message costs what the anchor's binary one does" in label for label in report.labels)
    with pytest.raises(ValueError, match="every layer runs on the host"):
        extrapolate([host], ANCHOR, MIXTURE)
    with pytest.raises(ValueError, match="static_power was not measured"):
        extrapolate(counts, NETWORKS["matmulfree_370m"], MIXTURE)
    with pytest.raises(ValueError, match="counts unpublished: activity is published as a picture only"):
        NETWORKS["pilotnet_sdnn"].counts()
    with pytest.raises(ValueError, match="a chip profile is needed"):
        extrapolate(counts, ANCHOR, load_profile("digital45_int8_sram"))


COUNT = st.integers(0, 10**9)
ROWS = st.lists(st.tuples(COUNT, COUNT, COUNT, COUNT), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(one=ROWS, two=ROWS)
def test_order_and_additivity(one: list[tuple[int, ...]], two: list[tuple[int, ...]]) -> None:
    def counts(rows: list[tuple[int, ...]], start: int) -> list[Counts]:
        return [Counts(f"l{start + i}", 3, s, e, a, q, 1, 0, False, 1) for i, (s, e, a, q) in enumerate(rows)]

    left, right = counts(one, 0), counts(two, len(one))
    whole, parts = extrapolate([*left, *right], ANCHOR, MIXTURE), [extrapolate(c, ANCHOR, MIXTURE) for c in (left, right)]
    for line in whole.lines:
        assert 0 <= line.low_j <= line.mid_j <= line.high_j
    assert whole.dynamic_j == pytest.approx([sum(p.dynamic_j[i] for p in parts) for i in range(3)], rel=1e-12)


def test_published_networks_say_where_they_come_from() -> None:
    assert [name for name, network in NETWORKS.items() if network.calibration] == ["pilotnet_snn"]
    for network in NETWORKS.values():
        assert network.source
        assert network.method in METHODS
        assert len(network.date) == 10
        assert network.measured or network.stated
        assert set(network.calibrates) <= set(network.measured)
        assert bool(network.layers) == (not network.reason)


def test_the_anchor_is_consistent() -> None:
    measured = ANCHOR.measured
    total_w, frames_s = measured["total_power"].to("W")[1], 408.9
    assert measured["total_energy"].to("mJ")[1] == pytest.approx(1e3 * total_w / frames_s, rel=1e-3)
    assert measured["dynamic_energy"].to("mJ")[1] == pytest.approx(1e3 * 0.447 / frames_s, rel=1e-3)
    for before, layer in pairwise(ANCHOR.layers):
        assert layer.events == before.active
        assert layer.active + layer.inactive == 16 * layer.neurons
        assert layer.synops <= 16 * layer.dense_macs
    placement = ANCHOR.place()
    assert (len(placement.cores), placement.chips) == (ANCHOR.placed["cores"], ANCHOR.placed["chips"])


@pytest.mark.parametrize(
    ("spot", "value", "message"),
    [
        (("pilotnet_sdnn", "reason"), ..., "counts, or null and the reason"),
        (("pilotnet_sdnn", "source"), ..., "missing key source"),
        (("pilotnet_sdnn", "measured", "step", "unit"), "mJ", "unit 'mJ' is energy, time is needed"),
        (("pilotnet_sdnn", "measured", "speed"), {}, "unknown key speed"),
        (("pilotnet_sdnn", "steps_per_inference"), 0, "expected a whole number from 1"),
        (("pilotnet_sdnn", "role"), "hero", "'hero' is not one of calibration, compared"),
        (("pilotnet_sdnn", "calibrates"), ["dynamic_power"], "calibrates: 'dynamic_power' is not one of"),
        (("s4d", "stated"), ..., "nothing measured, and not stated what was published instead"),
        (("pilotnet_snn", "architecture"), {"source": "x", "date": "2026"}, "missing key populations"),
        (
            ("pilotnet_snn", "architecture"),
            {"source": "x", "date": yaml.safe_load("2026-11-21"), "populations": {"a": {"neurons": 1, "from": ["b"]}}},
            "a: from: 'b' is not one of a",
        ),
        (("pilotnet_snn", "counts", "layers", "3->24", "synops"), -1, "expected a whole number from 0"),
        (("pilotnet_snn", "counts", "method"), "guessed", "'guessed' is not one of measured, recomputed"),
    ],
)
def test_a_wrong_network_is_refused(tmp_path: Path, spot: tuple[str, ...], value: object, message: str) -> None:
    content = yaml.safe_load((FILES / "loihi2.yaml").read_text())
    entry = content["networks"]
    for key in spot[:-1]:
        entry = entry[key]
    if value is ...:
        del entry[spot[-1]]
    else:
        entry[spot[-1]] = value
    path = tmp_path / "loihi2.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(DataFileError, match=message):
        read_networks(path)
