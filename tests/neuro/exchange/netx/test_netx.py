"""Networks from `.net` files: integers as an evaluation of the file itself gives them, in every published layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuro.exchange.netx import encode_input, from_frames, load_netx, to_frames
from neuro.graph import SpikingGraph, identical, load_graph, save_graph
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaWorker
from tests.neuro.exchange.netx.netx_files import CUBA, LOIHI, RF, SDNN, correlate, evaluate, even, write

Layers = list[dict[str, Any]]
STEPS = 24


def dense(rng: np.random.Generator, outs: int, sources: int, neuron: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    layer = {"type": "dense", "shape": [outs], "weight": even(rng, (outs, sources)), **more}
    layer |= {"inFeatures": sources, "outFeatures": outs}
    return layer if neuron is None else {**layer, "neuron": neuron}


def conv(
    rng: np.random.Generator, shape: Any, kernel: Any, neuron: dict[str, Any], most: int = 60, **more: Any
) -> dict[str, Any]:
    geometry = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1} | more
    return {"type": "conv", "shape": shape, "weight": even(rng, kernel, most), "neuron": neuron, **geometry}


def lif_dense(rng: np.random.Generator) -> Layers:
    return [{"type": "input", "shape": [7]}, dense(rng, 6, 7, LOIHI), dense(rng, 5, 6, LOIHI, shape=[5, 1, 1])]


def cuba_dense(rng: np.random.Generator) -> Layers:
    first = {"type": "input", "shape": [7], "neuron": {**CUBA, "iDecay": 4096}, "weight": [36.0], "bias": [4.0]}
    return [first, dense(rng, 6, 7, CUBA, bias=rng.integers(-9, 20, 6).astype(float)), dense(rng, 4, 6, CUBA)]


def lif_conv(rng: np.random.Generator) -> Layers:
    """Everything differs between y and x: the picture, the kernel, the stride, the padding and the dilation."""
    return [
        {"type": "input", "shape": [2, 5, 9]},
        conv(rng, [3, 3, 3], (3, 2, 2, 3, 1), LOIHI, stride=[2, 3], padding=[1, 0], dilation=[2, 1], bias=[5.0, -3.0, 0.0]),
        conv(rng, [4, 2, 2], (4, 3, 2, 2), LOIHI),
    ]


def grouped_conv(rng: np.random.Generator) -> Layers:
    return [
        {"type": "input", "shape": [4, 4, 3], "neuron": LOIHI, "weight": 40.0},
        conv(rng, [6, 3, 2], (6, 2, 2, 2), LOIHI, groups=2, stride=1, padding=0, dilation=1),
    ]


def sigma_delta_conv(rng: np.random.Generator) -> Layers:
    return [
        {"type": "input", "shape": [2, 4, 5], "neuron": {**SDNN, "vThMant": 0}},
        conv(rng, [3, 3, 2], (3, 2, 2, 3), SDNN, 20, stride=[1, 2], bias=[7.0, -5.0, 3.0]),
        {"type": "flatten", "shape": [18, 1, 1]},
        dense(rng, 4, 18, SDNN, bias=rng.integers(-4, 9, 4)),
        dense(rng, 2, 4, {**SDNN, "sigma_output": True}),
    ]


def pooled(rng: np.random.Generator) -> Layers:
    return [
        {"type": "input", "shape": [2, 4, 6]},
        conv(rng, [3, 4, 6], (3, 2, 3, 1), LOIHI, padding=[1, 0]),
        {"type": "pool", "shape": [3, 2, 2], "weight": np.full((1, 1, 2, 3, 1), 20.0), "stride": [2, 3], "neuron": LOIHI},
    ]


def uneven_pool(rng: np.random.Generator) -> Layers:
    weight = rng.integers(1, 40, (1, 1, 2, 2))
    return [
        {"type": "input", "shape": [2, 4, 6]},
        {"type": "pool", "shape": [2, 2, 3], "weight": weight, "kernelSize": [2, 2], "neuron": LOIHI},
    ]


def flattened(rng: np.random.Generator) -> Layers:
    flat = {"type": "flatten", "shape": [24, 1, 1]}
    return [{"type": "input", "shape": [2, 3, 4]}, flat, dense(rng, 5, 24, LOIHI, weight=even(rng, (5 * 24,)))]


def averaged(rng: np.random.Generator) -> Layers:
    return [
        {"type": "input", "shape": [1, 1, 8]},
        {"type": "flatten", "shape": [8, 1, 1]},
        dense(rng, 12, 8, LOIHI, shape=[12, 1, 1]),
        {"type": "average", "shape": [4, 1, 1]},
    ]


def recurrent(rng: np.random.Generator) -> Layers:
    return [
        {**dense(rng, 6, 5, CUBA), "type": "dense_rec", "weight_rec": even(rng, (6, 6))},
        {**dense(rng, 4, 6, CUBA, bias=[9.0]), "type": "dense_rec", "weight_rec": even(rng, (4, 4))},
    ]


def resonating(rng: np.random.Generator) -> Layers:
    each = {"sinDecay": rng.integers(500, 2500, 5), "cosDecay": rng.integers(2000, 3000, 5)}
    first = dense(rng, 5, 6, {**RF, **each})
    second = dense(rng, 4, 5, {**RF, "type": "RF_IZHIKEVICH"})
    for layer in (first, second):
        layer["weight/real"], layer["weight/imag"] = (
            layer.pop("weight"),
            even(rng, (layer["shape"][0], layer["inFeatures"])),
        )
    return [{"type": "input", "shape": [6]}, first, second]


def resonating_conv(rng: np.random.Generator) -> Layers:
    layer = conv(rng, [3, 3, 2], (3, 2, 2, 3, 1), {**RF, "vThMant": 30})
    layer["weight/real"], layer["weight/imag"] = layer.pop("weight"), even(rng, (3, 2, 2, 3, 1))
    return [{"type": "input", "shape": [2, 4, 4]}, layer]


def each_its_decay(rng: np.random.Generator) -> Layers:
    """What shared_param=False gives: one decay for each channel."""
    of_channels = {**CUBA, "vThMant": 8, "iDecay": np.array([900, 1000, 4096]), "vDecay": np.array([100, 0, 4095])}
    of_neurons = {**CUBA, "vThMant": np.array([2, 4, 9, 3])}
    return [
        {"type": "input", "shape": [2, 3, 4]},
        conv(rng, [3, 2, 3], (3, 2, 2, 2), of_channels),
        {"type": "flatten", "shape": [18]},
        dense(rng, 4, 18, of_neurons),
    ]


def read_out(rng: np.random.Generator) -> Layers:
    return [{"type": "input", "shape": [6]}, dense(rng, 5, 6, LOIHI), dense(rng, 3, 5, None)]


def skipping(rng: np.random.Generator) -> Layers:
    """Layer 4 reads layer 2, then layer 1; layer 6 reads layer 4 and itself, through a loop that is closed by concat."""
    return [
        {"type": "input", "shape": [6]},
        dense(rng, 5, 6, LOIHI),
        dense(rng, 4, 5, LOIHI),
        {"type": "concat", "shape": [9], "layers": [1]},
        dense(rng, 7, 9, LOIHI),
        {"type": "concat", "shape": [10], "layers": [6]},
        dense(rng, 3, 10, LOIHI),
    ]


def joined_pictures(rng: np.random.Generator) -> Layers:
    """A dense layer reads the pictures of a layer and of the input, each in the file's order; so does an average."""
    return [
        {"type": "input", "shape": [2, 3, 4]},
        conv(rng, [3, 2, 3], (3, 2, 2, 2), LOIHI),
        {"type": "concat", "shape": [42], "layers": [0]},
        {"type": "flatten", "shape": [42]},
        dense(rng, 12, 42, LOIHI, shape=[3, 2, 2]),
        {"type": "average", "shape": [6]},
    ]


