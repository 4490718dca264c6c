"""`spikegate verify`, as a command: equal over N values, or the first divergence; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.commands import verify
from neuro.graph import save_graph
from neuro.simulators import fixed_point


@pytest.fixture
def files(tmp_path: Path, mlp_graph: Any, messages: Any) -> tuple[Path, Path]:
    graph = mlp_graph(0, False, (3, 4, 2))
    np.savez(tmp_path / "in.npz", **messages(graph, 0, 2, 5))
    return save_graph(graph, tmp_path / "net.graph.npz"), tmp_path / "in.npz"


@pytest.mark.lava
def test_graph_and_input_are_equal(
    files: tuple[Path, Path], lava_python: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", str(lava_python))
    assert verify.verify(files[0], input_path=files[1]) == 0
    out = capsys.readouterr().out
    values = 2 * 5 * (3 + 2 * 4 + 2 * 2)  # messages of three populations, what arrives at two
    assert f"net: equal over {values} values (Lava CPU against simulated (ours, lava))" in out
    last = json.loads(out.splitlines()[-1])
    assert (last["equal"], last["values"], last["graphs"]["net"]["first"]) == (True, values, None)


@pytest.mark.lava
def test_the_first_divergence_is_named(
    files: tuple[Path, Path], lava_python: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", str(lava_python))
    right = fixed_point.simulate

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        found.states["hidden"]["a_in"][0, 3, 1] += 7
        return found

    monkeypatch.setattr(fixed_point, "simulate", wrong)
    assert verify.verify(files[0], steps=5) == 1
    out = capsys.readouterr().out
    assert "1 of 75 values differ; first: population 'hidden', a_in, sample 0, step 3, neuron 1: expected " in out
    first = json.loads(out.splitlines()[-1])["graphs"]["net"]["first"]
    assert (first["population"], first["step"], first["neuron"]) == ("hidden", 3, 1)
    assert first["got"] == first["expected"] + 7


def test_what_it_refuses(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refused(code: int, text: str, *args: Any, **kwargs: Any) -> None:
        assert verify.verify(*args, **kwargs) == code
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.out == ""

    (tmp_path / "empty").mkdir()
    refused(2, "holds no *.graph.npz", tmp_path / "empty")
    refused(2, "does not exist", tmp_path / "none")
    refused(2, "is a folder; name one", tmp_path, input_path=files[1])
    refused(2, "--steps is 0", files[0], 0)
    refused(2, "--timeout is -1 s", files[0], timeout_s=-1)
    (tmp_path / "cut.graph.npz").write_bytes(files[0].read_bytes()[:100])
    refused(2, "not a readable graph file", tmp_path / "cut.graph.npz")
    np.savez(tmp_path / "wide.npz", x=np.full((1, 2, 3), 1000))
    refused(2, "input 'x' is 1000", files[0], input_path=tmp_path / "wide.npz")
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", "/nowhere/python")
    refused(1, "which is no program", files[0], 4)
    refused(1, "no Loihi board can be reached from this machine; missing:", files[0], 4, board=True)
