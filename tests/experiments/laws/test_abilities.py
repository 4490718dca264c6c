"""Abilities over size: an exact match that jumps over a loss that does not, and runs that cannot tell."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.laws.abilities import abilities
from experiments.laws.points import LawError, read_points
from experiments.scale import main

SIZES = np.array([1e3, 2e3, 4e3, 8e3, 16e3, 32e3])


def solve(runs, solved) -> None:
    """Give each run the share that its loss stands for."""
    for folder in runs.iterdir():
        record = json.loads((folder / "result.json").read_text())
        record["task"] = {"task/accuracy": solved(record["loss_nats"])}
        (folder / "result.json").write_text(json.dumps(record))


def test_a_metric_of_many_tokens_makes_the_jump(write_runs, capsys):
    loss = np.linspace(1.0, 0.005, 6)  # even steps
    runs = write_runs(SIZES, np.full(6, 1e5), loss)
    write_runs(SIZES, np.full(6, 1e5), loss, seed=1)
    solve(runs, lambda nats: float(np.exp(-20 * nats)))
    able = abilities(read_points([runs]).points)
    assert able.loss_jump == pytest.approx(0.2)
    assert able.solved_jump == pytest.approx(1, abs=0.03)  # nearly all of it in the last step
    assert able.solved_jump_at == (16000, 32000)
    assert able.tokens == pytest.approx(20, rel=1e-2)
    assert able.off < 1e-3
    assert main(["abilities", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "the metric makes the jump" in out
    assert json.loads(out.splitlines()[-1])["sizes"][0]["runs"] == 2


def test_a_jump_of_the_loss_is_told_apart(write_runs):
    runs = write_runs(SIZES, np.full(6, 1e5), np.array([1.0, 0.99, 0.98, 0.1, 0.09, 0.08]))
    solve(runs, lambda nats: float(np.exp(-2 * nats)))
    assert "both jump" in abilities(read_points([runs]).points).verdict


def test_seeds_that_differ_more_than_sizes_are_no_answer(write_runs):
    runs = write_runs(SIZES, np.full(6, 1e5), np.linspace(1.0, 0.1, 6))
    write_runs(SIZES, np.full(6, 1e5), np.array([1.0, 0.8, 0.05, 0.5, 0.3, 0.1]), seed=1)
    solve(runs, lambda nats: float(np.exp(-2 * nats)))
    assert "no answer" in abilities(read_points([runs]).points).verdict


def test_runs_that_cannot_tell_are_refused(write_runs, capsys):
    runs = write_runs(SIZES, np.full(6, 1e5), np.linspace(1, 0.5, 6))
    with pytest.raises(LawError, match="no task/accuracy"):
        abilities(read_points([runs]).points)
    solve(runs, lambda nats: 0.0)
    with pytest.raises(LawError, match="equally able"):
        abilities(read_points([runs]).points)
    with pytest.raises(LawError, match="at least 3"):
        abilities(read_points([runs]).points[:2])
    assert main(["abilities", str(runs)]) == 2
    assert "equally able" in capsys.readouterr().err
