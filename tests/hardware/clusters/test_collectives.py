"""Collectives by hand, and what must hold of every group and size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.clusters.collectives import Group, bus_gb_s, moved_bytes, seconds
from hardware.clusters.machines import ENDS, load_machine
from hardware.datafile import DataFileError

H100 = load_machine("h100_80gb")
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
groups = st.builds(lambda nodes, here: Group(nodes * here, here), st.integers(1, 1250), st.sampled_from([1, 2, 4, 8]))


def test_a_large_gather_in_a_node_is_bytes_over_the_bus() -> None:
    # 8 ranks, 8 GB: 7 GB past each at 450 x 0.72 = 324 GB/s; 8.4 us and seven hops of 3.4 us are nothing beside it
    bus = 450 * 0.72
    assert bus_gb_s(H100, Group(8, 8), "mid") == pytest.approx(bus)
    expected = 7 / bus + 1e-6 * (8.4 + 7 * 3.4)
    assert seconds("all_gather", 8e9, Group(8, 8), H100) == pytest.approx(expected)


def test_between_nodes_the_cards_of_all_ranks_of_a_node_work() -> None:
    assert bus_gb_s(H100, Group(16, 8), "mid") == pytest.approx(450 * 0.72)  # 8 x 50 x 0.85 = 340 would be more
    assert bus_gb_s(H100, Group(2, 1), "mid") == pytest.approx(50 * 0.85)
    assert bus_gb_s(H100, Group(8, 4), "mid") == pytest.approx(4 * 50 * 0.85)


def test_eight_bytes_over_ten_thousand_ranks_take_hops_only() -> None:
    whole = Group(10_000, 8)
    # ring, protocol ll: 8,750 hops of 0.47 us x 1.8 in nodes, 1,249 of 2.7 us between them
    ring = 1e-6 * (3.6 + 8750 * 0.47 * 1.8 + 1249 * 2.7)
    assert seconds("all_gather", 8, whole, H100) == pytest.approx(ring, rel=1e-6)
    # tree, protocol ll: 7 hops up and down in a node, 11 between nodes
    tree = 1e-6 * (4.4 + 14 * 0.52 * 1.8 + 22 * 5.0)
    assert seconds("all_reduce", 8, whole, H100) == pytest.approx(tree, rel=1e-5)


@given(groups, st.floats(0, 1e12), st.floats(1, 1e12))
def test_what_holds_of_every_collective(group: Group, size: float, more: float) -> None:
    for kind in KINDS:
        low, mid, high = (seconds(kind, size, group, H100, end) for end in ENDS)
        assert 0 <= low <= mid <= high
        assert (mid == 0) == (group.ranks == 1)
        assert mid >= moved_bytes(kind, size, group) / (1e9 * bus_gb_s(H100, group, "mid")) * (group.ranks > 1) * 0.5
        assert seconds(kind, size + more, group, H100) >= mid
    halves = moved_bytes("all_gather", size, group) + moved_bytes("reduce_scatter", size, group)
    assert moved_bytes("all_reduce", size, group) == pytest.approx(halves)


def test_a_group_of_broken_nodes_is_refused() -> None:
    with pytest.raises(DataFileError, match="12 ranks, 8 in a node"):
        Group(12, 8)
