"""Rules over outputs against counting by hand, choices on development questions; from run folders to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments import study
from experiments.runs.plain_json import write_json
from experiments.studies.inference.answers import Answered
from experiments.studies.inference.compared import chosen, difference, points, verdicts
from experiments.studies.inference.figure import frontier
from experiments.studies.inference.rules import Outcome, greedy, likeliest, rules, surprised, verified, voted
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.generation.counting import needed_flops
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.transformer import ModelConfig, Transformer

CFG = ModelConfig(width=32, layers=1, heads=2, context=48, vocab_size=256)
ASKED = Answered(
    np.array([5, 7]), np.array([0.0, 1.0]), np.array([3, 2]), ["9", "4"], np.array([2.0, 0.1]),
    np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), np.array([[2, 3, 4], [2, 2, 5]]),
    np.array([[-3.0, -1.0, -2.0], [-2.0, -2.5, -1.0]]),
    [["8", "9", "8"], ["4", "4", "7"]],
)  # fmt: skip


def cost(prompt, lengths):
    return needed_flops(CFG, prompt, lengths)


def test_what_rules_take_and_cost():
    found = greedy(CFG, ASKED)
    assert found.flops_Q.tolist() == [cost(5, [3]), cost(7, [2])]
    found = voted(3, 1.0, CFG, ASKED)
    assert found.score_Q.tolist() == [1.0, 1.0]
    assert found.flops_Q.tolist() == [cost(5, [2, 3, 4]), cost(7, [2, 2, 5])]
    found = voted(3, 0.8, CFG, ASKED)  # two alike: 7/8 sure
    assert found.outputs_Q.tolist() == [3, 2]
    found = verified(3, CFG, ASKED)  # greedy is wrong, the first sample is right; greedy is right
    assert found.score_Q.tolist() == [1.0, 1.0]
    assert found.flops_Q.tolist() == [cost(5, [3, 2]), cost(7, [2])]
    found = likeliest(3, CFG, ASKED)
    assert found.score_Q.tolist() == [0.0, 0.0]
    assert found.flops_Q.tolist() == [cost(5, [2, 3, 4]), cost(7, [2, 2, 5])]
    found = surprised(2, 1.0, CFG, ASKED)  # the first is surprising: 9, 8, 9
    assert found.score_Q.tolist() == [0.0, 1.0]
    assert found.flops_Q.tolist() == [cost(5, [3, 2, 3]), cost(7, [2])]
    assert found.outputs_Q.tolist() == [3, 1]
    assert set(rules(3, ASKED)) == {"greedy", "majority", "vote that stops", "by surprise", "likeliest", "verifier"}


def outcome(score, flops):
    return Outcome(np.full(100, score), np.full(100, float(flops)), np.ones(100))


def test_settings_are_chosen_on_development_and_read_on_held_out():
    development = {
        "greedy": {"": [outcome(0.2, 1)]},
        "vote": {"a": [outcome(0.5, 4)], "b": [outcome(0.5, 3)], "c": [outcome(0.9, 20)]},
    }
    held_out = {
        "greedy": {"": [outcome(0.2, 1)]},
        "vote": {"a": [outcome(0.6, 4)], "b": [outcome(0.4, 3)], "c": [outcome(0.9, 20)]},
    }
    large = {"greedy": {"": [outcome(0.3, 10)]}}
    assert chosen(development, "vote", 10) == "b"
    assert chosen(development, "vote", 2) is None
    vote = next(one for one in verdicts((development, held_out), (large, large), ("s", "l")) if one["family"] == "vote")
    assert (vote["setting"], vote["reached"], vote["beaten"]) == ("b", True, True)
    assert vote["difference"] == pytest.approx(0.1)
    assert [point.setting for point in frontier(points(held_out))] == ["", "b", "a", "c"]


def test_the_interval_of_a_difference_holds_what_drew_it():
    """Shares 0.5 and 0.6 over 400 questions and three seeds each."""
    inside = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        one = np.ones(400)
        sides = [[Outcome((rng.random(400) < p).astype(float), one, one) for _ in range(3)] for p in (0.6, 0.5)]
        _, low, high = difference(*sides)
        inside += low <= 0.1 <= high
    assert inside >= 53


def made_run(folder, seed, **shape):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{"heads": 2, "context": 48, "vocab_size": 256, "attention": "explicit", **shape}))
    tokenizer = ByteTokenizer()
    task = {"tasks": ["sums:1", "brackets:1"], "form": "short", "new_tokens": 3}
    meta = {"config": {"task": task}, "model": vars(model.cfg), "tokenizer": tokenizer.record(), "step": 1}
    save_checkpoint(folder / "checkpoint", model.state_dict(), {}, meta)
    write_json(folder / "run.json", {"kind": "train", "status": "finished", "seed": seed})
    return str(folder)


def test_from_runs_to_a_picture(tmp_path, capsys):
    small = [made_run(tmp_path / f"s{seed}", seed, name="s", width=16, layers=1) for seed in (0, 1)]
    large = made_run(tmp_path / "l", 0, name="l", width=32, layers=1)
    words = ["--n", "4", "--questions", "5", "--out", str(tmp_path / "out"), "--json"]
    assert study.main(["inference", *small, large, *words]) == 0
    found = json.loads((tmp_path / "out" / "inference.json").read_text())
    assert {(one["task"], one["small"]) for one in found["verdicts"]} == {("sums", "s"), ("brackets", "s")}
    assert (tmp_path / "out" / "inference.png").stat().st_size > 10_000
    assert "| sums | s for l | majority |" in (tmp_path / "out" / "inference.md").read_text()
    capsys.readouterr()
    for given, message in (
        ([small[0], small[1]], "runs of one size"),
        ([small[0], large, "--n", "1"], "--n is at least 2"),
        ([small[0], small[0], large], "two runs of the same size and seed"),
        ([str(tmp_path / "none"), large], "none"),
    ):
        assert study.main(["inference", *given]) == 2
        assert message in capsys.readouterr().err