def odd_and_exponents(rng: np.random.Generator) -> Layers:
    odd = {"weight": rng.integers(-90, 90, (6, 7)).astype(np.float32)}
    return [
        {"type": "input", "shape": [7]},
        dense(rng, 6, 7, LOIHI, **odd),
        dense(rng, 5, 6, {**LOIHI, "wgtExp": 1}),
        dense(rng, 5, 5, {**LOIHI, "wgtExp": -1}, weight=np.abs(rng.integers(0, 255, (5, 5)))),
        dense(rng, 4, 5, LOIHI, weight=-rng.integers(0, 200, (4, 5)), bias=[40.0]),
    ]


LAYOUTS: dict[str, Callable[[np.random.Generator], Layers]] = {
    made.__name__: made
    for made in (
        *(lif_dense, cuba_dense, lif_conv, grouped_conv, sigma_delta_conv, pooled, uneven_pool, flattened, averaged),
        *(recurrent, resonating, resonating_conv, each_its_decay, read_out, skipping, joined_pictures, odd_and_exponents),
    )
}


def frames_for(layers: Layers, rng: np.random.Generator, steps: int = STEPS) -> np.ndarray:
    """(steps, *shape of the input): values where layer 0 has neurons, else spikes."""
    first = layers[0]
    shape = tuple(first["shape"]) if first["type"] == "input" else (first["inFeatures"],)
    if first["type"] == "input" and "neuron" in first:
        high = 60 if first["neuron"]["type"] == "SDNN" else 12
        return rng.integers(-2, high, (steps, *shape))
    return (rng.random((steps, *shape)) < 0.4).astype(np.int64)


