"""Our step of reinforcement against GRPO written out, and the bench beside TRL where its environment is."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from experiments import bench
from experiments.benches.reinforcing.command import compared
from experiments.benches.reinforcing.ours import Ours, tuned
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.objectives.examples.rows import prompt_tokens
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.transformer import ModelConfig
from tests.environments import python_of

TASK = TaskConfig(tasks=["sums:1"], form="short", judged=8, new_tokens=4)
SHAPE = ModelConfig(width=32, layers=1, heads=2, context=32, vocab_size=256, attention="explicit")


def test_a_step_is_that_of_the_published_loss():
    """GRPO as it is written: every output one by one, all of them, the ratio 1 at the first step."""
    model, examples = tuned(SHAPE, TASK, 200)
    before = copy.deepcopy(model)
    rows = examples.prompts(4).rows(torch.arange(6))
    prompts = [prompt_tokens(examples.tokenizer, found[0], "short") for found in rows.instances]
    answers = [found[0].answer for found in rows.instances]
    ours = Ours(model, examples, GenerateConfig(new_tokens=4, n=5, temperature=1.0), lr=1e-3)
    reward, tokens = ours.step(prompts, answers)

    outputs = Sampler(before, ours.generate, examples.stop).sample(prompts, list(range(6)))
    assert tokens == outputs.lengths_R.sum()
    scores = np.array([float(examples.text(row).strip() == answers[i // 5]) for i, row in enumerate(outputs)])
    assert reward == scores.mean()
    assert 0 < reward < 1
    loss = torch.zeros(())
    for prompt in range(6):
        group = scores[prompt * 5 : prompt * 5 + 5]
        for number in range(5):
            output = list(outputs)[prompt * 5 + number]
            text = torch.from_numpy(np.concatenate((prompts[prompt], output)))
            logp = torch.log_softmax(before(text[None, :-1])[0], -1).gather(1, text[1:, None])[len(prompts[prompt]) - 1 :]
            advantage = (group[number] - group.mean()) / (group.std(ddof=1) + 1e-4)
            loss = loss - ((logp - logp.detach()).exp() * advantage).mean() / 30
    loss.backward()
    torch.nn.utils.clip_grad_norm_(before.parameters(), 1.0)
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-3)
        assert not torch.equal(mine, theirs)  # a step was taken


def test_rewards_are_compared_step_by_step():
    theirs = np.random.default_rng(0).random(40)
    alike = compared(list(theirs + np.tile([0.1, -0.1], 20)), list(theirs))
    assert alike["alike"]
    assert alike["difference"] == pytest.approx(0, abs=1e-12)
    better = compared(list(theirs + 0.05 + np.tile([0.01, -0.01], 20)), list(theirs))
    assert not better["alike"]
    assert better["low"] == pytest.approx(0.05 - 2 * 0.01 * (40 / 39) ** 0.5 / 40**0.5)


def test_without_its_environment_it_says_how_to_get_one(monkeypatch, capsys):
    monkeypatch.setenv("SPIKEGATE_TRL_PYTHON", "/nowhere/python")
    assert bench.main(["reinforcement"]) == 2
    assert "`make trl` makes it" in capsys.readouterr().err


def test_beside_trl(capsys, tmp_path):
    python_of("SPIKEGATE_TRL_PYTHON", ".venv-trl", "trl")
    words = ["--tune", "30", "--rounds", "2", "--prompts", "4", "--n", "4", "--new-tokens", "4", "--json"]
    assert bench.main(["reinforcement", *words, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["speed"]["rounds"] == 2
    assert len(found["steps"]["trl"]) == len(found["steps"]["ours"]) == 3
    assert all(4 * 4 <= step["tokens"] <= 4 * 4 * 4 for steps in found["steps"].values() for step in steps)
