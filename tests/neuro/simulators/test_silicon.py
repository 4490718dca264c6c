"""One neuron against the trace of a Loihi 2 board that the NIR paper published, step by step, in both modes.

The files hold 1,000 rows of input, v and spike. In a step with a spike the probe of the board reads v = 128, no voltage:
v was above 1,600 and is 0 after the reset, and the next step goes on from 0. Lava's trace of the same neuron has the 0.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate
from tests.published import published

FIRES = [461, 511, 711, 761]
MARKER = 128  # what the probe of v reads in a step with a spike
NEURON = {"du": 4095, "dv": 163, "vth": 25}
WEIGHT = 10


def trace(name: str) -> np.ndarray:
    """(1000, 3): input, v, spike."""
    return np.loadtxt(published(f"nir_paper/{name}.csv"), delimiter=",")


def run(sent: np.ndarray, mode: str) -> Activity:
    graph = SpikingGraph(
        (Population("x", "input", 1), Population("lif", "lif", 1, NEURON)),
        (Projection("w", "x", "lif", "a_in", [[WEIGHT]]),),
        ("lif",),
    )
    return simulate(graph, {"x": torch.from_numpy(sent.astype(np.int64))[None, :, None]}, mode=mode, record=("v",))


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_a_board_and_the_simulator_give_the_same_neuron(mode: str) -> None:
    board = trace("lif_lava_loihi_fixed")
    assert board.shape == (1000, 3)
    # Our projection takes a step. So did the board's: its v answers in the row after the input's.
    result = run(board[:, 0], mode)
    v, spikes = result.states["lif"]["v"][0, :, 0].numpy(), result.spikes["lif"][0, :, 0].numpy()
    assert np.flatnonzero(board[:, 2]).tolist() == FIRES
    np.testing.assert_array_equal(spikes, board[:, 2])
    silent = board[:, 2] == 0
    assert int(silent.sum()) == 996
    np.testing.assert_array_equal(v[silent], board[silent, 1])
    assert set(board[~silent, 1]) == {MARKER}
    assert not v[~silent].any()
    assert int(v.max()) > 1000, "the comparison is of a neuron that does something"


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_lava_published_the_same_trace_without_the_marker(mode: str) -> None:
    lava = trace("lif_lava_cpu_fixed")
    result = run(lava[:, 0], mode)
    np.testing.assert_array_equal(result.states["lif"]["v"][0, :, 0].numpy(), lava[:, 1])
    np.testing.assert_array_equal(result.spikes["lif"][0, :, 0].numpy(), lava[:, 2])
