"""The graph refuses what the arithmetic is not defined for, and its file gives back exactly what was written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuro import lava_worker as worker
from neuro.graph import (
    GraphError,
    GraphFileError,
    Population,
    Projection,
    SpikingGraph,
    identical,
    load_graph,
    save_graph,
    truncate_weights,
)

LIF = {"du": 0, "dv": 0, "vth": 1}


def two(weight: Any = None, **changes: Any) -> SpikingGraph:
    settings = {"name": "w", "source": "x", "target": "y", "port": "a_in"} | changes
    weight = np.zeros((3, 2), dtype=np.int32) if weight is None else weight
    populations = (Population("x", "input", 2), Population("y", "lif", 3, LIF))
    return SpikingGraph(populations, (Projection(weight=weight, **settings),), ("y",))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Population("y", "izhikevich", 1), "'y': unknown kind 'izhikevich'; known: input, lif"),
        (lambda: Population("a b", "input", 1), "name 'a b' is not usable"),
        (lambda: Population("y", "input", 0), "size is 0"),
        (lambda: Population("y", "lif", 1, {"du": 0, "dv": 0}), "'vth' is missing"),
        (lambda: Population("y", "graded", 1, {"vth": 0, "tau": 3}), "unknown parameter 'tau'; known: vth"),
        (lambda: Population("y", "lif", 1, LIF | {"du": 4096}), r"du is 4096; its register holds 0\.\.4095"),
        (lambda: Population("y", "lif", 1, LIF | {"dv": -1}), r"dv is -1; its register holds 0\.\.4095"),
        (lambda: Population("y", "lif", 1, LIF | {"vth": 2**17}), r"vth is 131072; its register holds 0\.\.131071"),
        (lambda: Population("y", "lif", 1, LIF | {"vth": 1.5}), "vth is 1.5 .*an integer is needed"),
        (lambda: Population("y", "lif", 1, LIF | {"bias_exp": 8}), r"bias_exp is 8; .*0\.\.7"),
        (
            lambda: Population("y", "lif", 2, LIF | {"bias_mant": np.array([0, 4096])}),
            r"bias_mant is 4096 at neuron 1; its register holds -4096\.\.4095",
        ),
        (lambda: Population("y", "lif", 2, LIF | {"bias_mant": np.zeros(3, int)}), r"shape \(3,\); .* 2 neurons"),
        (lambda: Population("y", "lif", 2, LIF | {"bias_mant": np.zeros(2)}), "array of float64"),
        (lambda: Population("y", "lif", 2, LIF | {"vth": np.zeros(2, int)}), "one integer for the whole population"),
        (lambda: two(np.full((3, 2), 256)), r"weight\[0, 0\] is 256, and 6 of 6 .*mixed weights hold -256\.\.255"),
        (lambda: two(np.full((3, 2), -2), sign_mode="excitatory"), r"excitatory weights hold 0\.\.255"),
        (lambda: two(np.full((3, 2), 2), sign_mode="inhibitory"), r"inhibitory weights hold -255\.\.0"),
        (lambda: two(np.eye(3, 2, dtype=int)), "mixed weights of 8 bits are multiples of 2; truncate_weights"),
        (lambda: two(np.full((3, 2), 6), num_weight_bits=6), "mixed weights of 6 bits are multiples of 8"),
        (lambda: two(np.zeros((3, 2))), "weight is an array of float64"),
        (lambda: two(np.zeros((2, 3), int)), r"weight has shape \(2, 3\); 'x' -> 'y' needs \(3, 2\)"),
        (lambda: two(np.zeros(6, int)), r"weight has shape \(6,\)"),
        (lambda: two(sign_mode="both"), "sign mode 'both' is unknown"),
        (lambda: two(num_message_bits=33), r"num_message_bits is 33; allowed are 0\.\.32"),
        (lambda: two(num_weight_bits=0), "num_weight_bits is 0"),
        (lambda: two(weight_exp=25), "weight_exp is 25"),
        (lambda: two(source="z"), "population 'z' does not exist; there are: x, y"),
        (lambda: two(port="a_in1"), r"'y' \(lif\) has no port 'a_in1'; it has: a_in"),
        (lambda: SpikingGraph(two().populations, (), ()), "no output population"),
        (lambda: SpikingGraph(two().populations, (), ("z",)), "output 'z' is not a population"),
        (lambda: SpikingGraph(two().populations * 2, (), ("y",)), "two populations are named 'x'"),
        (lambda: SpikingGraph(two().populations, two().projections * 2, ("y",)), "two projections are named 'w'"),
        (lambda: SpikingGraph(two().populations, (), ("y",), {"a": object()}), "meta must be what JSON can hold"),
        (
            lambda: SpikingGraph((Population("p", "product", 1, {"vth": 0, "exp": 0}),), (), ("p",)),
            r"'p' \(product\): nothing arrives at port 'a_in1'",
        ),
    ],
)
def test_what_the_arithmetic_cannot_do_is_refused_by_name(make: Any, text: str) -> None:
    with pytest.raises(GraphError, match=text):
        make()


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(-400, 400), min_size=1, max_size=8),
    sign_mode=st.sampled_from(["mixed", "excitatory", "inhibitory"]),
    bits=st.integers(1, 8),
)
def test_truncated_weights_are_those_of_lavas_rule(weights: list[int], sign_mode: str, bits: int) -> None:
    """lava/utils/weightutils.py: negate if inhibitory, clip, shift right and left by k, negate back."""
    k = 8 - bits + (sign_mode == "mixed")
    flip = -1 if sign_mode == "inhibitory" else 1
    lowest = -256 if sign_mode == "mixed" else 0
    expected = [flip * ((max(lowest, min(255, flip * w)) >> k) << k) for w in weights]
    got = truncate_weights(np.array([weights]), sign_mode, bits)
    assert got.tolist() == [expected]
    Projection("w", "x", "y", "a_in", got, num_weight_bits=bits, sign_mode=sign_mode)  # and they are accepted


def test_what_a_record_holds_cannot_be_changed_from_outside() -> None:
    weight = np.zeros((3, 2), dtype=np.int32)
    graph = two(weight)
    weight[0, 0] = 2
    assert graph.projections[0].weight[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        graph.projections[0].weight[0, 0] = 2


def test_a_file_gives_back_the_same_graph(lif_graph: Any, mlp_graph: Any, tmp_path: Path) -> None:
    for graph in (*(lif_graph(seed) for seed in range(4)), mlp_graph(0, True)):
        graph = SpikingGraph(graph.populations, graph.projections, graph.outputs, {"scale": 0.5, "from": ["a", None]})
        path = save_graph(graph, tmp_path / "net.graph.npz")
        assert identical(load_graph(path), graph)
        assert not identical(load_graph(path), two())
    assert [p.name for p in tmp_path.iterdir()] == ["net.graph.npz"]
    with pytest.raises(GraphError, match=r"a graph file is named NAME\.graph\.npz"):
        save_graph(two(), tmp_path / "net.npz")


def test_files_that_are_no_graph_of_this_version_are_refused(tmp_path: Path) -> None:
    path = save_graph(two(), tmp_path / "net.graph.npz")
    whole = path.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(GraphFileError, match="not a readable graph file"):
            load_graph(path)
    with np.load(save_graph(two(), path)) as archive:
        arrays: dict[str, Any] = dict(archive)

    def rewrite(**changes: Any) -> None:
        header = json.loads(arrays["header"].tobytes()) | changes.pop("header", {})
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        np.savez(path, **{**arrays, "header": text, **changes})

    rewrite(header={"schema": 3})
    with pytest.raises(GraphFileError, match="schema 3, this version reads schema 1 and 2"):
        load_graph(path)
    rewrite(**{"projection.0.weight": np.array([[object()]])})
    with pytest.raises(GraphFileError, match="not a readable graph file"):
        load_graph(path)
    rewrite(**{"projection.0.weight": np.zeros((3, 2))})
    with pytest.raises(GraphFileError, match="only integers belong"):
        load_graph(path)
    rewrite(header={"projections": {"w": {"synops": 3}}})  # as a result of a simulator has them
    with pytest.raises(GraphFileError, match=r"net\.graph\.npz: the header has no list of projections, .* result of"):
        load_graph(path)
    rewrite(header={"projections": [{"name": "w"}]})
    with pytest.raises(GraphFileError, match="do not fit together"):
        load_graph(path)
    rewrite(**{"projection.0.weight": np.full((3, 2), 3)})
    with pytest.raises(GraphError, match=r"net\.graph\.npz: projection 'w': weight\[0, 0\] is 3"):
        load_graph(path)
    with pytest.raises(FileNotFoundError):
        load_graph(tmp_path / "none.graph.npz")


@pytest.mark.lava
def test_lavas_python_reads_the_same_file_without_torch(tmp_path: Path, mlp_graph: Any, lava_python: Path) -> None:
    path = save_graph(mlp_graph(0), tmp_path / "net.graph.npz")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(worker.__file__).parent)!r})\n"
        "module = __import__('worker').load_graph_module()\n"
        f"graph = module.load_graph({str(path)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "print(sys.version_info[:2], int(graph.projections[0].weight.astype('int64').sum()))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([lava_python, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == f"(3, 10) {int(mlp_graph(0).projections[0].weight.sum())}".split()
