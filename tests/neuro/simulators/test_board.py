"""The road to a board, up to the extension that only Intel's partners have: against a stand-in that checks its use.

The stand-in (board_standin/) holds the modules of the Lava-Loihi extension that are used, over Lava's models on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hardware import BoardUnavailable, interpreters
from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.board import compare_shifted, run_on_board
from neuro.simulators.lava.client import LavaRoute, LavaUnsupported

STANDIN = Path(__file__).with_name("board_standin")
TABLE = "NODELIST NODES PARTITION STATE\nog-1 1 oheogulch* idle\nog-2 1 kp down*\n"


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lava_python: Path) -> Path:
    """An environment with the stand-in, a fake SLURM and a fake network; returns the stand-in's folder of notes."""
    (tmp_path / "bin").mkdir()
    notes = tmp_path / "notes"
    notes.mkdir()
    executable(
        tmp_path / "bin/sinfo",
        f"if [ \"$1\" = -N ]; then printf '{TABLE}'; else printf 'PARTITION AVAIL\\noheogulch* up 1 1 idle og-1\\n'; fi",
    )
    executable(tmp_path / "bin/ping", 'echo "1 received"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SPIKEGATE_LAVA_PYTHON", str(lava_python))
    monkeypatch.setenv("SPIKEGATE_LAVA_PATH", str(STANDIN))
    monkeypatch.setenv("SPIKEGATE_STANDIN_FOLDER", str(notes))
    ours = {"SPIKEGATE_STANDIN_FOLDER", "SPIKEGATE_STANDIN_FAULT"}  # of the stand-in, which no board knows
    monkeypatch.setattr(interpreters, "KEPT", interpreters.KEPT | ours)
    monkeypatch.setenv("LOIHI_GEN", "N3B3")
    for key in ("BOARD", "PARTITION", "NXSDKHOST", "HOST_BINARY", "SLURM", "NOSLURM"):
        monkeypatch.delenv(key, raising=False)
    return notes


def small(kind: str = "lif", **params: int) -> tuple[SpikingGraph, dict[str, np.ndarray]]:
    """x -> a -> b with a loop on a, and 12 steps of input."""
    rng = np.random.default_rng(3)
    neuron = {"du": 300, "dv": 200, "vth": 20, "bias_mant": 9, "bias_exp": 3}

    def weight(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-60, 90, shape)

    graph = SpikingGraph(
        (Population("x", "input", 4), Population("a", "lif", 6, neuron), Population("b", kind, 3, params or neuron)),
        (
            Projection("w1", "x", "a", "a_in", weight(6, 4), 1),
            Projection("loop", "a", "a", "a_in", weight(6, 6), 0),
            Projection("w2", "a", "b", "a_in", weight(3, 6), 1),
        ),
        ("b",),
    )
    return graph, {"x": rng.integers(0, 2, (1, 12, 4))}


@pytest.mark.lava
def test_a_board_run_by_slurm_is_compared_and_profiled(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARD", "og-1")
    graph, inputs = small()
    found = run_on_board(graph, inputs, record=("spikes", "u", "v"), timeout_s=60)
    assert found.activity.ran_on == "Loihi board og-1 (N3B3)"
    assert found.activity.mode == ""
    assert found.comparison.equal, str(found.comparison)
    assert found.comparison.values == 12 * (6 + 3) * 3
    assert found.comparison.skipped == ("x.spikes",)
    assert torch.count_nonzero(found.activity.spikes["b"]) > 0
    assert found.offset == 0
    assert found.profile["power"] == {
        "total_w": [1.5, 1.25],
        "static_w": 1.0,
        "vdd_w": [0.5, 0.25],
        "vddm_w": [0.5, 0.5],
        "vddio_w": None,
    }
    assert found.profile["time"]["mean_step_us"] == 5.5
    assert found.profile["activity"]["synops"] == [120.0]
    route = json.loads((site / "route.json").read_text())
    assert (route["SLURM"], route["BOARD"], route["LOIHI_GEN"], route["NOSLURM"]) == ("1", "og-1", "N3B3", None)


@pytest.mark.lava
def test_a_board_run_by_ethernet_names_the_first_divergence(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXSDKHOST", "10.0.0.2")
    monkeypatch.setenv("HOST_BINARY", "nxcore/bin/nx_driver_server")
    monkeypatch.setenv("SPIKEGATE_STANDIN_FAULT", "drift")  # one potential is one more at step 4
    graph, inputs = small()
    found = run_on_board(graph, inputs, record=("spikes", "v"), timeout_s=60)
    assert found.activity.ran_on == "Loihi board 10.0.0.2 (N3B3)"
    first = found.comparison.first
    assert first is not None
    assert (first.variable, first.step, first.neuron, first.got) == ("v", 4, 0, first.expected + 1)
    route = json.loads((site / "route.json").read_text())
    assert (route["NOSLURM"], route["NXSDKHOST"], route["SLURM"]) == ("1", "10.0.0.2", None)


@pytest.mark.lava
def test_what_has_no_model_for_a_neuro_core_is_refused_and_not_run_on_a_cpu(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARTITION", "oheogulch")
    graph, inputs = small("graded", vth=3)
    with pytest.raises(LavaUnsupported, match=r"population 'b' \(graded\): the Loihi extension has no model of it"):
        run_on_board(graph, inputs, timeout_s=60)


@pytest.mark.lava
def test_without_a_board_one_error_lists_what_is_missing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = small()
    monkeypatch.delenv("LOIHI_GEN")
    monkeypatch.setenv("BOARD", "og-2")
    with pytest.raises(BoardUnavailable) as caught:
        run_on_board(graph, inputs)
    assert [check.name for check in caught.value.report.missing] == ["LOIHI_GEN", "board"]
    assert "og-2: down*" in str(caught.value)
    assert "placement fits" in [check.name for check in caught.value.report.checks if check.present]


def test_what_cannot_be_read_from_a_board_is_refused_first() -> None:
    graph, inputs = small()
    with pytest.raises(LavaUnsupported, match=r"a\.a_in cannot be read from a board"):
        run_on_board(graph, inputs, record=("a.a_in",))


@pytest.mark.lava
def test_the_extension_s_own_text_is_in_the_error(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARD", "og-1")
    executable(site.parent / "bin/sinfo", f"[ -e {site}/asked ] && exit 1; : > {site}/asked; printf '{TABLE}'")
    graph, inputs = small()
    with pytest.raises(LavaRoute, match="SLURM controller is not available"):
        run_on_board(graph, inputs, timeout_s=60)


def test_a_shift_by_a_step_or_two_is_found_and_named() -> None:
    graph, inputs = small()
    ours = simulate(graph, inputs)
    late = {name: torch.roll(value, 2, dims=1) for name, value in ours.spikes.items()}
    comparison, offset = compare_shifted(ours, type(ours)(late, {}, 1, 12, "Loihi board og-1 (N3B3)"), 3)
    assert (comparison.equal, offset) == (True, 2)
    assert compare_shifted(ours, ours, 3)[1] == 0
    other: Any = {name: 1 - value for name, value in ours.spikes.items()}
    comparison, offset = compare_shifted(ours, type(ours)(other, {}, 1, 12, "?"), 3)
    assert (comparison.equal, offset) == (False, 0)
