"""The simulator over processes: every value and count of one process, for every kind, way of splitting and mode."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuro.graph import GraphError, Population, Projection, SpikingGraph
from neuro.graph.kinds import KINDS
from neuro.simulators.activity import RECORD_ALL, Activity, compare
from neuro.simulators.fixed_point import FixedPointOverflow, simulate
from neuro.simulators.inputs import InputError
from neuro.simulators.ranks import RankError, Ranks, SplitError, partition
from neuro.simulators.ranks.splitting import crossing, lookahead, work_of
from tests.neuro.simulators import xylo_networks

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, limit_s=120) as found:
        yield found


def assert_same(expected: Activity, got: Activity) -> None:
    difference = compare(expected, got)
    assert difference.equal, str(difference)
    assert not difference.skipped
    for part in ("populations", "projections", "cores", "batch", "steps", "ran_on", "models", "notes", "mode"):
        assert getattr(expected, part) == getattr(got, part), part
    assert list(expected.spikes) == list(got.spikes)
    assert {name: list(kept) for name, kept in expected.states.items()} == {
        name: list(kept) for name, kept in got.states.items()
    }


def drawn_split(graph: SpikingGraph, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    return {population.name: int(rng.integers(2)) for population in graph.populations}


@FAST
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), by=st.sampled_from(["batch", "populations"]))
def test_generated_networks_of_every_kind_are_those_of_one_process(
    ranks: Ranks, networks: ModuleType, seed: int, batch: int, by: str
) -> None:
    graph = networks.network(seed)
    inputs = networks.messages(graph, seed, batch, 17)
    mode = ["lava", "chip"][seed % 2]
    split = drawn_split(graph, seed) if by == "populations" else None  # loops are cut, too
    placement = None
    if seed % 3 == 0:
        placement = {p.name: np.arange(p.size) % 3 for p in graph.populations}
    options: dict[str, Any] = {"mode": mode, "record": RECORD_ALL, "placement": placement}
    assert_same(simulate(graph, inputs, **options), ranks.simulate(graph, inputs, by=by, split=split, **options))


@pytest.mark.soak
def test_a_thousand_generated_networks_on_three_processes_are_those_of_one(
    networks: ModuleType, record_property: Callable[[str, object], None]
) -> None:
    with Ranks(3, limit_s=300) as three:
        for seed in range(1000):
            graph = networks.network(seed)
            inputs = networks.messages(graph, seed, 1 + seed % 4, 23)
            options: dict[str, Any] = {"mode": ["lava", "chip"][seed // 2 % 2], "record": RECORD_ALL}
            rng = np.random.default_rng(seed)
            split = {population.name: int(rng.integers(3)) for population in graph.populations}
            ways: dict[str, Any] = {"by": "populations", "split": split} if seed % 2 else {"by": "batch"}
            assert_same(simulate(graph, inputs, **options), three.simulate(graph, inputs, **ways, **options))
    record_property("soak", {"what": "generated networks simulated on three processes, equal to one", "tried": 1000})


def test_the_generated_networks_have_every_kind_of_their_family_and_delays_that_cross(networks: ModuleType) -> None:
    kinds, longest = set(), set()
    for seed in range(80):
        graph = networks.network(seed)
        kinds |= {population.kind for population in graph.populations}
        longest.add(lookahead(graph, drawn_split(graph, seed)))
    assert kinds >= {name for name, kind in KINDS.items() if kind.lava and not name.startswith("rf")}
    assert longest >= {None, 1}


@pytest.mark.parametrize("kind", ["rf", "rf_iz"])
@pytest.mark.parametrize("by", ["batch", "populations"])
def test_resonators_are_those_of_one_process(ranks: Ranks, networks: ModuleType, kind: str, by: str) -> None:
    for seed in range(4):
        graph = networks.resonators(kind, seed, each=True, loop=seed % 2 == 0)
        inputs = networks.rings(seed, 3)
        split = drawn_split(graph, seed) if by == "populations" else None
        assert_same(
            simulate(graph, inputs, record=RECORD_ALL), ranks.simulate(graph, inputs, by=by, split=split, record=RECORD_ALL)
        )


KINDS_WITHOUT_LAVA = [
    name for name, kind in KINDS.items() if name != "input" and kind.family == "loihi" and not (kind.lava or kind.extends)
] + [name for name, kind in KINDS.items() if kind.extends]


@pytest.mark.parametrize("kind", KINDS_WITHOUT_LAVA)
@pytest.mark.parametrize("by", ["batch", "populations"])
def test_kinds_of_the_chip_alone_are_those_of_one_process(ranks: Ranks, networks: ModuleType, kind: str, by: str) -> None:
    rng = np.random.default_rng(7)
    params = {"lif_refractory": networks.parameters(rng, "lif_refractory", 6)}.get(kind) or {
        "du": 300, "dv": 100, "vth": 20, "bias_mant": 9, "bias_exp": 1
    }  # fmt: skip
    known = set(KINDS[kind].parameters)
    params = {key: value for key, value in params.items() if key in known}
    weight = 2 * rng.integers(-45, 60, (6, 6))
    graph = SpikingGraph(
        (Population("x", "input", 6), Population("a", kind, 6, params), Population("b", kind, 6, params)),
        (
            Projection("in", "x", "a", "a_in", weight, num_message_bits=8),
            Projection("on", "a", "b", "a_in", weight.T.copy(), num_message_bits=0),
            Projection("back", "b", "a", "a_in", weight // 4 * 2, num_message_bits=0),
        ),
        ("b",),
    )
    inputs = {"x": rng.integers(-20, 60, (3, 25, 6)).astype(np.int32)}
    split = {"x": 0, "a": 0, "b": 1} if by == "populations" else None
    options: dict[str, Any] = {"mode": "chip", "record": RECORD_ALL}
    assert_same(simulate(graph, inputs, **options), ranks.simulate(graph, inputs, by=by, split=split, **options))


@pytest.mark.parametrize("by", ["batch", "populations"])
def test_networks_of_xylo_are_those_of_one_process(ranks: Ranks, by: str) -> None:
    for seed in range(6):
        graph = xylo_networks.network(seed)
        inputs = xylo_networks.spikes(graph, seed)
        options: dict[str, Any] = {"mode": "xylo", "record": RECORD_ALL}
        split = drawn_split(graph, seed) if by == "populations" else None
        assert_same(simulate(graph, inputs, **options), ranks.simulate(graph, inputs, by=by, split=split, **options))


def test_neurons_that_only_their_biases_drive_need_no_input(ranks: Ranks) -> None:
    lif = {"du": 0, "dv": 200, "vth": 4, "bias_mant": 11, "bias_exp": 3}
    graph = SpikingGraph(
        (Population("a", "lif", 5, lif), Population("b", "lif", 5, lif)),
        (Projection("w", "a", "b", "a_in", np.full((5, 5), 30), num_message_bits=0),),
        ("a", "b"),
    )
    expected = simulate(graph, {}, steps=40, record=RECORD_ALL)
    assert expected.populations["b"].updates_active
    for by in ("batch", "populations"):
        assert_same(expected, ranks.simulate(graph, {}, steps=40, by=by, record=RECORD_ALL))


def chain(weight: int, delay: int = 0) -> SpikingGraph:
    delays = np.full((2, 2), delay)
    return SpikingGraph(
        (Population("x", "input", 2), Population("y", "graded", 2, {"vth": 0}), Population("z", "graded", 2, {"vth": 0})),
        (
            Projection("w", "x", "y", "a_in", np.array([[2 * weight, 0], [0, 2 * weight]]), 6, num_message_bits=32),
            Projection("v", "y", "z", "a_in", np.array([[4, -2], [2, 6]]), 6, num_message_bits=32, kind="delay_dense",
                       delays=delays),
        ),
        ("z",),
    )  # fmt: skip


def test_processes_go_on_by_the_shortest_delay_between_them() -> None:
    for delay in (0, 5):
        graph = chain(3, delay)
        assert lookahead(graph, {"x": 0, "y": 0, "z": 1}) == 1 + delay
        assert crossing(graph, {"x": 0, "y": 0, "z": 1}) == [("y", "s_out")]
        assert lookahead(graph, {"x": 1, "y": 0, "z": 0}) is None  # inputs are known everywhere


def test_a_strict_run_raises_the_error_of_one_process(ranks: Ranks) -> None:
    graph = chain(60)
    inputs = {"x": np.array([[[1, 0]] * 3, [[0, 2**23]] * 3], dtype=np.int32)}
    with pytest.raises(FixedPointOverflow) as expected:
        simulate(graph, inputs, strict=True, mode="chip")
    for by in ("batch", "populations"):
        with pytest.raises(FixedPointOverflow) as got:
            ranks.simulate(graph, inputs, strict=True, mode="chip", by=by)
        assert str(got.value) == str(expected.value)
    small = {"x": np.ones((2, 3, 2), dtype=np.int32)}
    assert_same(simulate(graph, small, strict=True), ranks.simulate(graph, small, strict=True))


def test_what_one_process_refuses_is_refused_before_anything_runs(ranks: Ranks) -> None:
    graph, good = chain(3), {"x": np.ones((2, 3, 2), dtype=np.int32)}
    for error, call in (
        (InputError, lambda: ranks.simulate(graph, {"x": np.ones((2, 3, 5), dtype=np.int32)})),
        (ValueError, lambda: ranks.simulate(graph, good, mode="moon")),
        (GraphError, lambda: ranks.simulate(graph, good, record=("spices",))),
        (GraphError, lambda: ranks.simulate(graph, good, placement={"y": np.zeros(7, dtype=int)})),
    ):
        with pytest.raises(error):
            call()
    assert_same(simulate(graph, good), ranks.simulate(graph, good))  # and the processes are still there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "weights"}, "by is 'weights'; there is: batch, populations"),
        ({"by": "batch", "split": {}}, "split is given, which only by='populations' takes"),
        ({"split": {"x": 0, "y": 0}}, "the split says nothing of population 'z'"),
        ({"split": {"x": 0, "y": 0, "z": 2}}, "population 'z' is given to process 2; there are 0 to 1"),
        ({"split": {"x": 0, "y": 0, "z": 1, "q": 0}}, "the split names 'q', which is no population"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(ranks: Ranks, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        ranks.simulate(chain(3), {"x": np.ones((1, 2, 2), dtype=np.int32)}, **options)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 5))
def test_a_partition_gives_every_process_work(networks: ModuleType, seed: int, parts: int) -> None:
    graph = networks.network(seed)
    computing = [population for population in graph.populations if population.kind != "input"]
    if parts > len(computing):
        with pytest.raises(SplitError, match=rf"{parts} parts of a graph of {len(computing)} populations that compute"):
            partition(graph, parts)
        return
    found = partition(graph, parts)
    assert set(found) == {population.name for population in graph.populations}
    work = [sum(work_of(graph, p) for p in computing if found[p.name] == part) for part in range(parts)]
    assert min(work) > 0


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_a_number_of_processes_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(SplitError, match="processes is"):
        Ranks(count)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_process_that_is_killed_is_named_and_the_others_are_ended(when: str) -> None:
    found = Ranks(2, limit_s=60)
    pids = [worker.pid for worker in found._workers]
    timer = threading.Timer(0.0 if when == "before" else 0.7, os.kill, (pids[1], signal.SIGKILL))
    timer.start()
    if when == "before":
        found._workers[1].join(10)
    steps = 3 if when == "before" else 200_000  # an exchange at each
    with pytest.raises(RankError, match=r"process 1 of 2 ended with exit code -9; all processes .* are ended"):
        found.simulate(chain(3), {"x": np.ones((2, steps, 2), dtype=np.int32)})
    with pytest.raises(RankError, match="the processes are ended; make a new Ranks"):
        found.simulate(chain(3), {"x": np.ones((2, 3, 2), dtype=np.int32)})
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
