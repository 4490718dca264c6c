"""`spikegate study pictures` in small: all of the network is mapped, and dense matrices cost what torch counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neuro
from experiments import study
from experiments.runs.samples.dense import dense_equivalent
from experiments.samples.networks import Foreteller, ResidualCNN
from experiments.studies.pictures import summary
from tests.experiments.console import document as printed

SMALL = ["pictures", "--seeds", "0", "--routes", "graded", "--epochs", "1", "--train", "300", "--eval", "40"]


def test_the_study_in_small(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert study.main([*SMALL, "--no-progress", "--out", str(out)]) in (0, 1)
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert printed(shown)["data"] == "digits"
    (row,), (route,) = found["rows"], found["routes"]
    assert row["mapped_mac_share"] == 1
    assert row["samples"] == 40
    assert row["agreement"]["simulated"] >= 0.9
    assert route["holds"] == (abs(route["lost"][0]) <= 0.005 or route["lost"][0] < 0) == found["holds"]
    assert row["cores"] < row["as_dense"]["cores"]["dense"]
    assert row["as_dense"]["synops_per_sample"]["own"] == pytest.approx(row["synops_per_sample"], rel=0.3)
    assert "| graded | 100.0% |" in shown


@pytest.mark.parametrize(("words", "message"), [(["--routes", "magic"], "magic"), (["--batch", "0"], "at least 1")])
def test_wrong_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["pictures", *words]) == 2
    assert message in capsys.readouterr().err


def test_dense_matrices_are_counted_as_torch_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()
    x = torch.randn(5, 2, 6, 6).round(decimals=1)
    x[x.abs() < 0.5] = 0
    plan = neuro.convert(model, neuro.calibrate(model, [x]), neuro.analyse(model, x[:1], tokens=1))
    simulated = neuro.deploy(model, plan)
    simulated(x)
    found = dense_equivalent(simulated, x, [c for c in simulated.counts() if not c.host], "loihi2")
    sent = (x != 0).float()
    as_convolution = float(F.conv2d(sent, torch.ones(3, 2, 3, 3), padding=1, stride=2).sum()) / 5
    as_matrix = float(sent.sum()) * 27 / 5
    assert found.synops["dense"] - found.synops["own"] == pytest.approx(as_matrix - as_convolution)
    assert found.energy_j["dense"][1] > found.energy_j["own"][1] > 0
    assert found.cores["own"] == found.cores["dense"]  # so small a layer takes a core either way


def test_a_route_holds_by_what_it_lost_on_the_mean() -> None:
    def row(lost: float, mapped: float = 1.0) -> dict[str, object]:
        return {
            "route": "rate", "mapped_mac_share": mapped, "less_float": {"simulated": {"value": -lost}}, "cores": 1,
            "accuracy": {"float": {"value": 0.9}, "simulated": {"value": 0.9 - lost}}, "synops_per_sample": 1,
            "events_per_sample": 1,
            "as_dense": {"energy_j": {"own": [0, 1, 2], "dense": [0, 1, 2]}, "cores": {"dense": 1},
                         "synops_per_sample": {"dense": 1}},
        }  # fmt: skip

    (found,) = summary([row(0.01), row(0.03), row(0.02)])
    assert found["holds"]
    assert found["lost"][0] == pytest.approx(0.02)
    assert found["lost"][1] < 0.02 < found["lost"][2]
    assert not summary([row(0.01), row(0.04)])[0]["holds"]
    assert not summary([row(0.0, 0.94)])[0]["holds"]


def test_the_networks_have_the_shapes_they_name() -> None:
    assert ResidualCNN(28, stride=2)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    x = torch.zeros(1, 30, 1)
    x[0, 12] = 1
    out = Foreteller()(x)[0, :, 0]
    assert out.shape == (30,)
    assert torch.equal(out[:12], out[:1].expand(12))  # nothing is foretold from what comes later
    assert not torch.equal(out[12], out[11])
