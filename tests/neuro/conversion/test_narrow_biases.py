"""Biases and hidden messages of few bits, as chips other than Loihi hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuro
from neuro.conversion.graded import GradedConfig
from neuro.conversion.integers import WHOLE_BIAS, on_mantissa
from tests.neuro.conversion.graded_networks import planned, rows


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=6), st.integers(2, WHOLE_BIAS - 1))
def test_a_mantissa_is_the_nearest_that_its_bits_hold(values: list[int], bits: int) -> None:
    high = 2 ** (bits - 1) - 1
    for value, found in zip(values, on_mantissa(np.array(values), bits).tolist(), strict=True):
        mantissa = found
        while mantissa and mantissa % 2 == 0 and abs(mantissa) > high:
            mantissa //= 2
        assert abs(mantissa) <= high
        if abs(value) <= high:
            assert found == value
        else:  # half a step of the mantissa, which fills at least half of its range
            assert abs(found - value) <= abs(value) / high + 1e-9 * abs(value)


def test_whole_biases_are_left_as_they_are() -> None:
    values = np.array([0, -1, 2**30 + 1, -(2**35) - 7])
    assert on_mantissa(values, WHOLE_BIAS).tolist() == values.tolist()
    for bits in (1, 25):
        with pytest.raises(ValueError, match=rf"bias_bits is {bits}; it lies in 2\.\.24"):
            GradedConfig(bias_bits=bits)


@pytest.mark.parametrize("narrow", ["synapse", "neuron"])
def test_a_rounded_bias_is_in_the_graph_and_in_its_twin(narrow: str) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    x = rows(60, 12)
    found = {}
    for bits in (3, 8, WHOLE_BIAS):
        plan = planned(module, x, bias_bits=bits, narrow=narrow)
        ours, twin = neuro.deploy(module, plan)(x), neuro.deploy(module, plan, "quantised")(x)
        step = plan.segments[0].output_scale
        largest = max(plan.segments[0].channel_scales[-1], default=0.0) / plan.segments[0].weight_scales[-1] or 1.0
        assert float((ours - twin).abs().max()) <= step * max(largest, 1.0)
        found[bits] = ours
    error = {bits: float((found[bits] - found[WHOLE_BIAS]).abs().max()) for bits in (3, 8)}
    scale = float(found[WHOLE_BIAS].abs().max())
    assert 0 < error[8] < 0.02 * scale
    assert error[8] < error[3]


def test_networks_of_convolutions_round_their_biases_too() -> None:
    torch.manual_seed(3)
    parts = [nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model, example = nn.Sequential(*parts).eval(), torch.rand(24, 2, 6, 6)
    report, ranges = neuro.analyse(model, example), neuro.calibrate(model, [example])
    plan = neuro.convert(model, ranges, report, GradedConfig(bias_bits=8))
    for stage in plan.segments[0].stages:
        whole = np.array(stage.bias) // 2  # weights and biases are even
        assert np.array_equal(on_mantissa(whole, 8), whole)
        assert whole.any()
    apart = neuro.deploy(model, plan)(example) - neuro.deploy(model, plan, "quantised")(example)
    assert float(apart.abs().max()) <= plan.segments[0].output_scale  # the twin leaves out the last shift


def test_shifts_in_neurons_reach_widths_that_the_exponent_register_does_not() -> None:
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(64, 30, bias=False), nn.ReLU(), nn.Linear(30, 4, bias=False))
    x = rows(200, 64)
    widths = {
        narrow: planned(module, x, hidden_bits=5, narrow=narrow).segments[0].payload_bits["hidden"]
        for narrow in ("synapse", "neuron")
    }
    assert widths["neuron"] <= 6 < widths["synapse"]
