"""Reinforcement by a learned reward in the training loop: what is followed, what is watched, and what the flag does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_update.data.tokens import BpeTokenizer, ByteTokenizer
from sparse_update.objectives.choice import make_objective
from sparse_update.objectives.preference.errors import PreferenceError, VocabularyMismatch
from sparse_update.objectives.preference.learned import ByReward
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.settings import RewardConfig
from sparse_update.objectives.preference.watch import Flag
from sparse_update.objectives.reinforcement.settings import RlConfig
from sparse_update.objectives.settings import ObjectiveConfig, SampleConfig
from sparse_update.tasks.base import END
from sparse_update.tasks.encoding import prompt_text
from sparse_update.transformer import ModelConfig, Transformer
from tests.sparse_update.objectives.house import MODEL, build, examples_of, model_of

SAMPLE = {"n": 4, "new_tokens": 4, "micro_rows": 8}
FLAG = Flag(3, 4, -0.1, 1e-6, 0.2, 1e-6)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    torch.manual_seed(5)
    model = RewardModel.of(Transformer(ModelConfig(**MODEL)), ByteTokenizer())
    torch.nn.init.normal_(model.reward.weight)
    return model.save(tmp_path_factory.mktemp("reward") / "model")


def made(folder, reward, steps=120, **settings):
    """A trainer of some phases: each token that is sampled costs a reference millisecond, an update ten."""
    examples = examples_of()
    cfg = ObjectiveConfig(
        kind="reward",
        sample=SampleConfig(**SAMPLE),
        rl=RlConfig(),
        reward=RewardConfig(**{"models": [str(reward)], "watch_prompts": 8, "watch_outputs": 2, **settings}),
    )
    stream = examples.prompts(4)
    trainer, reports = build(make_objective(cfg, examples), stream, examples, folder, steps=steps, evaluations=3)
    return trainer, reports, examples


def test_outputs_are_judged_by_the_reward_model_and_watched_by_the_verifier(tmp_path, reward):
    trainer, _, examples = made(tmp_path, reward)
    objective = trainer.updates.objective
    step = trainer.budget.step(0.0)
    objective.prepare(trainer.gate.next(4), step, 0.0)
    phase, model = objective.phase, RewardModel.load(reward)
    seen = 0
    for row in range(len(phase.reward_R)):
        start, end = int(phase.start_R[row]), int(phase.end_R[row])
        tokens = phase.tokens_RT1[row, :end].numpy()
        if (tokens[start:] < 128).all() and not (tokens[start : end - 1] == ord(END)).any():  # else the text is another
            assert float(phase.reward_R[row]) == pytest.approx(model.score([tokens])[0], abs=1e-4)
            seen += 1
    assert seen
    assert set(phase.true_R.tolist()) <= {0.0, 1.0}
    assert phase.reward_R.std() > 0
    assert any(key.startswith("score_rows") for key in objective.uses)
    found = objective.judge()
    assert {"reward/proxy", "reward/true", "reward/flagged"} <= set(found)
    assert found["reward/flagged"] == 0
    questions = objective._questions
    prompts = [prompt_text(question, "short") for question in questions]
    assert len(set(prompts)) == 8
    assert not {question.key for question in questions} & {q.key for qs in examples.judged.values() for q in qs}


def test_a_run_trains_and_its_record_has_both_rewards(tmp_path, reward):
    trainer, _, _ = made(tmp_path, reward)
    before = [p.clone() for p in trainer.updates.model.parameters()]
    result = trainer.run()
    assert result.finished
    assert "reward/true" in result.scores
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.updates.model.parameters(), strict=True))
    assert trainer.updates.objective.watch.seen >= 2


def test_a_raised_flag_holds_the_weights_where_that_is_asked_for(tmp_path, reward):
    for at_flag in ("hold", "go_on"):
        trainer, _, _ = made(tmp_path / at_flag, reward, at_flag=at_flag)
        trainer.updates.objective.watch.flag = FLAG
        before = [p.clone() for p in trainer.updates.model.parameters()]
        result = trainer.run()
        same = all(torch.equal(a, b) for a, b in zip(before, trainer.updates.model.parameters(), strict=True))
        assert same == (at_flag == "hold")
        assert (result.empty > 0) == (at_flag == "hold")
        assert result.scores["reward/flagged"] == 1


def test_what_was_watched_is_part_of_the_state(tmp_path, reward):
    trainer, _, _ = made(tmp_path / "a", reward)
    objective = trainer.updates.objective
    objective.judge()
    objective.watch.flag = FLAG
    other, _, _ = made(tmp_path / "b", reward)
    other.updates.objective.load_state_dict(objective.state_dict())
    assert other.updates.objective.watch.state_dict() == objective.watch.state_dict()
    assert other.updates.objective.watch.flag == FLAG


def test_several_models_are_an_ensemble_that_takes_the_least(tmp_path, reward):
    torch.manual_seed(6)
    second = RewardModel.of(model_of(), ByteTokenizer())
    torch.nn.init.normal_(second.reward.weight)
    folder = second.save(tmp_path / "second")
    trainer, _, _ = made(tmp_path / "run", reward, models=[str(reward), str(folder)])
    objective = trainer.updates.objective
    assert isinstance(objective, ByReward)
    questions = objective._questions[:5]
    found = objective.rewards(questions, ["1", "22", "3", "4", "5"], [True] * 5)
    rows = [
        np.frombuffer((prompt_text(question, "short") + text + END).encode(), dtype=np.uint8).astype(np.int64)
        for question, text in zip(questions, ["1", "22", "3", "4", "5"], strict=True)
    ]
    each = np.minimum(RewardModel.load(reward).score(rows), second.score(rows))
    assert found == pytest.approx(each.tolist(), abs=1e-5)


def test_a_reward_model_of_another_vocabulary_and_wrong_settings_are_refused(tmp_path, reward):
    text = [b"the cat sat on the mat and the dog sat on the log " * 4]
    bpe = BpeTokenizer.train(text, 270)
    other = RewardModel.of(model_of(vocab_size=270), bpe).save(tmp_path / "bpe")
    with pytest.raises(VocabularyMismatch, match="of kind 'bpe'"):
        made(tmp_path / "run", other)
    with pytest.raises(PreferenceError, match="is empty"):
        made(tmp_path / "none", reward, models=[])
    for bad in ({"rule": "best"}, {"at_flag": "stop"}, {"watch_prompts": 3}, {"watch_prompts": 0, "at_flag": "hold"}):
        with pytest.raises(PreferenceError):
            RewardConfig(**bad)
    with pytest.raises(PreferenceError):
        RewardConfig(alpha=0)
