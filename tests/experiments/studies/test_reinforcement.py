"""The study of reinforcement: small runs, what is kept of them, and the comparison of arms."""

from __future__ import annotations

import json

import pytest

from experiments.studies.reinforcement import ARMS, compared, main

SMALL = "sums --judged 8 --tune-s 0.1 --budget-s 0.3"


def test_a_study_makes_what_is_missing(tmp_path, capsys):
    words = [*SMALL.split(), "--arms", "none,surprise/2,instruct", "--seeds", "1", "--out", str(tmp_path), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["accuracy"]) == {"none", "surprise/2", "instruct"}
    record = json.loads((tmp_path / "sums" / "surprise-2-1.json").read_text())
    assert record["reference_s"] == pytest.approx(0.15, abs=0.06)
    assert record["notes"]["rl/candidates"] >= 4 * record["notes"]["rl/groups"]
    assert 0 < record["beside_steps_s"] < record["reference_s"]
    assert [point[0] for point in record["curve"]] == sorted(point[0] for point in record["curve"])
    record["accuracy"] = 0.75
    (tmp_path / "sums" / "surprise-2-1.json").write_text(json.dumps(record))
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["accuracy"]["surprise/2"] == pytest.approx(document["accuracy"]["surprise/2"] + 0.75, abs=0.2)
    assert again["accuracy"]["none"] == document["accuracy"]["none"]


def test_arms_are_compared_by_seed():
    def runs(*accuracy):
        return [{"accuracy": value} for value in accuracy]

    found = compared(
        {"none": runs(0.80, 0.82, 0.84), "surprise/2": runs(0.85, 0.86, 0.90), "instruct": runs(0.9, 0.9, 0.9)}
    )
    gained = found["surprise/2 over none"]
    assert gained["gain"] == pytest.approx(0.05)
    assert gained["low"] < 0.05 < gained["high"]
    assert gained["p"] < 0.05 < found["none over instruct"]["p"]


def test_an_unknown_arm_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*SMALL.split(), "--arms", "best"])
    assert ", ".join(ARMS) in capsys.readouterr().err
