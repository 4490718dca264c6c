"""NIR out and back: the same integers, the same spikes by Euler's rule on NIR's own definitions, refusals by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from neuro.exchange.nir import NirFileError, NotInNir, load_nir, read_nir, to_nir, write_nir
from neuro.exchange.nir.describing import describe
from neuro.exchange.nir.reading import carried_graph
from neuro.exchange.nir.synapse_nodes import grids, ours_at
from neuro.exchange.nir.writing import _WRITTEN, REFUSED, refusals
from neuro.graph import Convolution, Population, Projection, SpikingGraph, identical
from neuro.graph.kinds import KINDS
from neuro.simulators import snntorch_backend
from neuro.simulators.fixed_point import simulate
from tests.neuro.exchange import nir_networks as networks_
from tests.neuro.exchange import nir_reference as reference

h5py = pytest.importorskip("h5py")
nir = pytest.importorskip("nir")
pytest.importorskip("snntorch")
DT_S = 1e-4


def record(made) -> dict:
    return made.metadata["spikegate"]


def in_nir_order(graph: SpikingGraph, name: str, value_TN: np.ndarray) -> np.ndarray:
    grid = grids(graph).get(name)
    return value_TN if grid is None else value_TN[:, ours_at(grid)]


def both(graph: SpikingGraph, x_TN: np.ndarray, timing: str = "portable") -> tuple[np.ndarray, np.ndarray, bool]:
    """Messages of the output in NIR, by the reference, and on the chip, the latter without the steps it is behind."""
    made = to_nir(graph, timing=timing)
    (name,) = graph.outputs
    ahead = json.loads(record(made)["ahead"])[name]
    (theirs,) = reference.run(made, in_nir_order(graph, "x", x_TN)).values()
    padded = np.concatenate([x_TN, np.zeros((ahead, x_TN.shape[1]), dtype=x_TN.dtype)])
    activity = simulate(graph, {"x": padded[None]}, mode="chip")
    left = sum(c.saturations_v + c.wraps_u + c.wraps_sum + c.wide_v for c in activity.populations.values())
    return theirs, in_nir_order(graph, name, activity.spikes[name][0].numpy()[ahead:]), left == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=st.integers(0, 2**31), timing=st.sampled_from(["portable", "literal"]))
def test_nir_and_the_chip_send_the_same(seed, timing):
    graph = networks_.network(seed)
    try:
        theirs, ours, held = both(graph, networks_.messages(graph, seed), timing)
    except NotInNir as error:  # biases while the pipeline fills, restarts; each has a test of its own below
        assert "pipeline fills" in str(error) or "restart" in str(error) or "bias" in str(error)  # noqa: PT017
        assume(False)
        return
    assume(held)
    np.testing.assert_array_equal(theirs, ours)


def test_the_random_networks_are_not_silent():
    seeds = range(40)
    graphs = [networks_.network(seed, loops=seed % 2 == 0, portable_only=seed % 4 == 1) for seed in seeds]
    sent = [both(g, networks_.messages(g, s))[1].any() for s, g in zip(seeds, graphs, strict=True) if not early(g)]
    assert sum(sent) > len(sent) / 3
    kinds = {type(node).__name__ for g in graphs if not early(g) for node in to_nir(g).nodes.values()}
    assert kinds >= {"LIF", "IF", "CubaLIF", "NIRGraph", "Linear", "Affine", "Conv2d", "Flatten", "Delay"}


def early(graph: SpikingGraph) -> bool:
    try:
        to_nir(graph)
    except NotInNir:
        return True
    return False


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_file_gives_back_the_same_integers(seed, tmp_path_factory):
    graph = networks_.network(seed)
    assume(not early(graph))
    graph = SpikingGraph(graph.populations, graph.projections, graph.outputs, {"scale": 0.5, "from": ["a", 1]})
    path = write_nir(graph, tmp_path_factory.mktemp("nir") / "graph.nir")
    assert identical(read_nir(path), graph)


def test_any_lif_graph_equals_the_float_backend(networks):
    compared = spikes = 0
    for seed in range(120):
        graph = networks.network(seed, ["lif"])
        if any(p.kind == "delay_dense" for p in graph.projections):
            continue
        try:
            made = to_nir(graph, timing="literal")
        except NotInNir:
            continue
        x = networks.messages(graph, seed, 1, 25)["x"]
        (theirs,) = reference.run(made, in_nir_order(graph, "x", x[0])).values()
        (name,) = graph.outputs
        ours = snntorch_backend.run(graph, {"x": x}).spikes[name][0].numpy()
        np.testing.assert_array_equal(theirs, in_nir_order(graph, name, ours), err_msg=f"seed {seed}")
        compared, spikes = compared + 1, spikes + int(ours.sum())
    assert compared >= 8
    assert spikes > 100


# Single nodes, by the numbers


def wired(kind: str = "lif", weight=((4, -2),), size: int = 1, **more) -> SpikingGraph:
    extra = {key: more.pop(key) for key in ("delays", "num_message_bits", "weight_exp") if key in more}
    way = "delay_dense" if "delays" in extra else "dense"
    array = np.array(weight)
    return SpikingGraph(
        [Population("x", "input", array.shape[1]), Population("n", kind, size, more)],
        [Projection("w", "x", "n", "a_in", array, kind=way, **extra)],
        ["n"],
    )


def test_the_canonical_form_of_each_decay():
    lif = to_nir(wired(du=4095, dv=1024, vth=10, weight_exp=3)).nodes
    assert type(lif["n"]) is nir.LIF
    np.testing.assert_allclose(lif["n"].tau, 4 * DT_S, rtol=0)
    assert (lif["n"].r, lif["n"].v_leak, lif["n"].v_reset, lif["n"].v_threshold) == (1, 0, 0, 10)
    np.testing.assert_array_equal(lif["w"].weight, [[4 * 8 * 4, -2 * 8 * 4]])

    cuba = to_nir(wired(du=1023, dv=2048, vth=10)).nodes
    assert type(cuba["n"]) is nir.CubaLIF
    assert (cuba["n"].r, cuba["n"].w_in, cuba["n"].tau_syn / DT_S, cuba["n"].tau_mem / DT_S) == (2, 4, 4, 2)
    np.testing.assert_array_equal(cuba["w"].weight, [[4, -2]])

    fire = to_nir(wired(du=4095, dv=0, vth=10)).nodes
    assert type(fire["n"]) is nir.IF
    assert (fire["n"].r, fire["n"].v_threshold) == (1, 10)

    (filtered,) = [n for n in to_nir(wired(du=1023, dv=0, vth=10)).nodes.values() if type(n) is nir.NIRGraph]
    assert [type(node).__name__ for node in filtered.nodes.values()] == ["Input", "LI", "IF", "Output"]


def test_a_graded_population_is_its_weights():
    made = to_nir(wired("graded", vth=0, num_message_bits=8, weight_exp=-2))
    assert [type(node).__name__ for node in made.nodes.values()] == ["Input", "Linear", "Output"]
    np.testing.assert_array_equal(made.nodes["w"].weight, [[1, -0.5]])
    assert record(made)["notes"] == "w: the chip rounds its sums down after weight_exp -2"


def test_delays_are_split_by_length():
    delays = np.array([[0, 2]])
    made = to_nir(wired(du=4095, dv=2048, vth=1, delays=delays))
    assert {name: type(node).__name__ for name, node in made.nodes.items()} == {
        "x": "Input",
        "n": "LIF",
        "w_0": "Linear",
        "w_2": "Linear",
        "w_2_delay": "Delay",
        "output": "Output",
    }
    np.testing.assert_array_equal(made.nodes["w_2_delay"].delay, [2 * DT_S])


def test_a_bias_rides_on_weights_or_leaks():
    wired_reset = {"du": 4095, "dv": 2048, "vth": 10, "reset_interval": 9, "reset_offset": 2, "bias_mant": 96}
    made = to_nir(wired("lif_reset", **wired_reset))
    assert record(made)["steps"] == 9
    np.testing.assert_array_equal(made.nodes["w"].bias, [96 / 64 * 2])
    leaking = to_nir(wired("lif_reset", **wired_reset | {"du": 2047})).nodes["n"]
    np.testing.assert_array_equal(leaking.v_leak, [96 / 64 * 2])


def test_ways_of_unequal_length_meet_at_a_delay():
    lif = {"du": 4095, "dv": 2048, "vth": 3}
    graph = SpikingGraph(
        [Population("x", "input", 1), Population("a", "lif", 1, lif), Population("b", "lif", 1, lif)],
        [
            Projection("xa", "x", "a", "a_in", np.array([[8]])),
            Projection("ab", "a", "b", "a_in", np.array([[8]])),
            Projection("xb", "x", "b", "a_in", np.array([[4]])),
        ],
        ["b"],
    )
    made = to_nir(graph)
    assert json.loads(record(made)["ahead"]) == {"x": 0, "a": 1, "b": 1}
    assert "ab_delay" in made.nodes
    assert "xb_delay" not in made.nodes
    assert sum(name.endswith("_delay") for name in to_nir(graph, timing="literal").nodes) == 3


def test_names_that_readers_could_not_use_are_changed():
    graph = SpikingGraph(
        [Population("forward", "input", 1), Population("1.a", "graded", 1, {"vth": 0})],
        [Projection("output", "forward", "1.a", "a_in", np.array([[2]]), num_message_bits=8)],
        ["1.a"],
    )
    made = to_nir(graph)
    assert all(name.isidentifier() and not hasattr(torch.nn.ModuleDict(), name) for name in made.nodes)
    assert len(made.nodes) == 3


def test_a_convolution_keeps_its_grid_only_where_nir_can(networks):
    conv = Convolution((4, 3, 2))
    for kernel, kept in (((2, 2), True), ((1, 2), False)):
        weight = np.arange(3 * kernel[0] * kernel[1] * 2).reshape(3, *kernel, 2)
        out = int(np.prod(conv.output_shape(weight.shape)))
        graph = SpikingGraph(
            [Population("x", "input", 24), Population("n", "graded", out, {"vth": 0})],
            [Projection("w", "x", "n", "a_in", weight, kind="conv", conv=conv, num_message_bits=8)],
            ["n"],
        )
        assert (type(to_nir(graph).nodes["w"]).__name__ == "Conv2d") is kept
        x = np.random.default_rng(0).integers(-9, 9, (3, 24)).astype(np.int32)
        theirs, _, _ = both(graph, x)
        ours = simulate(graph, {"x": np.concatenate([x, x[:1]])[None]}).spikes["n"][0].numpy()[1:]
        np.testing.assert_array_equal(theirs, in_nir_order(graph, "n", ours))


# What NIR cannot say


def test_every_kind_is_written_or_refused_with_a_reason():
    assert set(KINDS) == set(REFUSED) | set(_WRITTEN)


LIF = {"du": 4095, "dv": 2048, "vth": 3}
UNSAYABLE = {
    "ternary_lif": ({"du": 0, "dv": 0, "vth_hi": 1, "vth_lo": -1}, "no sign"),
    "lif_refractory": ({**LIF, "refractory": 2}, "refractory"),
    "lif_soft": (LIF, "not by subtraction"),
    "lif_general": (LIF, "resets to v_reset at once"),
    "sigma": ({}, "sigma-delta"),
    "delta": ({"vth": 1}, "sigma-delta"),
    "sigma_delta": ({"vth": 1}, "sigma-delta"),
    "graded_relu": ({"vth": 0}, "no ReLU"),
    "graded": ({"vth": 1}, "threshold"),
}


@pytest.mark.parametrize("kind", UNSAYABLE)
def test_a_kind_without_a_node_is_refused_by_name(kind, tmp_path):
    params, reason = UNSAYABLE[kind]
    graph = wired(kind, num_message_bits=8, **params)
    with pytest.raises(NotInNir, match=rf"population 'n' \({kind}\): .*{reason}") as caught:
        write_nir(graph, tmp_path / "graph.nir")
    assert any(word in str(caught.value) for word in ("Use", "Keep", "keep"))
    assert list(tmp_path.iterdir()) == []


def test_products_and_norms_are_refused_by_name(mlp_graph):
    (first, *_) = refusals(mlp_graph(0, squared=True))
    assert first.startswith("population 'hidden' (graded_relu)")
    assert any("'squared' (product)" in problem for problem in refusals(mlp_graph(0, squared=True)))


def test_a_refractory_time_of_one_step_is_none():
    assert type(to_nir(wired("lif_refractory", refractory=1, **LIF)).nodes["n"]) is nir.LIF


def test_a_bias_that_acts_before_the_input_is_refused():
    with pytest.raises(NotInNir, match=r"'n' \(lif\): its bias acts while the pipeline fills.*steps=T.*literal"):
        to_nir(wired(bias_mant=5, **LIF))
    to_nir(wired(bias_mant=5, **LIF), timing="literal")
    with pytest.raises(NotInNir, match="bias needs a matrix"):
        to_nir(wired(bias_mant=5, du=4095, dv=0, vth=2), timing="literal")


def test_a_restart_within_a_sample_is_refused():
    with pytest.raises(NotInNir, match=r"'n' \(lif_reset\) restarts at steps 3 mod 8.*reset_offset 2"):
        to_nir(wired("lif_reset", reset_interval=8, reset_offset=3, **LIF))


# Files


def test_a_changed_node_is_noticed(tmp_path):
    path = write_nir(wired(**LIF), tmp_path / "graph.nir")
    with h5py.File(path, "r+") as file:
        file["node/nodes/w/weight"][0, 0] += 1
    with pytest.raises(NirFileError, match="weight of node 'w' is not what the integers beside it say"):
        read_nir(path)
    assert describe(load_nir(path), DT_S).description.synapses[0].weight.tolist() == [[4.5, -2]]


def test_a_changed_integer_is_noticed(tmp_path):
    path = write_nir(wired(**LIF), tmp_path / "graph.nir")
    with h5py.File(path, "r+") as file:
        file["node/metadata/spikegate/graph/projection.0.weight"][0, 0] = 6
    with pytest.raises(NirFileError, match="weight of node 'w'"):
        read_nir(path)
    with h5py.File(path, "r+") as file:
        file["node/metadata/spikegate/graph/projection.0.weight"][0, 0] = 999
    with pytest.raises(NirFileError, match="999"):
        read_nir(path)


def test_files_hold_numbers_and_text_alone(tmp_path):
    path = write_nir(networks_.network(3), tmp_path / "graph.nir")
    types = set()
    with h5py.File(path) as file:
        file.visititems(lambda _, item: types.add(item.dtype.kind) if isinstance(item, h5py.Dataset) else None)
        assert file["node/metadata/spikegate/graph/projection.0.weight"].dtype == np.int16
        texts = [item for item in _datasets(file) if item.dtype.kind == "O"]
        assert all(h5py.check_string_dtype(item.dtype) for item in texts)
    assert types <= set("fiuO")


def _datasets(group):
    for item in group.values():
        yield from _datasets(item) if isinstance(item, h5py.Group) else [item]


def test_what_is_no_file_of_ours_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_nir(tmp_path / "none.nir")
    (tmp_path / "text.nir").write_text("no HDF5")
    with pytest.raises(NirFileError, match=r"text\.nir: not a readable NIR file"):
        read_nir(tmp_path / "text.nir")
    path = write_nir(wired(**LIF), tmp_path / "graph.nir")
    whole = path.read_bytes()
    (tmp_path / "cut.nir").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NirFileError, match=r"cut\.nir: not a readable NIR file"):
        read_nir(tmp_path / "cut.nir")
    with h5py.File(path, "r+") as file:
        del file["node/metadata"]
    with pytest.raises(NirFileError, match="holds no integers of ours"):
        read_nir(path)
    with pytest.raises(NirFileError, match=r"named NAME\.nir"):
        write_nir(wired(**LIF), tmp_path / "graph.h5")
    made = to_nir(wired(**LIF))
    record(made)["form"] = 99
    with pytest.raises(NirFileError, match="has form 99"):
        carried_graph(made)
