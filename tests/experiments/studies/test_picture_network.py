"""The residual network of pictures on every route: the bars of the accuracies hold, the document says what was measured."""

from __future__ import annotations

import pytest
import torch

from experiments.studies import picture_network
from tests.experiments.console import document as printed


def test_digits_keep_their_accuracy_on_every_route(capsys):
    torch.set_num_threads(1)
    words = ["--epochs", "8", "--held-out", "150", "--steps", "24", "--json"]
    code = picture_network.main(words)
    found = printed(capsys.readouterr().out)
    assert code == 0
    assert found["holds"] is True
    assert [route["route"] for route in found["routes"]] == ["graded", "sigma_delta", "rate"]
    for route in found["routes"]:
        assert route["float_accuracy"] >= 0.95
        assert (route["mapped"], route["host_crossings"]) == (1.0, 2.0)
        assert route["cores"] * 10 < route["dense_cores"]
        assert route["synops"] * 5 < route["dense_synops"]
        assert route["joules"] * 3 < route["dense_joules"]
    graded, _, rate = found["routes"]
    assert graded["accuracy"] == graded["quantised"]
    assert rate["joules"] > graded["joules"]


def test_wrong_words_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        picture_network.main(["--epochs", "0"])
    assert "--epochs is 0; the lowest is 1" in capsys.readouterr().err