def run(graph: SpikingGraph, frames: np.ndarray, steps: int = STEPS, mode: str = "lava") -> dict[str, np.ndarray]:
    """Messages of every population, (steps, c, y, x)."""
    whole = np.zeros((1, steps, *frames.shape[1:]), dtype=np.int64)
    whole[0, : len(frames)] = frames
    activity = simulate(graph, {"input": from_frames(graph, "input", whole)}, mode=mode, record=("spikes",))
    return {name: to_frames(graph, name, sent.numpy())[0] for name, sent in activity.spikes.items()}


def assert_equal(path: Path, graph: SpikingGraph, frames: np.ndarray, reset: int | None = None, mode: str = "lava") -> None:
    expected = evaluate(path, frames, STEPS, reset)
    got = run(graph, frames, mode=mode)
    assert set(got) == {"input", *(f"layer{index}" for index in expected)}
    for index, messages in expected.items():
        ours = got[f"layer{index}"]
        np.testing.assert_array_equal(ours.reshape(messages.shape), messages, err_msg=f"layer {index}")
        assert messages.any(), f"layer {index} is silent, so that it shows nothing"
    assert graph.outputs == (f"layer{max(expected)}",)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_message_is_what_the_file_says(name: str, tmp_path: Path) -> None:
    for seed in range(2):
        rng = np.random.default_rng([seed, *name.encode()])
        layers = LAYOUTS[name](rng)
        path = write(tmp_path / f"{seed}.net", layers)
        graph = load_netx(path)
        assert_equal(path, graph, frames_for(layers, rng))
        assert identical(load_graph(save_graph(graph, tmp_path / f"{seed}.graph.npz")), graph)


