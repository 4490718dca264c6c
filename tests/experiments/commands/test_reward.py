"""`spikegate reward`: a reward model that `objective=reward` follows, and what it refuses."""

from __future__ import annotations

import json

import pytest

from sparse_update.data.tokens import ByteTokenizer
from sparse_update.objectives.preference.reward import RewardModel
from tests.experiments.console import document, spikegate
from tests.experiments.tasks.test_train_tasks import SMALL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = ["task=brackets", "task.tasks=[brackets:1]", *SMALL]
    spikegate("train", "objective=instruct", *words, "run=tuned", cwd=folder)
    return folder


def test_a_reward_model_of_a_runs_own_answers_is_followed(runs):
    done = spikegate("reward", "tuned", "model", "--prompts", "24", "--epochs", "1", "--json", cwd=runs)
    found = document(done.stdout)
    assert found["pairs"] > found["judged"] >= 10
    assert 0 <= found["accuracy_interval"][0] <= found["accuracy"] <= found["accuracy_interval"][1] <= 1
    model = RewardModel.load(runs / "model", ByteTokenizer())
    assert model.trunk.cfg.width == 16
    words = ["objective=reward", "task=brackets", "task.tasks=[brackets:1]", *SMALL, "objective.sample.new_tokens=4"]
    words += ["objective.reward.models=[model]", "objective.reward.watch_prompts=8", "init=tuned", "run=followed"]
    spikegate("train", *words, cwd=runs)
    assert "reward/proxy" in json.loads((runs / "followed" / "result.json").read_text())["task"]
    again = spikegate("reward", "tuned", "model", cwd=runs, check=False)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "m"], "nowhere is no run"),
        (["tuned", "m", "--prompts", "2"], "at least 8 questions"),
        (["tuned", "m", "--quality", "0"], "not both 0"),
        (["tuned", "m", "--lr", "0"], "lr = 0.0"),
    ],
)
def test_what_makes_no_reward_model_is_refused(runs, words, said):
    done = spikegate("reward", *words, cwd=runs, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (runs / "m").exists()
