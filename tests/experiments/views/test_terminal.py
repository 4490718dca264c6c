"""Tables of commands on a terminal: no line is wider, nothing is lost, and elsewhere they are as they were."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.commands import account, compat
from experiments.runs.deployment import losses_text
from experiments.views.samples.tables import lines
from experiments.views.tables import drawn
from experiments.views.terminal import folded, in_lines
from neuro.graph import Population, Projection, SpikingGraph, save_graph

CELLS = st.text("abc ,xyz0123456789.-", max_size=60).map(lambda text: " ".join(text.split()))
ROWS = st.integers(2, 7).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=4))


def words(text: str) -> set[str]:
    return set(text.split())


@given(ROWS, st.integers(70, 160))
def test_every_cell_is_there_and_no_line_is_wider(rows: list[list[str]], width: int) -> None:
    header = [f"h{i}" for i in range(len(rows[0]))]
    text = drawn(folded(header, rows, width), width)
    assert max(map(len, text.splitlines())) <= width
    squeezed = re.sub(r"[\s-]", "", text)
    for cell in (*header, *(cell for row in rows for cell in row)):
        for word in cell.split():
            assert word[:20].replace("-", "") in squeezed  # a longer word may be broken


def model() -> object:
    import torch
    from torch import nn

    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU()]
    return nn.Sequential(*parts), torch.rand(1, 1, 4, 4)


def compat_command(folder: Path) -> list[str]:
    return ["tests.experiments.views.test_terminal:model", "--chip", "loihi2"]


def account_command(folder: Path) -> list[str]:
    lif = {"du": 0, "dv": 0, "vth": 4}
    graph = SpikingGraph(
        (Population("x", "input", 20), Population("h", "lif", 30, lif)),
        (Projection("w", "x", "h", "a_in", np.full((30, 20), 2)),),
        ("h",),
    )
    np.savez(folder / "in.npz", x=np.ones((2, 5, 20), dtype=int))
    return [str(save_graph(graph, folder / "net.graph.npz")), str(folder / "in.npz"), "--chip", "loihi2"]


@pytest.mark.parametrize(("main", "made"), [(compat.main, compat_command), (account.main, account_command)])
def test_the_commands_keep_to_the_terminal(
    main: Callable[[list[str]], int],
    made: Callable[[Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given_words = made(tmp_path)
    printed = {}
    for columns in ("80", "120", "0"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(given_words) == 0
        *shown, document = capsys.readouterr().out.splitlines()
        assert document.startswith("{")
        printed[columns] = shown
    assert max(map(len, printed["80"])) <= 80
    assert 80 < max(map(len, printed["120"])) <= 120 < max(map(len, printed["0"]))
    whole = words("\n".join(printed["0"]))
    lost = {word for word in whole - words("\n".join(printed["80"])) if len(word) < 20}
    assert not lost


def test_what_an_account_assumes_says_that_layers_are_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert account.main(account_command(tmp_path)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^cores +1 ", out, re.M)
    assert "no placement given" not in out
    assert "without a placement" not in out
    assert "two hops (the layers are placed on loihi2, and this profile is of another chip" in out


def test_deployments_keep_to_the_terminal() -> None:
    interval = {"mean": 1.23456, "low": -0.123456, "high": 1.345678}
    names = ("float", "quantised", "simulated")
    counts = ("synops_per_token", "mapped_macs_per_token", "events_per_token", "clipped_inputs", "saturations", "wraps")
    document = {f"loss_{name}_interval": interval for name in names} | {f"delta_{name}": interval for name in names}
    document |= dict.fromkeys(counts, 123456) | {"synops_fraction": 0.5, "mapped_mac_share": 0.5}
    text = in_lines(losses_text(document), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert words(text) == words(losses_text(document))
    one = {"value": 0.5, "low": 0.25, "high": 0.75, "method": "a method with a long name of many words in a row"}
    long = "a source with a long name of many words, a year, a journal and a page, so that no line holds it"
    deployment = {
        "metric": "accuracy", "accuracy": dict.fromkeys(names, one), "less_float": {"simulated": one},
        "agreement": {"simulated": 0.5}, "samples": 9, "source": long, "module": "a:b", "notes": [long],
        "model": "Sequential",
        "data": "digits", "route": "graded", "cores": 3, "chips": 1, "chip": "loihi2", "mapped_mac_share": 0.5,
        "synops_fraction": 0.5, "break_even": [{"sentence": long}],
        **dict.fromkeys(["macs_per_sample", "synops_per_sample", "events_per_sample", "neuron_updates_per_sample",
                         "time_steps_per_sample", "host_crossings_per_sample"], 12345),
        "energy": [{"profile": "loihi1_davies2018", "low_j": 1e-6, "mid_j": 2e-6, "high_j": 3e-6, "kind": "modelled",
                    "source": long, "labels": [], "unknown": []}],
    }  # fmt: skip
    shown = "\n".join(lines(deployment, 80))
    assert max(map(len, shown.splitlines())) <= 80
    plain = "\n".join(lines(deployment))
    assert max(map(len, plain.splitlines())) > 100
    assert words(plain) <= words(shown)
