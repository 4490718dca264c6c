"""The study on learned objectives: what it asks of models, and what it concludes."""

from __future__ import annotations

import pytest
import torch

from experiments.runs.folder import RunError
from experiments.studies import learned_objective
from experiments.studies.learned_objective import ARMS, Study, compared
from experiments.studies.rewards.objectives import Knows, Questions, knows, learned_reward, pairs_of, run
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.objectives.preference.pairs import Annotator
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.tasks import END, make_task
from sparse_update.transformer import ModelConfig, Transformer

SHAPE = {"width": 16, "layers": 1, "heads": 2, "context": 64, "vocab_size": 256, "attention": "explicit"}


class Oracle:
    """Answers a countdown question by its reference three times of four, by another right expression else."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr("experiments.studies.rewards.objectives.sampled", self.sampled)

    def sampled(self, model, tokenizer, instances, n, new_tokens):
        texts = [[i.answer if k % 4 else f"({i.answer})" for k in range(n)] for i in instances]
        rows = [tokenizer.encode([(text + END).encode() for text in found]) for found in texts]
        return [tokenizer.encode([i.short.encode()])[0] for i in instances], rows, texts


@pytest.fixture
def trained_run(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    meta = {"model": SHAPE, "tokenizer": ByteTokenizer().record()}
    save_checkpoint(tmp_path / "run" / "checkpoint", model.state_dict(), {}, meta)
    return tmp_path / "run"


def test_what_a_model_knows_is_counted_over_its_answers(trained_run, monkeypatch):
    Oracle(monkeypatch)
    assert knows(trained_run, Questions(), 12, 8) == Knows(right=1.0, solved=1.0, different=2.0, reference=0.75)


def test_an_untrained_model_knows_nothing(trained_run):
    found = knows(trained_run, Questions(), 8, 4)
    assert found == Knows(0.0, 0.0, 0.0, 0.0)


def test_pairs_hold_a_right_answer_before_a_wrong_one(trained_run, monkeypatch):
    class Half(Oracle):
        def sampled(self, model, tokenizer, instances, n, new_tokens):
            prompts, _, texts = super().sampled(model, tokenizer, instances, n, new_tokens)
            texts = [[text if k % 2 else "0" for k, text in enumerate(found)] for found in texts]
            return prompts, [tokenizer.encode([(t + END).encode() for t in found]) for found in texts], texts

    Half(monkeypatch)
    pairs = pairs_of(None, ByteTokenizer(), Questions(), "train", 40, 0, Annotator(quality_weight=50.0))
    assert len(pairs) > 40
    wrong_first = [pair for pair in pairs if bytes(pair.chosen.astype(int).tolist()) == b"0" + END.encode()]
    assert not wrong_first


def test_a_reward_model_is_made_of_a_runs_own_answers(trained_run, tmp_path):
    found = learned_reward(trained_run, tmp_path / "reward", Questions(), 40, 0)
    assert found.pairs >= 10
    assert RewardModel.load(tmp_path / "reward", ByteTokenizer()).trunk.cfg.width == 16


def test_each_way_differs_in_its_objective_alone(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(learned_objective, "run", lambda folder, words: asked.__setitem__(folder.name, list(words)))
    study = Study(tmp_path, 2.0, 1.0, 8)
    monkeypatch.setattr(study, "reward", lambda seed: (tmp_path / "reward", {}))
    for name in ARMS:
        study.arm(name, 1e-3, 0, "held_out")
    ways = [set(asked[f"{name}-lr0.001-s0"]) for name in ARMS]
    shared = set.intersection(*ways)
    assert {"trainer.budget_reference_s=1.0", f"trainer.init_from={tmp_path / 'start-s0'}", "optim.lr=0.001"} <= shared
    assert not [word for word in ways[1] ^ ways[2] if not word.startswith(("objective", "arm="))]
    levels = Questions().levels
    assert all(level in make_task("countdown").levels for level in levels)


def test_a_comparison_says_by_how_many_points_and_how_sure():
    said = compared({"likelihood": [0.5, 0.52, 0.48], "verifier": [0.7, 0.73, 0.69], "learned": [0.4, 0.5, 0.45]})
    assert said[0].startswith("verifier solves more than likelihood: yes; +20.7 points")
    assert said[1].startswith("learned solves more than likelihood: no")
    assert "no test possible" in compared({"likelihood": [0.5], "verifier": [0.7], "learned": [0.4]})[0]


def test_a_run_that_fails_and_wrong_words_are_told(tmp_path, capsys):
    with pytest.raises(RunError, match="ended with 2"):
        run(tmp_path / "run", ["no_such_setting=1"])
    assert learned_objective.main(["--more", "0"]) == 2
    assert "positive" in capsys.readouterr().err
