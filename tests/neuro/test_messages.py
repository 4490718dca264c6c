"""No message of neuro or hardware grows with the value it is about, and none is cut at the source by hand."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hardware
import neuro
from hardware import text
from hardware.placement import Connection, Convolution, LayerDemand, place
from neuro.analysis.compatibility import analyse
from neuro.graph import Convolution as GraphConvolution
from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph import text as graph_text
from neuro.simulators.activity import recorded
from neuro.simulators.fixed_point import simulate

LONGEST = 600
HUGE: dict[str, Any] = {
    "list": [7] * 100_000,
    "nested": [[[1.5] * 1000] * 100],
    "tuple": tuple("abc" * 50_000),
    "text": "x" * 100_000,
    "lines": "a\nb\n" * 20_000,
    "number": 10**5000,
    "negative": -(10**400),
    "array": np.arange(100_000),
    "floats": np.full((300, 300), 0.1),
    "objects": np.array([[1], "x" * 10_000], dtype=object),
    "tensor": torch.arange(50_000),
    "matrix": torch.full((40, 20), 1 / 3),
    "dict": {f"key{i}": i for i in range(20_000)},
    "set": frozenset(range(30_000)),
    "range": range(10**12),
    "bytes": b"x" * 100_000,
    "names": [f"population{i}" for i in range(5000)],
    "none": None,
    "nan": float("nan"),
}


class Stubborn:
    def __repr__(self) -> str:
        raise RuntimeError("no")


HUGE["stubborn"] = Stubborn()
LIF = {"du": 0, "dv": 0, "vth": 1}
X, Y, W = Population("x", "input", 2), Population("y", "lif", 3, LIF), np.zeros((3, 2), dtype=int)
GRAPH = SpikingGraph((X, Y), (Projection("w", "x", "y", "a_in", W),), ("y",))
MANY = tuple(Population(f"p{i}" * 20, "input", 1) for i in range(2000))
LINEAR = torch.nn.Linear(2, 2)
MAKERS: dict[str, Callable[[Any], Any]] = {
    "population name": lambda v: Population(v, "lif", 3, LIF),
    "population kind": lambda v: Population("y", v, 3, LIF),
    "population size": lambda v: Population("y", "lif", v, LIF),
    "population params": lambda v: Population("y", "lif", 3, v),
    "population bias": lambda v: Population("y", "lif", 3, {**LIF, "bias_mant": v}),
    "population vth": lambda v: Population("y", "lif", 3, {**LIF, "vth": v}),
    "population key": lambda v: Population("y", "lif", 3, {**LIF, v if isinstance(v, str | int) else repr(type(v)): 1}),
    "projection name": lambda v: Projection(v, "x", "y", "a_in", W),
    "projection weight": lambda v: Projection("w", "x", "y", "a_in", v),
    "projection exp": lambda v: Projection("w", "x", "y", "a_in", W, weight_exp=v),
    "projection sign": lambda v: Projection("w", "x", "y", "a_in", W, sign_mode=v),
    "projection kind": lambda v: Projection("w", "x", "y", "a_in", W, kind=v),
    "projection delays": lambda v: Projection("w", "x", "y", "a_in", W, kind="delay_dense", delays=v),
    "convolution": lambda v: GraphConvolution(v),
    "groups": lambda v: GraphConvolution((4, 4, 1), groups=v),
    "graph source": lambda v: SpikingGraph((X, Y), (Projection("w", v, "y", "a_in", W),), ("y",)),
    "graph port": lambda v: SpikingGraph((X, Y), (Projection("w", "x", "y", v, W),), ("y",)),
    "graph output": lambda v: SpikingGraph((X, Y), GRAPH.projections, (v,)),
    "graph of many": lambda v: SpikingGraph(MANY, (), (v if isinstance(v, str) else "none",)),
    "inputs": lambda v: simulate(GRAPH, {"x": v}),
    "input name": lambda v: simulate(GRAPH, {v if isinstance(v, str | int) else "z": np.zeros((1, 1, 2), dtype=int)}),
    "mode": lambda v: simulate(GRAPH, {"x": np.zeros((1, 1, 2), dtype=int)}, mode=v),
    "record": lambda v: recorded(GRAPH, v if isinstance(v, list | tuple) else (v,)),
    "placement": lambda v: simulate(GRAPH, {"x": np.zeros((1, 1, 2), dtype=int)}, placement={"y": v}),
    "demand name": lambda v: LayerDemand(v, 3),
    "demand neurons": lambda v: LayerDemand("a", v),
    "connection inputs": lambda v: Connection("a", v),
    "connection encoding": lambda v: Connection("a", 3, encoding=v),
    "connection mask": lambda v: Connection("a", 3, mask=v),
    "demand convolution": lambda v: Convolution("a", v, 3, (1, 1)),
    "demand kernel": lambda v: Convolution("a", (4, 4, 1), 3, v),
    "chips": lambda v: place([LayerDemand("a", 3)], "loihi2", v),
    "split": lambda v: place([LayerDemand("a", 3)], "loihi2", split=v),
    "budget": lambda v: place([LayerDemand("a", 3)], "loihi2", budget=v),
    "quantity": lambda v: hardware.Quantity(1.0, v),
    "counts layer": lambda v: hardware.Counts(v, 1, 1, 1, 1, 1, 1, 1, True, 8),
    "counts tokens": lambda v: hardware.Counts("a", v, 1, 1, 1, 1, 1, 1, True, 8),
    "graded config": lambda v: neuro.GradedConfig(scales=v),
    "graded bits": lambda v: neuro.GradedConfig(weight_bits=v),
    "rate steps": lambda v: neuro.RateConfig(v),
    "rate reset": lambda v: neuro.RateConfig(8, reset=v),
    "sigma delta": lambda v: neuro.SigmaDeltaConfig(input_threshold=v),
    "route": lambda v: analyse(LINEAR, torch.zeros(1, 2), route=v),
    "method": lambda v: neuro.calibrate(LINEAR, [torch.zeros(1, 2)], method=v),
    "rule": lambda v: neuro.LayerRule(v, "a reason"),
    "registered": lambda v: neuro.unregister_layer(v),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_messages_about_huge_values_stay_short(maker: str) -> None:
    raised = 0
    for name, value in HUGE.items():
        try:
            MAKERS[maker](value)
        except (ValueError, TypeError, KeyError) as error:
            raised += 1
            message = str(error)
            assert len(message) < LONGEST, f"{name}: {len(message)} characters: {message[:300]}"
    assert raised >= 5


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=300) | st.binary(max_size=300),
        lambda inner: (
            st.lists(inner, max_size=60) | st.dictionaries(st.text(max_size=9), inner, max_size=40) | st.tuples(inner)
        ),
        max_leaves=300,
    ),
    st.integers(32, 200),
)
def test_both_copies_write_any_value_on_one_line(value: Any, limit: int) -> None:
    for write in (text.quoted, graph_text.quoted):
        shown = write(value, limit)
        assert len(shown) <= limit
        assert len(shown.splitlines()) <= 1
    whole = " ".join(repr(value).split())
    if len(whole) <= limit and whole.count("[") + whole.count("{") + whole.count("(") < 4:
        assert text.quoted(value, limit) == whole


def test_the_copy_that_the_lava_worker_loads_is_the_same_code() -> None:
    ours, copied = (inspect.getsource(module).split("\n", 1)[1] for module in (text, graph_text))
    assert ours == copied


def test_lists_of_names_are_cut_and_counted() -> None:
    assert text.listed(["a", "b"]) == "a, b"
    shown = text.listed(f"population{i}" for i in range(1000))
    assert shown.startswith("population0, population1")
    assert shown.endswith(", ... (1,000 in all)")
    assert len(shown) < 160
    assert text.listed(["x" * 500]) == text.short("x" * 500)


def test_every_value_in_a_message_goes_through_the_helper() -> None:
    """`{value!r}` in an f-string would write the whole value."""
    found = []
    for package in (hardware, neuro):
        root = Path(package.__file__).parent
        for path in root.rglob("*.py"):
            if "lava_worker" in path.parts or path.name == "__init__.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
                    found.append(f"{path}:{node.lineno}")
    assert found == []
