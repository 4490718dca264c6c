"""The integer simulator against a slow reference in Python's own integers, written from the equations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuro.graph import GraphError, Population, Projection, SpikingGraph
from neuro.simulators import exact, fixed_point
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import FixedPointOverflow, InputError, PipelineError, latency, run_pipelined, simulate

Trace = dict[tuple[str, str], list[list[list[int]]]]


def wrap32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def toward_zero(value: int, bits: int) -> int:
    return (abs(value) >> bits) * (1 if value >= 0 else -1)


def deliver(projection: Projection, message: list[int]) -> list[int]:
    if projection.num_message_bits == 0:
        message = [int(m != 0) for m in message]
    sums = []
    for row in projection.weight.tolist():
        total = wrap32(sum(w * m for w, m in zip(row, message, strict=True)))
        e = projection.weight_exp
        sums.append(wrap32(total << e) if e > 0 else total >> -e)
    return sums


def reference(graph: SpikingGraph, inputs: dict[str, np.ndarray]) -> Trace:
    """Every state at every step, one neuron at a time."""
    batch, steps = next(iter(inputs.values())).shape[:2]
    trace: Trace = {}
    for sample in range(batch):
        sent = {p.name: [0] * p.size for p in graph.populations}
        u = {p.name: [0] * p.size for p in graph.populations}
        v = {p.name: [0] * p.size for p in graph.populations}
        for step in range(steps):
            now: dict[str, list[int]] = {}
            seen: dict[tuple[str, str], list[int]] = {}
            for p in graph.populations:
                if p.kind == "input":
                    now[p.name] = [int(x) for x in inputs[p.name][sample, step]]
                    continue
                arrived = {}
                for port in ("a_in1", "a_in2") if p.kind == "product" else ("a_in",):
                    total = [0] * p.size
                    for w in graph.incoming(p.name, port):
                        total = [wrap32(t + d) for t, d in zip(total, deliver(w, sent[w.source]), strict=True)]
                    arrived[port] = seen[p.name, port] = total
                now[p.name] = []
                for i in range(p.size):
                    par = {k: int(x) if np.ndim(x) == 0 else int(x[i]) for k, x in p.params.items()}  # type: ignore[arg-type,index]
                    if p.kind == "lif":
                        current = toward_zero(u[p.name][i] * (4096 - (par["du"] + 1)), 12)
                        current = wrap32(current + (arrived["a_in"][i] << 6))
                        current += -(2**24) if current > 2**23 else 2**24 if current <= -(2**23) else 0
                        voltage = toward_zero(v[p.name][i] * (4096 - par["dv"]), 12)
                        voltage += current + (par["bias_mant"] << par["bias_exp"])
                        voltage = max(-(2**23 - 1), min(2**23 - 1, voltage))
                        fires = voltage > par["vth"] << 6
                        u[p.name][i], v[p.name][i] = current, 0 if fires else voltage
                        now[p.name].append(int(fires))
                        continue
                    if p.kind == "product":
                        a = wrap32(arrived["a_in1"][i] * arrived["a_in2"][i]) >> par["exp"]
                    else:
                        a = arrived["a_in"][i]
                    size = a if p.kind == "graded_relu" else wrap32(abs(a))
                    now[p.name].append(a if size > par["vth"] else 0)
                if p.kind == "lif":
                    seen[p.name, "u"], seen[p.name, "v"] = list(u[p.name]), list(v[p.name])
            sent = now
            seen.update({(name, "spikes"): values for name, values in now.items()})
            for key, values in seen.items():
                trace.setdefault(key, [[] for _ in range(batch)])[sample].append(values)
    return trace


def assert_equal(graph: SpikingGraph, inputs: dict[str, np.ndarray]) -> fixed_point.Activity:
    activity = simulate(graph, inputs, record=RECORD_ALL)
    expected = reference(graph, inputs)
    got = activity.variables()
    assert set(got) == set(expected)
    for key, values in expected.items():
        assert got[key].tolist() == values, key
    return activity


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), steps=st.integers(1, 12))
def test_lif_networks_equal_the_reference(lif_graph: Any, messages: Any, seed: int, batch: int, steps: int) -> None:
    graph = lif_graph(seed)
    assert_equal(graph, messages(graph, seed + 1, batch, steps))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), squared=st.booleans())
def test_graded_networks_equal_the_reference(mlp_graph: Any, messages: Any, seed: int, squared: bool) -> None:
    graph = mlp_graph(seed, squared, (5, 7, 4))
    assert_equal(graph, messages(graph, seed + 1, 2, 7))


def chain(kind: str, params: dict[str, int], weight: int, exponent: int, bits: int = 32) -> SpikingGraph:
    return SpikingGraph(
        (Population("x", "input", 2), Population("y", kind, 2, params)),
        (Projection("w", "x", "y", "a_in", np.array([[weight, 0], [0, weight]]), exponent, num_message_bits=bits),),
        ("y",),
    )


@settings(max_examples=40, deadline=None)
@given(
    payloads=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    exponent=st.integers(-24, 24),
    kind=st.sampled_from(["graded", "graded_relu", "lif"]),
    du=st.sampled_from([0, 5, 4095]),
)
def test_every_wrap_and_clip_equals_the_reference(payloads: list[int], exponent: int, kind: str, du: int) -> None:
    params = {"du": du, "dv": 7, "vth": 100} if kind == "lif" else {"vth": 3}
    graph = chain(kind, params, -256, exponent)
    assert_equal(graph, {"x": np.array(payloads, dtype=np.int64).reshape(1, 3, 2)})


@settings(max_examples=30, deadline=None)
@given(payloads=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6), shift=st.integers(0, 31))
def test_products_wrap_like_the_reference(payloads: list[int], shift: int) -> None:
    eye = np.eye(2, dtype=np.int32)
    graph = SpikingGraph(
        (Population("x", "input", 2), Population("y", "product", 2, {"vth": 2, "exp": shift})),
        tuple(
            Projection(f"w{i}", "x", "y", f"a_in{i}", eye, 0, sign_mode="excitatory", num_message_bits=32) for i in (1, 2)
        ),
        ("y",),
    )
    assert_equal(graph, {"x": np.array(payloads, dtype=np.int64).reshape(1, 3, 2)})


def test_a_loop_of_graded_neurons_equals_the_reference(messages: Any) -> None:
    rng = np.random.default_rng(3)
    wide = {"sign_mode": "mixed", "num_message_bits": 24}
    graph = SpikingGraph(
        (
            Population("x", "input", 3),
            Population("a", "graded", 4, {"vth": 1}),
            Population("b", "product", 4, {"vth": 0, "exp": 2}),
        ),
        (
            Projection("xa", "x", "a", "a_in", 2 * rng.integers(-90, 90, (4, 3)), -3, **wide),
            Projection("ba", "b", "a", "a_in", 2 * rng.integers(-90, 90, (4, 4)), -6, **wide),
            Projection("ab1", "a", "b", "a_in1", 2 * np.eye(4, dtype=np.int32), -1, **wide),
            Projection("ab2", "a", "b", "a_in2", 2 * rng.integers(-90, 90, (4, 4)), -3, **wide),
        ),
        ("b",),
    )
    inputs = {"x": rng.integers(-100, 100, (2, 9, 3))}
    activity = assert_equal(graph, inputs)
    assert activity.populations["b"].wraps_sum > 0


@pytest.mark.parametrize("seed", [0, 1, 12])
def test_chunks_and_batches_change_no_bit(lif_graph: Any, messages: Any, monkeypatch: Any, seed: int) -> None:
    graph = lif_graph(seed)
    inputs = messages(graph, seed, 4, 30)
    whole = simulate(graph, inputs, record=RECORD_ALL)
    monkeypatch.setattr(fixed_point, "CHUNK_VALUES", 400)
    parts = simulate(graph, inputs, record=RECORD_ALL)
    assert compare(whole, parts).equal
    assert (whole.projections, whole.populations) == (parts.projections, parts.populations)
    single = simulate(graph, {name: value[2:3] for name, value in inputs.items()}, record=RECORD_ALL)
    for key, value in single.variables().items():
        assert torch.equal(value[0], whole.variables()[key][2])


def test_counts_are_those_of_the_messages(lif_graph: Any, messages: Any) -> None:
    graph = lif_graph(7)
    activity = simulate(graph, messages(graph, 7, 2, 25))
    for projection in graph.projections:
        counts = activity.projections[projection.name]
        assert counts.events == np.count_nonzero(activity.spikes[projection.source].numpy()) > 0
        assert counts.synops == counts.events * projection.weight.shape[0]
    for population in graph.populations[1:]:
        counts_p = activity.populations[population.name]
        fired = int(np.count_nonzero(activity.spikes[population.name].numpy()))
        assert (counts_p.updates_active, counts_p.updates_inactive) == (fired, 2 * 25 * population.size - fired)
    assert activity.ran_on == "simulated (ours, lava)"


def test_saturations_wraps_and_wide_payloads_are_counted_and_strict_names_the_first() -> None:
    inputs = {"x": np.array([[[0, 0], [0, 127], [0, 127], [0, 127], [0, 0]]])}
    wraps = chain("lif", {"du": 0, "dv": 0, "vth": 131071}, 254, 3, bits=8)
    assert simulate(wraps, inputs).populations["y"].wraps_u == 3  # 254 x 127 x 8 x 64 = 16,516,096 > 2^23
    with pytest.raises(FixedPointOverflow, match=r"'y', step 2, sample 0, neuron 1: u is 16516096, outside the 24 bits"):
        simulate(wraps, inputs, strict=True)
    clips = chain("lif", {"du": 4095, "dv": 0, "vth": 131071}, -254, 1, bits=8)
    activity = simulate(clips, inputs, record=("v",))
    assert activity.populations["y"].saturations_v == 1
    assert activity.states["y"]["v"][0, :, 1].tolist() == [0, 0, -4129024, -8258048, -(2**23 - 1)]
    with pytest.raises(FixedPointOverflow, match=r"step 4, .*neuron 1: v is -12387072, outside the 24 bits"):
        simulate(clips, inputs, strict=True)


def test_strict_reports_sums_beyond_32_bits_and_payloads_beyond_their_width() -> None:
    inputs = {"x": np.array([[[0, 2**30], [0, 0]]])}
    with pytest.raises(FixedPointOverflow, match=f"a sum is {254 * 2**30}, outside the 32 bits"):
        simulate(chain("graded", {"vth": 0}, 254, 0), inputs, strict=True)
    narrow = SpikingGraph(
        (
            Population("x", "input", 1),
            Population("h", "graded", 1, {"vth": 0}),
            Population("y", "graded", 1, {"vth": 0}),
        ),
        (
            Projection("w1", "x", "h", "a_in", np.array([[2]]), 0, num_message_bits=8),
            Projection("w2", "h", "y", "a_in", np.array([[2]]), 0, num_message_bits=8),
        ),
        ("y",),
    )
    data = {"x": np.array([[[100], [3], [0], [0]]])}
    activity = simulate(narrow, data)
    assert activity.projections["w2"].payload_overflows == 1
    assert activity.projections["w2"].max_abs_payload == 200
    assert activity.spikes["y"].flatten().tolist() == [0, 0, 400, 12]
    with pytest.raises(FixedPointOverflow, match=r"'h', step 1.*message is 200, outside the 8 message bits.*'w2'"):
        simulate(narrow, data, strict=True)


def test_inputs_that_do_not_fit_are_refused() -> None:
    graph = chain("graded", {"vth": 0}, 2, 0, bits=8)
    good = np.zeros((1, 2, 2), dtype=np.int32)
    for inputs, text in [
        ({"x": good.astype(np.float32)}, "messages are integers"),
        ({"x": good[0]}, r"\(batch, steps, 2\) is needed"),
        ({"x": good[:, :0]}, r"\(batch, steps, 2\) is needed"),
        ({}, "'x' is missing"),
        ({"x": good, "z": good}, "'z' is unknown"),
        ({"x": good + 128}, "'x' is 128 at sample 0, step 0, neuron 0; projection 'w' .* carries -128..127"),
    ]:
        with pytest.raises(InputError, match=text):
            simulate(graph, inputs)
    with pytest.raises(ValueError, match="mode 'loihi' does not exist; there is: lava, chip"):
        simulate(graph, {"x": good}, mode="loihi")
    with pytest.raises(GraphError, match="record names 'w'"):
        simulate(graph, {"x": good}, record=("w",))


@pytest.mark.parametrize("squared", [False, True])
def test_a_pipeline_returns_tokens_aligned(mlp_graph: Any, messages: Any, squared: bool, monkeypatch: Any) -> None:
    graph = mlp_graph(5, squared)
    inputs = messages(graph, 1, 2, 40)
    delay = latency(graph, "y")
    assert delay == (3 if squared else 2)
    padded = {"x": np.pad(inputs["x"], ((0, 0), (0, delay), (0, 0)))}
    direct = simulate(graph, padded)
    monkeypatch.setattr(fixed_point, "CHUNK_VALUES", 500)
    aligned = run_pipelined(graph, inputs, record=("spikes",))
    for name in ("x", "hidden", "y"):
        shift = latency(graph, name)
        assert torch.equal(aligned.spikes[name], direct.spikes[name][:, shift : shift + 40])
    updates = aligned.populations["y"]
    assert updates.updates_active + updates.updates_inactive == 2 * 40 * 9
    assert aligned.projections["fc2"].events == direct.projections["fc2"].events


def test_a_pipeline_with_memory_is_aligned_too(lif_graph: Any, messages: Any) -> None:
    graph = lif_graph(1)
    inputs = messages(graph, 1, 2, 20)
    depth = {name: latency(graph, name) for name in ("input", "layer1", graph.outputs[0])}
    longest = depth[graph.outputs[0]]
    direct = simulate(graph, {"input": np.pad(inputs["input"], ((0, 0), (0, longest), (0, 0)))}, record=RECORD_ALL)
    aligned = run_pipelined(graph, inputs, record=RECORD_ALL)
    for (name, variable), value in aligned.variables().items():
        if name in depth:
            assert torch.equal(value, direct.variables()[name, variable][:, depth[name] : depth[name] + 20])


def test_what_has_no_latency_is_refused(lif_graph: Callable[[int], SpikingGraph], mlp_graph: Any) -> None:
    with pytest.raises(PipelineError, match="form a loop"):
        latency(lif_graph(3), "layer1")
    graph = mlp_graph(1)
    skip = Projection("skip", "x", "y", "a_in", np.zeros((9, 12), dtype=np.int32), num_message_bits=8)
    uneven = SpikingGraph(graph.populations, (*graph.projections, skip), ("y",))
    with pytest.raises(PipelineError, match=r"paths of unequal length .*1 by 'skip', 2 by 'fc2'"):
        run_pipelined(uneven, {"x": np.zeros((1, 1, 12), dtype=np.int32)})


def test_products_stay_exact_when_torch_may_round(monkeypatch: Any) -> None:
    graph = chain("graded", {"vth": 0}, 254, 0, bits=16)
    inputs = {"x": np.array([[[32767, 0], [12345, 0], [0, 0]]])}
    monkeypatch.setattr(exact, "float32_products_are_exact", lambda device: False)
    assert simulate(graph, inputs).spikes["y"][0, :, 0].tolist() == [0, 254 * 32767, 254 * 12345]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_cuda_gives_the_same_bits(seed: int, lif_graph: Any, mlp_graph: Any, messages: Any) -> None:
    for graph in (lif_graph(seed), mlp_graph(seed, squared=True)):
        inputs = messages(graph, seed, 3, 40)
        here = simulate(graph, inputs, record=RECORD_ALL)
        there = simulate(graph, inputs, record=RECORD_ALL, device="cuda")
        assert compare(here, there).equal
        assert (here.projections, here.populations) == (there.projections, there.populations)
        compiled = simulate(graph, inputs, record=RECORD_ALL, device="cuda", fused=True)  # a fallback would warn: an error
        assert compare(here, compiled).equal
        assert (here.projections, here.populations) == (compiled.projections, compiled.populations)


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_neurons_that_only_their_biases_drive_run_for_the_steps_that_are_asked_for(mode):
    bias, theta, steps = np.array([40, 100, 7]), 64, 200
    lif = {"du": 4095, "dv": 0, "vth": 1, "bias_mant": bias, "bias_exp": 0}
    graph = SpikingGraph(
        [Population("drive", "lif", 3, lif), Population("sum", "graded", 1, {"vth": 0})],
        [Projection("w", "drive", "sum", "a_in", np.array([[2, 4, 8]]), -1)],
        ["drive", "sum"],
    )
    v, spikes = np.zeros(3, dtype=np.int64), np.zeros((steps, 3), dtype=np.int64)
    for t in range(steps):
        v += bias
        spikes[t] = v > theta
        v[v > theta] = 0
    sums = np.concatenate([[0], (spikes @ [1, 2, 4])[:-1]])  # a projection takes a step
    activity = simulate(graph, {}, mode=mode, steps=steps)
    assert activity.spikes["drive"].shape == (1, steps, 3)
    assert np.array_equal(activity.spikes["drive"][0].numpy(), spikes)
    assert np.array_equal(activity.spikes["sum"][0, :, 0].numpy(), sums)
    assert activity.projections["w"].events == spikes.sum()
    for values, more, message in (
        ({}, {}, "give simulate steps=, or add one"),
        ({}, {"steps": 0}, "steps is 0; a whole number from 1"),
        ({"x": np.zeros((1, 2, 3))}, {"steps": 3}, "input 'x' is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            simulate(graph, values, **more)
    fed = SpikingGraph([Population("x", "input", 1)], [], ["x"])
    with pytest.raises(InputError, match="the graph has inputs, whose length says"):
        simulate(fed, {"x": np.zeros((1, 2, 1), dtype=np.int64)}, steps=2)


@pytest.mark.parametrize("chunk", [1, 200])
def test_blocks_of_fewer_steps_than_the_longest_delay_give_the_same_bits(
    networks: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Messages older than the block before keep their width, also where they were large and then small (seeds found)."""
    for seed in (52, 74, 77, 85, 88):
        graph = networks.network(seed)
        inputs = networks.messages(graph, seed, 2, 20)
        whole = simulate(graph, inputs, record=RECORD_ALL)
        with monkeypatch.context() as patch:
            patch.setattr(fixed_point, "CHUNK_VALUES", chunk)
            parts = simulate(graph, inputs, record=RECORD_ALL)
        assert compare(whole, parts).equal
        assert whole.populations == parts.populations
        assert whole.projections == parts.projections
