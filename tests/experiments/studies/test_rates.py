"""`spikegate study rates`: the parabola against its closed form, the table, and a study that goes on where it stopped."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies import rates
from experiments.studies.rates import best_octave, main, summary

GRID = [0.005, 0.01, 0.02, 0.04, 0.08]


@settings(deadline=None)
@given(st.floats(math.log2(0.0075), math.log2(0.053)), st.floats(0.01, 2), st.floats(-3, 3))
def test_the_best_rate_of_a_parabola_is_its_lowest_point(at, curve, low):
    losses = {rate: low + curve * (math.log2(rate) - at) ** 2 for rate in GRID}
    assert best_octave(losses) == pytest.approx(at, abs=1e-6)


@pytest.mark.parametrize("losses", [{1: 3.0, 2: 2.0, 4: 1.0}, {1: 1.0, 2: 2.0, 4: 3.0}, {1: 1.0}])
def test_a_best_rate_at_an_end_is_none(losses):
    assert best_octave(losses) is None


def point(shape, rate, seed, loss):
    return {"shape": shape, "rate": rate, "seed": seed, "loss_nats": loss}


def test_shifts_are_octaves_from_the_first_shape_and_regret_is_what_its_rate_costs():
    points = []
    for seed, noise in ((0, 0.0), (1, 0.5)):
        for rate in (1, 2, 4, 8, 16):
            x = math.log2(rate)
            points += [
                point("3x64", rate, seed, (x - 2 - noise) ** 2),
                point("3x128", rate, seed, 0.5 * (x - 1 - noise) ** 2 - 1),
                point("9x64", rate, seed, -x),
            ]
    first, wide, deep = summary(points, ["3x64", "3x128", "9x64"])
    assert first["octaves"] == pytest.approx([0, 0])
    assert first["regret_nats"] == 0
    assert wide["octaves"] == pytest.approx([-1, -1])
    assert wide["octaves_interval"] == pytest.approx((-1, -1))
    assert wide["best_rate"] == pytest.approx(2**1.25)
    assert wide["regret_nats"] == pytest.approx((0.5 + 0.5 * 0.5**2 - 0.5 * 0.5**2) / 2)
    assert (deep["best_rate"], deep["at_an_end"], deep["octaves"]) == (None, 2, [])
    assert deep["regret_nats"] == pytest.approx(2)


WORDS = "--shapes 1x16,2x16 --rates 0.005,0.02,0.08 --seeds 3 --tokens 256 --batch-windows 2 --context 16 --eval-tokens 64"


def test_a_small_study_trains_every_point_once(tmp_path, capsys, monkeypatch):
    words = [*WORDS.split(), "--out", str(tmp_path / "rates")]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads(said[-1])
    assert (found["points"], [row["shape"] for row in found["rows"]]) == (6, ["1x16", "2x16"])
    one = json.loads((tmp_path / "rates" / "muon-2x16-r0.02-s3.json").read_text())
    assert (one["steps"], one["tokens"]) == (8, 256)
    assert 0 < one["reference_s"] < found["reference_s"]
    monkeypatch.setattr(rates, "train", lambda *a: pytest.fail("trained again"))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == found["rows"]
    assert main([*words, "--tokens", "512"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "3-64"], "is not LAYERSxWIDTH"),
        (["--shapes", "3x60"], "16 divides"),
        (["--tokens", "10"], "less than one step"),
        (["--seeds", ""], "at least one"),
        (["--rates", "0.1,x"], "could not convert"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, capsys, words, said):
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
