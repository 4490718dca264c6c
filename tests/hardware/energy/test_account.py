"""The whole account of a toy network by hand: placement, time, board, host; and the algebra every report must obey."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hardware
from hardware import Board, Counts, DataFileError, Interval, Profile, Quantity, UnitError, account, load_profile
from hardware.chips.mesh import Mesh
from hardware.energy.report import GROUPS
from hardware.placement.routing import depth, heaviest_link, layer_traffic
from tests.hardware.toy import HEAD, A, B, toy

PJ = 1e-12


def test_two_layers_with_everything_by_hand() -> None:
    # Layer a gets 10 events from the host, each to its 4 cores: 40 messages, no hop counted for the host's way.
    # Layer b gets 5 events, each to its 4 cores one tile to the south: 20 messages, 20 hops.
    report = account(
        [A, B, HEAD],
        load_profile("loihi1_davies2018"),
        placement=toy(),
        time=Quantity(2, "us"),
        board=Board(powered=3, used=1),
        host_profile=load_profile("digital45_int8_sram"),
    )
    by_hand_pj = {
        ("a", "synapse"): 40 * 23.6,  # 944
        ("a", "neuron"): 12 * 81.0 + 28 * 52.0,  # 2428
        ("a", "traffic"): 40 * 1.7,  # 68
        ("b", "synapse"): 20 * 23.6,  # 472
        ("b", "neuron"): 8 * 81.0 + 32 * 52.0,  # 2312
        ("b", "traffic"): 20 * 1.7 + 20 * 4.0,  # 114
        ("chip", "static"): 104e-3 * 2e-6 / PJ,  # 208,000: one used chip
        ("chip", "idle chips"): 2 * 104e-3 * 2e-6 / PJ,  # 416,000: two chips that do nothing
        ("head", "host"): 600 * (0.3 + 2.5),  # 1680
    }
    found = {(layer, group): triple for layer, groups in report.by_layer().items() for group, triple in groups.items()}
    assert set(found) == set(by_hand_pj)
    for key, joules in by_hand_pj.items():
        assert found[key][1] == pytest.approx(joules * PJ), key
    # 944 + 2428 + 68 + 472 + 2312 + 114 = 6338 dynamic; + 208,000 + 416,000 + 1680 = 632,018
    assert report.dynamic_j[1] == pytest.approx(6338 * PJ)
    assert report.total_mid_j == pytest.approx(632_018 * PJ)
    # Low ends: 60 x 20.8388 + 20 x 71.523 + 60 x 45.2096 + 60 x 1.5011 + 20 x 3.532 = 5554.07 dynamic
    #           + 3 x 89.1 mW x 2 us = 534,600 + 600 x 1.48 = 888
    assert report.total_low_j == pytest.approx((5554.07 + 534_600 + 888) * PJ)
    # High ends: 60 x 39.6535 + 20 x 158.7257 + 60 x 90.477 + 60 x 123.987 + 20 x 4.6914 = 18515.392
    #            + 3 x 169.4 mW x 2 us = 1,016,400 + 600 x 12.8 = 7680
    assert report.total_high_j == pytest.approx((18_515.392 + 1_016_400 + 7680) * PJ)


def test_what_is_still_missing_is_named_and_makes_a_lower_bound() -> None:
    placed = account([A, B, HEAD], load_profile("loihi1_davies2018"), placement=toy())
    assert placed.lower_bound
    assert placed.missing["host"] == "600 MACs on the host are not costed (71.4 % of all MACs)"
    assert placed.missing["static"].endswith("for a time and 1 powered chips; the time is not known")
    # 10 of the 15 events come from the host, each to 4 cores, over 10 tokens
    assert placed.missing["off-chip traffic"].startswith("0.0 messages a token between chips, 4.0 from the host")
    assert any("fill the mesh column by column" in label for label in placed.labels)
    assert any("rates, not measured" in label for label in placed.labels)
    assert "host              " in placed.table() + " " * 20
    assert "not known  600 MACs" in placed.table()
    assert placed.table().splitlines()[-1].startswith("total, at least")
    plain = account([A, B], load_profile("loihi1_davies2018"))
    assert any("two hops (no placement given" in label for label in plain.labels)
    assert set(plain.by_term()) == {"synapse", "neuron_active", "neuron_inactive", "message"}
    form = json.loads(json.dumps(placed.detail()))
    assert set(form["layers"]) == {"a", "b"}
    assert set(form["groups"]) <= set(GROUPS)


def own_profile(folder: Path, **off_chip: object) -> Profile:
    """loihi1_davies2018 with a figure for messages that leave their chip."""
    content = yaml.safe_load((Path(hardware.__file__).parent / "profiles" / "loihi1_davies2018.yaml").read_text())
    content["name"] = "mine"
    content["coefficients"]["off_chip"] = {"source": "ours", "date": content["coefficients"]["synapse"]["date"], **off_chip}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return load_profile(folder / "mine.yaml")


def test_messages_between_chips_by_hand(tmp_path: Path) -> None:
    # The same placement with layer b on a second chip: its 20 messages cross, without hops; 40 come from the host.
    cores = tuple(dataclasses.replace(core, chip=1) if core.number >= 4 else core for core in toy().cores)
    apart = dataclasses.replace(toy(), cores=cores, chips=2)
    figure = {"value": 50.0, "low": 20.0, "high": 90.0, "unit": "pJ/message", "method": "estimated"}
    report = account([A, B], own_profile(tmp_path, **figure), placement=apart, time=Quantity(2, "us"))
    layers = report.by_layer()
    assert layers["a"]["off-chip traffic"] == pytest.approx((40 * 20 * PJ, 40 * 50 * PJ, 40 * 90 * PJ))
    assert layers["b"]["off-chip traffic"] == pytest.approx((20 * 20 * PJ, 20 * 50 * PJ, 20 * 90 * PJ))
    assert layers["b"]["traffic"][1] == pytest.approx(20 * 1.7 * PJ)
    assert report.by_group()["static"][1] == pytest.approx(2 * 104e-3 * 2e-6)
    # 944 + 2428 + 68 + 472 + 2312 + 34 = 6258, and 60 x 50 = 3000 off the chip
    assert report.dynamic_j[1] == pytest.approx(9258 * PJ)
    assert report.total.to("pJ")[1] == pytest.approx(9258 + 416_000)
    assert "off-chip traffic" not in report.missing
    shipped = account([A, B], load_profile("loihi1_davies2018"), placement=apart)
    assert shipped.missing["off-chip traffic"] == (
        "2.0 messages a token between chips, 4.0 from the host; no energy is published"
    )


def test_an_off_chip_figure_that_is_not_known_or_cannot_be_used(tmp_path: Path) -> None:
    unknown = own_profile(tmp_path, value=None, reason="nobody measured it")
    assert account([A], unknown, placement=toy()).missing["off-chip traffic"].endswith("; nobody measured it")
    assert account([A], unknown).missing["off-chip traffic"] == "not counted without a placement"
    content = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    for term in ("message_base", "hop_ew", "hop_ns"):
        del content["coefficients"][term]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataFileError, match="off_chip without the rest of message_base, hop_ew, hop_ns"):
        load_profile(tmp_path / "mine.yaml")


def test_a_total_carries_its_unit() -> None:
    found = account([A], load_profile("loihi1_davies2018"))
    assert found.total.to("J") == (found.total_low_j, found.total_mid_j, found.total_high_j)
    with pytest.raises(UnitError, match=r"cannot add .* \(energy\) and .* \(time\)"):
        found.total + Interval.of(1, 2, 3, "ns")
    assert (found.total + Interval.of(1, 2, 3, "nJ")).dimension == "energy"


def test_a_time_with_bounds_and_the_board_of_the_placement() -> None:
    span = Interval.of(1, 2, 4, "us")
    report = account([A, B], load_profile("loihi1_davies2018"), placement=toy(), time=span)
    low, mid, high = report.by_group()["static"]
    assert (low, mid, high) == pytest.approx((89.1e-3 * 1e-6, 104e-3 * 2e-6, 169.4e-3 * 4e-6))
    assert report.by_group()["idle chips"] == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"time": Quantity(1, "us")}, ValueError, "how many chips were powered"),
        ({"time": Quantity(0, "us"), "board": Board(1, 1)}, ValueError, "a time must be above zero"),
        ({"time": Quantity(1, "pJ"), "board": Board(1, 1)}, UnitError, "energy, not time"),
        ({"time": Quantity(1, "s"), "powered": Quantity(1, "s")}, ValueError, "not both"),
        ({"host_profile": "loihi1_sanafe"}, ValueError, "a host is priced by a dense profile"),
        ({"placement": "other"}, ValueError, "layer 'a' is counted but not in the placement"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    if "host_profile" in change:
        change["host_profile"] = load_profile(str(change["host_profile"]))
    if "placement" in change:
        change["placement"] = dataclasses.replace(toy(), layers=toy().layers[1:])
    with pytest.raises(error, match=message):
        account([A, B], load_profile("loihi1_davies2018"), **change)  # type: ignore[arg-type]


def test_boards_and_hosts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 <= used <= powered"):
        Board(powered=1, used=2)
    big = dataclasses.replace(toy(), chips=2)
    with pytest.raises(ValueError, match="1 chips used, the placement takes 2"):
        account([A, B], load_profile("loihi1_sanafe"), placement=big, time=Quantity(1, "s"), board=Board(4, 1))
    with pytest.raises(ValueError, match="a dense one prices host layers itself"):
        account([A], load_profile("digital45_int8_sram"), host_profile=load_profile("gpu_h100_sheet"))


def test_a_gpu_as_host_keeps_its_caution() -> None:
    report = account([A, HEAD], load_profile("loihi1_sanafe"), host_profile=load_profile("gpu_h100_sheet"))
    # 600 x 1.415 pJ, a floor; the weight read is part of the board's power and stays named
    assert report.by_group()["host"][1] == pytest.approx(849 * PJ)
    assert any(entry.startswith("host weight_read:") for entry in report.unknown)
    assert any("floor, data sheet" in label for label in report.labels)


def test_rate_coding_counts_every_step() -> None:
    # T = 4 steps a token: the counts hold all of them, so the joules do too.
    steps = dataclasses.replace(A, time_steps=4)
    profile = load_profile("loihi1_davies2018")
    assert account([steps], profile).total_mid_j == account([A], profile).total_mid_j
    with pytest.raises(ValueError, match="time_steps is 0; a token takes at least one step"):
        dataclasses.replace(A, time_steps=0)
    with pytest.raises(ValueError, match="layer 'b' takes 1 steps a token, layer 'a' 4"):
        account([steps, B], profile)


def test_traffic_and_links_of_the_toy() -> None:
    placement, mesh = toy(), Mesh(8, 4, 4, "test")
    traffic = layer_traffic(placement, mesh)
    assert (traffic["a"].deliveries, traffic["a"].from_host, traffic["a"].hops_ew) == (4, 4, 0)
    assert (traffic["b"].deliveries, traffic["b"].hops_ew, traffic["b"].hops_ns, traffic["b"].between_chips) == (4, 0, 4, 0)
    # Every neuron sends each step as placed: 4 x 4 messages on the one link
    assert heaviest_link(placement, mesh, {}) == (0, 16)
    assert depth(placement) == 2


@given(
    source=st.integers(0, 127),
    target=st.integers(0, 127),
    shape=st.sampled_from([Mesh(8, 4, 4, "x"), Mesh(16, 8, 1, "x"), Mesh(4, 4, 8, "x")]),
)
def test_hops_are_links(source: int, target: int, shape: Mesh) -> None:
    links = shape.links(source, target)
    assert len(links) == sum(shape.hops(source, target))
    assert shape.hops(source, target) == shape.hops(target, source)
    for (_, _, x, y), (x1, y1, _, _) in pairwise(links):
        assert (x, y) == (x1, y1)
    with pytest.raises(ValueError, match="the mesh has 128 slots"):
        shape.tile(128)


COUNT = st.integers(0, 10**12)
ROW = st.tuples(COUNT, COUNT, COUNT, COUNT)
PLACED = toy()


def _counts(name: str, row: tuple[int, int, int, int]) -> Counts:
    synops, events, active, inactive = row
    return Counts(name, 7, synops, events, active, inactive, 1, 0, False, 1)


@settings(max_examples=40, deadline=None)
@given(one=ROW, two=ROW, more=ROW, name=st.sampled_from(["loihi1_davies2018", "loihi1_sanafe"]), us=st.floats(1e-3, 1e6))
def test_order_additivity_and_monotonicity(
    one: tuple[int, int, int, int],
    two: tuple[int, int, int, int],
    more: tuple[int, int, int, int],
    name: str,
    us: float,
) -> None:
    profile, span = load_profile(name), Quantity(us, "us")
    both = account([_counts("a", one), _counts("b", two)], profile, placement=PLACED, time=span, board=Board(4, 2))
    assert 0 <= both.total_low_j <= both.total_mid_j <= both.total_high_j
    for groups in both.by_layer().values():
        for low, mid, high in groups.values():
            assert 0 <= low <= mid <= high
    for index, total_j in enumerate((both.total_low_j, both.total_mid_j, both.total_high_j)):
        assert sum(triple[index] for triple in both.by_group().values()) == pytest.approx(total_j, rel=1e-12)
    alone = [account([_counts(layer, row)], profile, placement=PLACED) for layer, row in (("a", one), ("b", two))]
    assert both.dynamic_j == pytest.approx([sum(r.dynamic_j[i] for r in alone) for i in range(3)], rel=1e-12, abs=1e-30)
    grown = tuple(a + b for a, b in zip(one, more, strict=True))
    larger = account([_counts("a", grown), _counts("b", two)], profile, placement=PLACED, time=span, board=Board(4, 2))  # type: ignore[arg-type]
    assert larger.total_low_j >= both.total_low_j
    assert larger.total_high_j >= both.total_high_j
