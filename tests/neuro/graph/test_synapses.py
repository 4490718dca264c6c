"""Projections of every kind against sums in Python's integers; exact products; counts per core; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuro.graph import Convolution, GraphError, Population, Projection, SpikingGraph, identical, load_graph, save_graph
from neuro.simulators import exact, fixed_point
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaWorker


def into(projection: Projection, kind: str = "graded", params: dict[str, Any] | None = None) -> SpikingGraph:
    targets, sources = projection.ends
    populations = (
        Population("x", "input", sources),
        Population("y", kind, targets, {"vth": 0} if params is None else params),
    )
    return SpikingGraph(populations, (projection,), ("y",))


def convolved(x_WHC: np.ndarray, weight: np.ndarray, geometry: Convolution) -> np.ndarray:
    """A true convolution, written as its definition: the kernel flipped, one output at a time."""
    (sw, sh), (pw, ph), (dw, dh) = geometry.stride, geometry.padding, geometry.dilation
    outs = geometry.output_shape(weight.shape)
    per_in, per_out = weight.shape[3], outs[2] // geometry.groups
    found = np.zeros(outs, dtype=np.int64)
    for i, j, o in np.ndindex(*outs):
        for a, b, c in np.ndindex(*weight.shape[1:]):
            w, h = i * sw - pw + (weight.shape[1] - 1 - a) * dw, j * sh - ph + (weight.shape[2] - 1 - b) * dh
            if 0 <= w < x_WHC.shape[0] and 0 <= h < x_WHC.shape[1]:
                found[i, j, o] += int(weight[o, a, b, c]) * int(x_WHC[w, h, (o // per_out) * per_in + c])
    return found


GEOMETRIES = [
    Convolution((5, 4, 2)),
    Convolution((6, 5, 4), stride=(2, 1), padding=(1, 2), groups=2),
    Convolution((7, 6, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 2), groups=1),
    Convolution((4, 4, 6), stride=(3, 2), padding=(1, 1), dilation=(1, 2), groups=3),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=range(len(GEOMETRIES)))
@pytest.mark.parametrize("largest", [1, 100, 2**22])
def test_convolutions_equal_their_definition(geometry: Convolution, largest: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-256, 256, (6, 3, 2, geometry.input_shape[2] // geometry.groups))
    bits = 0 if largest == 1 else 24
    p = Projection("c", "x", "y", "a_in", weight, num_message_bits=bits, kind="conv", conv=geometry)
    graph = into(p)
    assert identical(load_graph(save_graph(graph, tmp_path / "c.graph.npz")), graph)
    x = rng.integers(0 if bits == 0 else -largest, largest + 1, (2, 3, p.ends[1]))
    found = simulate(graph, {"x": x}, placement={"y": np.arange(p.ends[0]) % 2})
    for sample, step in np.ndindex(2, 2):
        sums = convolved(x[sample, step].reshape(geometry.input_shape), weight, geometry).reshape(-1)
        expected = np.where(abs(sums) < 2**31, (sums + 2**23) % 2**24 - 2**23, 0)
        assert found.spikes["y"][sample, step + 1].tolist() == expected.tolist()
    targets, sources = p.synapse_ends()
    assert p.fan_out().tolist() == np.bincount(sources, minlength=p.ends[1]).tolist()
    events = np.count_nonzero(x, axis=(0, 1))
    counts = found.projections["c"]
    assert counts.synops == int(events[sources].sum()) == int(events @ p.fan_out())
    assert counts.weight_reads == events.sum() * 3 * 2 * 6 // geometry.groups
    assert [found.cores[core].synops for core in (0, 1)] == [int(events[sources[targets % 2 == c]].sum()) for c in (0, 1)]


@pytest.mark.parametrize("exponent", [-2, 0, 3])
@pytest.mark.parametrize("chunk", [10, 2**22])
def test_delays_arrive_when_they_should(exponent: int, chunk: int, monkeypatch: Any) -> None:
    rng = np.random.default_rng(1)
    weight, delays = 2 * rng.integers(-100, 100, (4, 5)), rng.choice([0, 1, 2, 7, 63], (4, 5))
    p = Projection("d", "x", "y", "a_in", weight, exponent, num_message_bits=8, kind="delay_dense", delays=delays)
    x = rng.integers(-100, 100, (2, 80, 5))
    monkeypatch.setattr(fixed_point, "CHUNK_VALUES", chunk)
    found = simulate(into(p), {"x": x}).spikes["y"]
    for sample, target, t in np.ndindex(2, 4, 80):
        total = 0
        for delay in set(delays[target].tolist()):  # shifted delay by delay, as Lava does
            sent = t - 1 - delay
            part = sum(
                int(w) * int(m)
                for w, m, d in zip(weight[target], x[sample, sent], delays[target], strict=True)
                if d == delay
            )
            total += 0 if sent < 0 else part << exponent if exponent > 0 else part >> -exponent
        assert int(found[sample, t, target]) == total


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_the_exponent_acts_on_the_sum_in_lava_and_on_each_synapse_on_the_chip(mode: str) -> None:
    p = Projection("w", "x", "y", "a_in", np.array([[6, -6, 2]]), -2, num_message_bits=8)
    found = simulate(into(p), {"x": np.array([[[1, 1, 3], [0, 0, 0]]])}, mode=mode)
    assert int(found.spikes["y"][0, 1, 0]) == ((6 - 6 + 6) >> 2 if mode == "lava" else 1 - 2 + 0)
    assert any("acts on each synapse, and 3 of 3 weights lost bits" in note for note in found.notes) == (mode == "chip")


def test_every_arithmetic_of_a_product_is_exact(monkeypatch: Any) -> None:
    rng, device = np.random.default_rng(2), torch.device("cpu")
    seen = set()
    kinds = ((1, "even"), (127, "even"), (2**14 - 1, "even"), (1, "odd"), (30_000, "even"), (2**30, "odd"))
    for bound, sign in (*kinds, (2**31 - 1, "wide")):
        weight = rng.integers(-128, 128, (96, 512)) * {"even": 2, "odd": 1, "wide": 2**12}[sign]
        x = rng.integers(0 if bound == 1 else -bound, bound + 1, (40, 512))
        expected = x.astype(object) @ weight.T.astype(object)
        for exact8 in (True, False):
            monkeypatch.setattr(exact, "int8_products_are_exact", lambda device_type, answer=exact8: answer)
            matrix = exact.Matrix(weight, device)
            seen.add(matrix.arithmetic(40, bound))
            total, shift = matrix.product(torch.from_numpy(x), bound)
            assert (total.to(torch.int64) << shift).tolist() == expected.tolist()
    assert seen == {"int8", "split int8", "float32", "float64", "split float64"}
    few = torch.from_numpy(x * (rng.random(x.shape) < 0.01)).clamp(-90, 90)
    total, shift = matrix.product(few, 90, share=0.01)
    assert (total.to(torch.int64) << shift).tolist() == (few.numpy() @ weight.T).tolist()


@pytest.mark.parametrize("bound", [1, 127, 2**20, 2**31 - 1])
def test_neuron_to_neuron_needs_no_matrix(bound: int) -> None:
    rng = np.random.default_rng(3)
    diagonal = 2 * rng.integers(-128, 128, 50)
    x = rng.integers(-bound, bound + 1, (7, 50))
    total, shift = exact.Matrix(np.diag(diagonal), torch.device("cpu")).product(torch.from_numpy(x), bound)
    assert (total.to(torch.int64) << shift).tolist() == (x.astype(object) * diagonal.astype(object)).tolist()


def test_few_events_and_many_give_the_same_sums(networks: Any, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    weight = 2 * rng.integers(-100, 100, (80, 80))
    lif = {"du": 4095, "dv": 400, "vth": 900}
    graph = into(Projection("w", "x", "y", "a_in", weight), "lif", lif)
    inputs = {"x": rng.random((3, 50, 80)) < 0.005}
    sparse = simulate(graph, inputs, record=RECORD_ALL)
    monkeypatch.setattr(exact, "EVENT_SHARE_INT8", 0.0)
    monkeypatch.setattr(exact, "EVENT_SHARE_FLOAT", 0.0)
    assert compare(sparse, simulate(graph, inputs, record=RECORD_ALL)).equal


def test_a_sparse_projection_counts_its_own_synapses_and_cores_add_up() -> None:
    weight = np.array([[2, 0, 4], [0, 0, 6]])
    graph = into(Projection("w", "x", "y", "a_in", weight, num_message_bits=8, kind="sparse"))
    x = np.array([[[1, 1, 1], [0, 5, 0], [3, 0, 0], [0, 0, 0]]])
    found = simulate(graph, {"x": x}, placement={"x": 7, "y": np.array([0, 1])})
    assert (found.projections["w"].events, found.projections["w"].synops, found.projections["w"].weight_reads) == (5, 4, 4)
    assert {core: c.synops for core, c in found.cores.items()} == {0: 3, 1: 1, 7: 0}
    assert {core: c.spikes for core, c in found.cores.items()} == {0: 2, 1: 1, 7: 5}
    assert {core: c.neuron_updates for core, c in found.cores.items()} == {0: 4, 1: 4, 7: 0}
    for placement, text in (
        ({"z": 0}, "no population 'z'"),
        ({"y": np.zeros(3, int)}, "2 neurons"),
        ({"y": -1}, r"in 0\.\."),
    ):
        with pytest.raises(GraphError, match=text):
            simulate(graph, {"x": x}, placement=placement)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "learning_dense"}, "unknown kind 'learning_dense' .on-chip learning is not bit-exact even in Lava"),
        ({"kind": "delay_dense"}, "delays belong to delay_dense"),
        ({"kind": "delay_dense", "delays": np.full((2, 2), 64)}, r"delays\[0, 0\] is 64; a synapse holds 0\.\.63"),
        ({"kind": "delay_dense", "delays": np.zeros((2, 3), int)}, r"delays have shape \(2, 3\), weights \(2, 2\)"),
        ({"kind": "conv"}, r"weight has shape \(2, 2\); \(out, width, height, in / groups\)"),
        ({"source_port": "s2_out"}, "'x' .input. has no output port 's2_out'; it has: s_out"),
    ],
)
def test_what_no_projection_can_be_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        into(
            Projection(
                **({"name": "w", "source": "x", "target": "y", "port": "a_in", "weight": np.zeros((2, 2), int)} | changes)
            )
        )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Population("y", "stdp", 1), "unknown kind 'stdp' .on-chip learning is not bit-exact even in Lava"),
        (
            lambda: Population("y", "ternary_lif", 1, {"du": 0, "dv": 0, "vth_lo": 3, "vth_hi": 1}),
            "vth_lo is 3, above vth_hi",
        ),
        (
            lambda: Population("y", "delta", 1, {"vth": 2**20, "spike_exp": 4}),
            r"is 16777216; its register holds up to 8388607",
        ),
        (lambda: Convolution((3, 3, 2), stride=(0, 1)), r"stride is \(0, 1\); the lowest is 1"),
        (lambda: Convolution((3, 3, 3), groups=2).output_shape((2, 1, 1, 1)), "groups divide the channels"),
        (lambda: Convolution((3, 3, 1)).output_shape((2, 5, 1, 1)), "the kernel reaches over 5 positions of axis 0"),
    ],
)
def test_what_no_node_can_be_is_refused(make: Any, text: str) -> None:
    with pytest.raises(GraphError, match=text):
        make()


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_of_every_kind_do_not_depend_on_batch_or_chunk(seed: int, networks: Any, monkeypatch: Any) -> None:
    graph = networks.network(seed)
    inputs = networks.messages(graph, seed, 3, 30)
    for mode in ("lava", "chip"):
        whole = simulate(graph, inputs, mode=mode, record=RECORD_ALL)
        monkeypatch.setattr(fixed_point, "CHUNK_VALUES", 300)
        parts = simulate(graph, inputs, mode=mode, record=RECORD_ALL)
        monkeypatch.undo()
        assert compare(whole, parts).equal
        assert (whole.projections, whole.populations) == (parts.projections, parts.populations)
        single = simulate(graph, {"x": inputs["x"][1:2]}, mode=mode, record=RECORD_ALL)
        for key, value in single.variables().items():
            assert torch.equal(value[0], whole.variables()[key][1])


@pytest.mark.lava
@pytest.mark.parametrize("seed", [0, 2])
def test_random_networks_of_every_kind_equal_lava(seed: int, networks: Any, lava: LavaWorker) -> None:
    graph = networks.network(seed)
    inputs = networks.messages(graph, seed, 1, 30)
    result = compare(lava.run(graph, inputs, record=RECORD_ALL), simulate(graph, inputs, record=RECORD_ALL))
    assert result.equal, str(result)
    assert result.skipped == ()