@pytest.mark.parametrize("name", ["lif_dense", "cuba_dense", "lif_conv", "grouped_conv", "pooled", "each_its_decay"])
@pytest.mark.parametrize("interval", [1, 5])
def test_a_reset_reaches_each_layer_with_the_first_step_of_a_sample(name: str, interval: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([interval, *name.encode()])
    layers = LAYOUTS[name](rng)
    for layer in layers:  # bigger steps, so that one of them is enough to fire
        if layer["type"] not in ("input", "flatten"):
            layer["weight"] = 2 * layer["weight"]
    path = write(tmp_path / "a.net", layers)
    graph = load_netx(path, reset_interval=interval)
    loud = 8 if graph.meta["netx"]["input"]["neurons"] else 1
    assert_equal(path, graph, loud * frames_for(layers, rng), reset=interval)
    offsets = [p.params["reset_offset"] for p in graph.populations if "reset_offset" in p.params]
    assert offsets == list(range(2, 2 + len(offsets)))


def test_two_samples_in_a_row_give_what_each_gives_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    layers = lif_conv(rng)
    for layer in layers[1:]:
        layer.pop("bias", None)  # a bias also acts before a sample
    graph = load_netx(write(tmp_path / "a.net", layers), reset_interval=10)
    first, second = frames_for(layers, rng, 10), frames_for(layers, rng, 10)
    both = run(graph, np.concatenate([first, second]))["layer2"]
    alone = run(graph, second)["layer2"]
    assert alone.any()
    np.testing.assert_array_equal(both[12:22], alone[2:12])


def test_a_read_out_without_neurons_sums_up_to_each_reset(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    layers = read_out(rng)
    path, frames = write(tmp_path / "a.net", layers), frames_for(layers, rng)
    graph = load_netx(path, reset_interval=6)
    sent = evaluate(path, frames, STEPS, reset=6)[1]
    inputs = {"input": from_frames(graph, "input", frames[None])}
    v = simulate(graph, inputs, record=("v",)).states["layer2"]["v"][0].numpy()
    weight = layers[2]["weight"].astype(np.int64)
    for t in range(3, STEPS):  # its first sample begins at step 2, the messages of step t arrive at t + 1
        begin = 2 + (t - 2) // 6 * 6
        np.testing.assert_array_equal(v[t], 64 * (weight @ sent[begin - 1 : t].sum(axis=0)))
    assert v.any()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_kernel_that_is_not_turned_gives_other_spikes(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = np.random.default_rng(seed)
    stride, padding = rng.integers(1, 3, 2), rng.integers(0, 2, 2)
    kernel = even(rng, (3, 2, 2, 3))
    kernel[0, 0, 0, 0] += 2 * (kernel[0, 0, 0, 0] == kernel[0, 0, 1, 2])  # asymmetric in any case
    picture = rng.integers(-20, 21, (2, 6, 5))
    shape = correlate(picture, kernel, stride, padding, (1, 1), 1).shape
    layers = [
        {"type": "input", "shape": [2, 6, 5], "neuron": {**SDNN, "vThMant": 0}},
        conv(rng, shape, kernel.shape, {**SDNN, "sigma_output": True}, stride=stride, padding=padding, weight=kernel),
    ]
    graph = load_netx(write(tmp_path_factory.mktemp("net") / "a.net", layers))
    unturned = dataclasses.replace(graph.projections[0], weight=graph.projections[0].weight[:, ::-1, ::-1].copy())
    other = dataclasses.replace(graph, projections=(unturned,))
    right = correlate(picture, kernel, stride, padding, (1, 1), 1)
    np.testing.assert_array_equal(run(graph, picture[None])["layer1"][-1], right)
    assert (run(other, picture[None])["layer1"][-1] != right).any()


def test_delays_of_neurons_of_sources_and_of_synapses(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    layers = [{"type": "input", "shape": [6]}, dense(rng, 5, 6, LOIHI), dense(rng, 4, 5, LOIHI)]
    frames = frames_for(layers, rng)
    plain = evaluate(write(tmp_path / "plain.net", layers), frames, STEPS)
    own = np.array([0, 3, 1, 7, 2])
    layers[1]["delay"] = own.astype(np.float32)
    late = run(load_netx(write(tmp_path / "own.net", layers)), frames)["layer1"][:, :, 0, 0]
    for i, steps in enumerate(own):  # what a neuron sends comes so much later
        np.testing.assert_array_equal(late[steps:, i], plain[1][: STEPS - steps, i])
        assert not late[:steps, i].any()

    weight = layers[1].pop("weight").astype(np.int64)
    for value in (np.array([4, 0, 9, 1, 2, 62]), rng.integers(0, 6, (5, 6)), 3):
        layers[1] |= {"weight": weight, "delay": value}
        graph = load_netx(write(tmp_path / "sources.net", layers))
        steps = np.broadcast_to(value, (5, 6))
        u = v = np.zeros(5, dtype=np.int64)
        for t in range(STEPS):
            a = np.zeros(5, dtype=np.int64)
            for i, j in np.ndindex(5, 6):
                if 0 <= t - 1 - steps[i, j] < len(frames):
                    a[i] += weight[i, j] * frames[t - 1 - steps[i, j], j]
            u = 64 * a
            v = np.sign(v) * (np.abs(v) * (4096 - LOIHI["vDecay"]) // 4096) + u
            fire = v > 64 * LOIHI["vThMant"]
            v = np.where(fire, 0, v)
            np.testing.assert_array_equal(run(graph, frames)["layer1"][t, :, 0, 0], fire)


def test_delays_of_a_recurrent_layer_and_of_a_convolution_are_taken_by_what_reads_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    layers = [
        {"type": "input", "shape": [2, 3, 4]},
        conv(rng, [3, 2, 3], (3, 2, 2, 2), LOIHI),
        {"type": "flatten", "shape": [18]},
        {**dense(rng, 5, 18, LOIHI), "type": "dense_rec", "weight_rec": even(rng, (5, 5))},
        dense(rng, 4, 5, {**SDNN, "sigma_output": True}),
    ]
    frames = frames_for(layers, rng)
    plain = evaluate(write(tmp_path / "plain.net", layers), frames, STEPS)
    layers[3]["delay"] = np.array([5, 0, 2, 1, 3])
    graph = load_netx(write(tmp_path / "late.net", layers))
    got = run(graph, frames)
    np.testing.assert_array_equal(got["layer3"][:, :, 0, 0], plain[3])  # what it sends itself is not delayed
    arrives = np.zeros((STEPS, 5), dtype=np.int64)
    for j, steps in enumerate(layers[3]["delay"]):
        arrives[1 + steps :, j] = plain[3][: STEPS - 1 - steps, j]
    np.testing.assert_array_equal(
        got["layer4"][:, :, 0, 0], np.cumsum(arrives @ layers[4]["weight"].astype(np.int64).T, axis=0)
    )
    layers[1]["delay"] = np.array([2, 0, 1])  # one for each channel
    late = load_netx(write(tmp_path / "channels.net", layers))
    assert [p.kind for p in late.projections] == ["conv", "delay_dense", "dense", "delay_dense"]
    delays = to_frames(late, "layer1", late.projections[1].delays[None])[0]
    np.testing.assert_array_equal(delays[0], np.broadcast_to(np.array([2, 0, 1])[:, None, None], (3, 2, 3)))


def test_refractory_steps_run_in_mode_chip(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    layers = [{"type": "input", "shape": [6]}, dense(rng, 5, 6, {**LOIHI, "refDelay": 3}, bias=[10.0])]
    path = write(tmp_path / "a.net", layers)
    graph = load_netx(path)
    assert graph.population("layer1").kind == "lif_refractory"
    assert_equal(path, graph, frames_for(layers, rng), mode="chip")


@pytest.mark.parametrize(
    "name", ["cuba_dense", "lif_conv", "grouped_conv", "pooled", "uneven_pool", "recurrent", "resonating"]
)
def test_mode_chip_holds_the_same_weights(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(list(name.encode()))
    layers = LAYOUTS[name](rng)
    graph = load_netx(write(tmp_path / "a.net", layers))
    frames = frames_for(layers, rng)
    lava, chip = run(graph, frames), run(graph, frames, mode="chip")
    for population, messages in lava.items():
        np.testing.assert_array_equal(chip[population], messages)


def test_a_file_without_an_input_layer_is_told_what_enters(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    layers = lif_conv(rng)
    path, frames = write(tmp_path / "whole.net", layers), frames_for(layers, rng)
    bare = write(tmp_path / "bare.net", layers[1:])
    first, second = run(load_netx(path), frames), run(load_netx(bare, input_shape=(2, 5, 9)), frames)
    np.testing.assert_array_equal(first["layer2"], second["layer1"])
    assert second["layer1"].any()

    graded = [dense(rng, 4, 6, {**SDNN, "sigma_output": True})]
    graph = load_netx(write(tmp_path / "graded.net", graded), input_bits=9)
    sent = rng.integers(-256, 256, (STEPS, 6))
    sums = np.cumsum(sent @ graded[0]["weight"].astype(np.int64).T, axis=0)
    np.testing.assert_array_equal(run(graph, sent)["layer0"][1:, :, 0, 0], sums[:-1])


def test_values_become_the_integers_of_the_first_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((2, 5, 7))
    graph = load_netx(write(tmp_path / "lif.net", cuba_dense(rng)))
    encoded = encode_input(graph, values)["input"]
    np.testing.assert_array_equal(encoded, np.rint(36 * values + 4))
    assert encoded.dtype == np.int32

    layers = sigma_delta_conv(rng)
    layers[0] |= {"weight": 32.0, "bias": 3.0, "neuron": {**SDNN, "vThMant": 2}}
    graph = load_netx(write(tmp_path / "sdnn.net", layers))
    pictures = rng.random((1, 9, 2, 4, 5))
    sent = to_frames(graph, "input", encode_input(graph, pictures)["input"])[0]
    whole, act, rest = np.rint(32 * pictures[0] + 3).astype(int), 0, 0
    for t in range(9):
        change = (whole[t] << 12) - act + rest
        out = np.where(np.abs(change) >= 2 << 12, change, 0)
        act, rest = whole[t] << 12, change - out
        np.testing.assert_array_equal(sent[t], out >> 6)
    assert (sent == 0).any()
    held = np.cumsum(sent, axis=0)
    assert (np.abs(held - (whole << 6)) < 2 << 6).all(), "the receiver's sum follows the values within the threshold"

    plain = load_netx(write(tmp_path / "bare.net", lif_conv(rng)))
    spikes = rng.integers(0, 2, (1, 3, 2, 5, 9))
    np.testing.assert_array_equal(to_frames(plain, "input", encode_input(plain, spikes)["input"]), spikes)


@pytest.mark.lava
@pytest.mark.parametrize("name", ["lif_conv", "sigma_delta_conv", "resonating"])
def test_lava_runs_the_graph_and_gives_the_same_bits(name: str, tmp_path: Path, lava: LavaWorker) -> None:
    rng = np.random.default_rng(list(name.encode()))
    layers = LAYOUTS[name](rng)
    graph = load_netx(write(tmp_path / "a.net", layers))
    inputs = {"input": from_frames(graph, "input", frames_for(layers, rng)[None]).astype(np.int32)}
    result = compare(lava.run(graph, inputs, record=("spikes",)), simulate(graph, inputs, record=("spikes",)))
    assert result.equal, str(result)
    assert result.values > 300
