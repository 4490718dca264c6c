"""`spikegate import NET.net`, and what comes after it: simulate, place and account on the graph it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from neuro.exchange.netx import encode_input, load_netx, to_frames
from neuro.graph import identical, load_graph
from neuro.simulators.results import load_result
from tests.neuro.exchange.netx.netx_files import LOIHI, evaluate, even, write

STEPS = 24


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A small network for pictures of 6 by 8 points: convolution, pooling, dense, dense."""
    rng = np.random.default_rng(1)
    shape = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    layers: list[dict[str, Any]] = [
        {"type": "input", "shape": [1, 6, 8], "neuron": LOIHI, "weight": [40.0], "bias": [4.0]},
        {"type": "conv", "shape": [4, 6, 8], "weight": even(rng, (4, 1, 3, 3, 1)) + 20, "neuron": LOIHI, **shape},
        {"type": "pool", "shape": [4, 3, 4], "weight": np.full((1, 1, 2, 2), 16.0), "neuron": LOIHI},
        {"type": "flatten", "shape": [48, 1, 1]},
        {"type": "dense", "shape": [10], "weight": even(rng, (10, 48), 40) + 4, "neuron": LOIHI},
        {"type": "dense", "shape": [3], "weight": even(rng, (3, 10), 60) + 40, "neuron": LOIHI},
    ]
    return write(tmp_path / "net.net", layers)


def spikegate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, captured.err


def test_a_graph_is_imported_simulated_placed_and_accounted(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document, _ = spikegate(capsys, "import", net, "--reset-interval", STEPS)
    out = tmp_path / "net.graph.npz"
    assert (code, document["from"], document["populations"], document["outputs"]) == (0, "layers", 6, ["layer5"])
    graph = load_graph(out)
    assert identical(graph, load_netx(net, reset_interval=STEPS))

    pictures = np.random.default_rng(2).random((1, STEPS, 1, 6, 8))
    inputs = encode_input(graph, pictures)
    np.savez(tmp_path / "in.npz", **inputs)
    assert spikegate(capsys, "simulate", out, tmp_path / "in.npz", "--out", tmp_path / "out.npz")[0] == 0
    result = load_result(tmp_path / "out.npz")
    expected = evaluate(net, to_frames(graph, "input", inputs["input"])[0], STEPS, reset=STEPS)[5]
    np.testing.assert_array_equal(result.spikes["layer5"][0].numpy(), expected)
    assert expected.any()

    code, document, _ = spikegate(capsys, "place", out, "--chip", "loihi2")
    assert (code, document["chips"], len(document["cores"])) == (0, 1, 5)
    code, document, _ = spikegate(capsys, "account", out, tmp_path / "in.npz")
    assert code == 0
    assert document["chips"] == 1


@pytest.mark.parametrize(("damage", "expected", "text"), [("cut", 2, "cut short"), ("type", 1, "type 'maxpool'")])
def test_nothing_is_written_where_the_file_is_refused(
    damage: str, expected: int, text: str, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "cut":
        net.write_bytes(net.read_bytes()[:3000])
    else:
        write(net, [{"type": "input", "shape": [4]}, {"type": "maxpool", "shape": [2]}])
    code, _, error = spikegate(capsys, "import", net)
    assert code == expected
    assert text in error
    assert list(tmp_path.iterdir()) == [net]
    assert spikegate(capsys, "import", tmp_path / "other.net")[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 10), "--steps belongs to NIR files, and"),
        (("--messages", "in.npz"), "--messages belongs to NIR files, and"),
        (("--input-range", 0, 3), "--input-range belongs to NIR files, and"),
    ],
)
def test_options_of_other_files_are_refused_not_passed_over(
    net: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    code, _, error = spikegate(capsys, "import", net, *options)
    assert (code, list(net.parent.glob("*.npz"))) == (2, [])
    assert message in error


def test_a_shape_that_the_file_contradicts_is_refused(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = spikegate(capsys, "import", net, "--input-shape", 2, 6, 8)
    assert code == 1
    assert "(2, 6, 8), and layer 0 (input) has (1, 6, 8); leave input_shape out" in error
    assert spikegate(capsys, "import", net, "--input-shape", 1, 6, 8)[0] == 0
