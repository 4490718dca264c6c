"""lava-dl's own networks beside the traces that its tests hold Lava and a Loihi 2 board against; skipped without them.

The files lie in the wheel lava-dl 0.6.0 on PyPI (BSD-3-Clause), folder tests/lava/lib/dl/netx. `pip download --no-deps` and
unzip it; the folder, named lava_dl, goes into what SPIKEGATE_PUBLISHED_DATA names. Pictures there are (x, y, c, steps),
which is the graph's own order. lava-dl has no step between its input and layer 0, so ours come one step later.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuro.exchange.netx import load_netx
from neuro.simulators.fixed_point import simulate
from tests.published import published

SAMPLE = 16  # steps
MARKER = 128  # what the traces of v show in a step with a spike, as in tests/neuro/simulators/test_silicon.py


def numbers(name: str) -> np.ndarray:
    """The array of a file; its last axis is time."""
    return np.load(published(f"lava_dl/gts/{name}.npy"))


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_pilotnet_of_lif_neurons_equals_the_traces_of_every_layer(mode: str) -> None:
    graph = load_netx(published("lava_dl/gts/pilotnet_lif/network.net"), reset_interval=SAMPLE)
    picture = numbers("pilotnet_lif/image").astype(np.int32).reshape(1, 1, -1)
    result = simulate(graph, {"input": np.repeat(picture, SAMPLE + 11, axis=1)}, mode=mode, record=("spikes", "u", "v"))
    names = {f"conv-{k}": k + 1 for k in range(5)} | {f"fc-{k}": k + 7 for k in range(3)}
    values = spikes = 0
    for depth, (name, index) in enumerate(names.items(), start=1):
        at, ours = slice(depth, depth + SAMPLE), slice(depth + 1, depth + 1 + SAMPLE)
        states = result.states[f"layer{index}"]
        sent, u, v = (value[0, ours].numpy().T for value in (result.spikes[f"layer{index}"], states["u"], states["v"]))
        their_sent, their_u, their_v = (
            numbers(f"pilotnet_lif/{name}{what}").reshape(len(u), -1)[:, at] for what in ("", "-u", "-v")
        )
        np.testing.assert_array_equal(sent, their_sent, err_msg=name)
        np.testing.assert_array_equal(u, their_u, err_msg=name)
        fired = sent != 0
        np.testing.assert_array_equal(v[~fired], their_v[~fired], err_msg=name)
        assert set(their_v[fired].tolist()) <= {MARKER}
        values, spikes = values + u.size, spikes + int(fired.sum())
    assert (values, spikes) == (1_902_528, 176_124)


def test_ntidigits_with_delays_equals_every_spike() -> None:
    graph = load_netx(published("lava_dl/gts/ntidigits/ntidigits.net"))
    sent = numbers("ntidigits/input").T.astype(np.int32)  # one row of channels, so that all orders are one
    result = simulate(graph, {"input": torch.from_numpy(sent)[None]}, record=("spikes",))
    expected = numbers("ntidigits/output").T
    # The trace begins one step later than our run.
    np.testing.assert_array_equal(result.spikes["layer4"][0, :-1].numpy(), expected[1:])
    assert int(expected.sum()) == 22_572
    voices = result.spikes["layer5"][0].sum(dim=0)
    assert int(voices.sum()) == int(result.spikes["layer4"][0, :-1].sum())


def test_pilotnet_of_sigma_delta_neurons_gives_the_same_angles() -> None:
    graph = load_netx(published("lava_dl/gts/pilotnet_sdnn/network.net"))
    expected = numbers("pilotnet_sdnn/output")[0]
    sent = np.zeros((1, len(expected), graph.population("input").size), dtype=np.int32)
    sent[0, 0] = numbers("pilotnet_sdnn/input").reshape(-1) << 6  # one picture, delta-encoded: its change from 0
    np.testing.assert_array_equal(simulate(graph, {"input": sent}).spikes["layer9"][0, :, 0].numpy(), expected)


def test_a_small_cnn_gives_the_same_spikes() -> None:
    graph = load_netx(published("lava_dl/tiny.net"), reset_interval=17)
    bias = numbers("tinynet/input_bias").astype(np.int32).reshape(1, 1, -1)
    expected = numbers("tinynet/output").reshape(36, 16)
    spikes = simulate(graph, {"input": np.repeat(bias, 22, axis=1)}).spikes["layer2"][0].numpy().T
    np.testing.assert_array_equal(spikes[:, 3:18], expected[:, 1:])
    assert int(expected.sum()) == 92
