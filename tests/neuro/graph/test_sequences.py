"""Wherever integers go in as an array, lists, tuples, ranges and CPU tensors do too; what is no integer is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from neuro.graph import Convolution, GraphError, Population, Projection, SpikingGraph, identical, truncate_weights
from neuro.simulators.fixed_point import simulate
from neuro.simulators.inputs import InputError
from neuro.simulators.tally import checked_placement

LIF = {"du": 0, "dv": 0, "vth": 1}
WEIGHT = np.array([[2, -4], [6, 0], [0, 8]])
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda a: a,
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(map(tuple, a.tolist())) if a.ndim > 1 else tuple(a.tolist()),
    "tensor": torch.from_numpy,
    "rows": lambda a: list(a),
    "int8": lambda a: a.astype(np.int8),
}


def graph(form: Callable[[np.ndarray], Any]) -> SpikingGraph:
    return SpikingGraph(
        (
            Population("x", "input", 2),
            Population("y", "lif", 3, {**LIF, "bias_mant": form(np.array([3, -1, 0])), "bias_exp": form(np.arange(3))}),
        ),
        (
            Projection("w", "x", "y", "a_in", form(WEIGHT)),
            Projection("d", "x", "y", "a_in", form(WEIGHT), kind="delay_dense", delays=form(np.abs(WEIGHT))),
        ),
        ("y",),
    )


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_graph_and_the_same_spikes(name: str) -> None:
    form, wanted = FORMS[name], graph(FORMS["array"])
    made = graph(form)
    assert identical(made, wanted)
    assert np.array_equal(truncate_weights(form(WEIGHT + 1), "mixed"), WEIGHT)
    x = (np.random.default_rng(0).random((2, 5, 2)) < 0.5).astype(np.int64)
    spikes = [simulate(g, {"x": value}).spikes["y"] for g, value in ((wanted, x), (made, form(x)))]
    assert torch.equal(*spikes)
    placed = checked_placement(made, {"y": form(np.array([0, 1, 1]))})
    assert placed is not None
    assert placed["y"].tolist() == [0, 1, 1]


def test_a_range_and_a_list_of_ten_thousand() -> None:
    made = Population("y", "lif_reset", 10_000, {**LIF, "reset_interval": 5, "bias_mant": [7] * 10_000})
    assert np.array_equal(made.params["bias_mant"], np.full(10_000, 7))
    made = Population("y", "lif", 100, {**LIF, "bias_mant": range(100)})
    assert np.array_equal(made.params["bias_mant"], np.arange(100))
    assert Convolution(np.array([4, 4, 1]), stride=torch.tensor([2, 1])).stride == (2, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2.5, 3], r"bias_mant holds 2\.5 \(float\); integers are needed"),
        ([1, True, 3], r"bias_mant holds True \(bool\)"),
        ([1, None, 3], r"bias_mant holds None"),
        ([[1], [2, 3]], "rows of unequal length"),
        ([1, 2**70, 3], r"bias_mant holds 1180591620717411303424, beyond 64 bits"),
        ([1, 2], r"bias_mant has shape \(2,\); the population has 3 neurons"),
        ([1, 2, 9999], "bias_mant is 9999 at neuron 2; its register holds"),
        (torch.tensor([1.0, 2.0, 3.0]), "an array of float32; integers are needed"),
        (torch.tensor([1, 2, 3]).to_sparse(), "which numpy does not take"),
        ("123", r"bias_mant is '123' \(str\); an integer is needed"),
        (range(10**12), "a range of at most"),
    ],
)
def test_what_is_no_row_of_integers_is_named(value: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Population("y", "lif", 3, {**LIF, "bias_mant": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[[0.5, 1]]], r"input 'x' holds 0\.5 \(float\)"),
        ([[[0, 1], [1]]], "unequal length"),
        ("text", "input 'x' is 'text'; an array of integers"),
        (np.array([[[2**40, 0]]], dtype=np.uint64), "holds 1099511627776; a message holds up to 2147483647"),
        (torch.tensor([[[2**40, 0]]], dtype=torch.uint64), "holds 1099511627776"),
    ],
)
def test_inputs_that_are_no_integers_are_named(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(graph(FORMS["array"]), {"x": value})


def test_unsigned_inputs_run() -> None:
    x = np.ones((1, 4, 2), dtype=np.int32)
    wanted = simulate(graph(FORMS["array"]), {"x": x}).spikes["y"]
    for kind in (np.uint8, np.uint16, np.uint32, np.uint64, np.bool_):
        for value in (x.astype(kind), torch.from_numpy(x.astype(kind))):
            assert torch.equal(simulate(graph(FORMS["array"]), {"x": value}).spikes["y"], wanted)
