"""Reward models: what they read, what they learn from pairs, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sparse_update.data.tokens import BpeTokenizer, ByteTokenizer
from sparse_update.loop.checkpoint import CheckpointDamaged, CheckpointError, save_checkpoint
from sparse_update.objectives.preference.errors import PreferenceError, VocabularyMismatch
from sparse_update.objectives.preference.pairs import Annotator, Pair, sampled_pairs
from sparse_update.objectives.preference.reward import RewardModel, check_vocabulary, padded
from sparse_update.objectives.preference.rewards import Ensemble, Learned, WithoutLength
from sparse_update.objectives.preference.training import FitConfig, bradley_terry_loss, fit_reward
from sparse_update.tasks.encoding import PromptTooLong
from sparse_update.transformer import ModelConfig, Transformer

BYTES = ByteTokenizer()


def small(seed=0, vocab=256, context=32):
    torch.manual_seed(seed)
    cfg = ModelConfig(width=16, layers=2, heads=2, context=context, vocab_size=vocab, attention="explicit")
    model = Transformer(cfg)
    for name, p in model.named_parameters():
        if name.endswith(("attn.o.weight", "mlp.fc2.weight")):
            torch.nn.init.normal_(p, std=0.2)
    return model


def rewarding(seed=0):
    model = RewardModel.of(small(seed), BYTES)
    torch.nn.init.normal_(model.reward.weight, generator=torch.Generator().manual_seed(seed))
    return model


def row(text):
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def test_a_reward_is_read_after_the_last_token_alone_whatever_is_padded():
    model = rewarding()
    rows = [row("abc"), row("hello world"), row("x")]
    together = model.score(rows)
    for number, one in enumerate(rows):
        alone = model.reward(model.trunk.hidden(torch.from_numpy(one)[None])[0, -1])
        assert together[number] == pytest.approx(float(alone.detach()), abs=1e-5)
    tokens, lengths = padded(rows)
    tokens[0, 3:] = 77  # behind the row
    assert torch.allclose(model(tokens, lengths).double().detach(), torch.from_numpy(together), atol=1e-5)


def test_the_loss_of_a_pair_is_the_negative_log_likelihood_of_bradley_and_terry():
    chosen, rejected = torch.tensor([0.3, -2.0, 5.0]).double(), torch.tensor([1.0, -2.0, -5.0]).double()
    expected = -torch.log(chosen.exp() / (chosen.exp() + rejected.exp()))
    assert torch.allclose(bradley_terry_loss(chosen, rejected), expected)


def test_fitting_finds_the_strengths_that_pairs_were_drawn_by():
    strength = {"a": 1.5, "b": 0.5, "c": -0.5, "d": -1.5}
    generator = np.random.default_rng(0)
    pairs = []
    for _ in range(1000):
        first, second = generator.choice(list(strength), 2, replace=False)
        wins = generator.random() < 1 / (1 + np.exp(strength[second] - strength[first]))
        chosen, rejected = (first, second) if wins else (second, first)
        pairs.append(Pair(row("q"), row(chosen), row(rejected)))
    model = RewardModel.of(small(), BYTES)
    losses = fit_reward(model, pairs, FitConfig(epochs=12, batch_pairs=128, lr=1e-2, weight_decay=0.0))
    found = model.score([row("q" + answer) for answer in strength])
    assert losses[-1] < losses[0] < np.log(2) * 1.02
    # The likelihood's own optimum over four strengths, by Newton's method on the counts.
    wins = np.zeros((4, 4))
    index = {answer: i for i, answer in enumerate(strength)}
    for pair in pairs:
        wins[index[chr(pair.chosen[0])], index[chr(pair.rejected[0])]] += 1
    best = np.zeros(4)
    for _ in range(50):
        p = 1 / (1 + np.exp(best[None] - best[:, None]))
        gradient = wins.sum(1) - ((wins + wins.T) * p).sum(1)
        weight = (wins + wins.T) * p * (1 - p)
        hessian = np.diag(weight.sum(1)) - weight
        best += np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    assert found - found.mean() == pytest.approx(best - best.mean(), abs=0.15)


def test_calibrating_sets_mean_and_deviation_over_the_rows_that_it_is_given():
    model = rewarding()
    rows = [row(text) for text in ("abc", "zz", "hello", "1+1=2")]
    before = model.score(rows)
    model.calibrate(rows)
    after = model.score(rows)
    assert after.mean() == pytest.approx(0, abs=1e-5)
    assert after.std() == pytest.approx(1, abs=1e-5)
    assert np.argsort(after).tolist() == np.argsort(before).tolist()
    with pytest.raises(PreferenceError, match="equal rewards"):
        model.calibrate([row("abc")] * 3)


def test_a_saved_model_gives_the_same_rewards_and_holds_no_pickle(tmp_path):
    model = rewarding()
    rows = [row("abc"), row("zz")]
    model.calibrate(rows)
    model.save(tmp_path / "reward", {"pairs": 12})
    found = RewardModel.load(tmp_path / "reward", BYTES)
    assert found.score(rows).tolist() == model.score(rows).tolist()
    assert not found.training
    assert sorted(path.suffix for path in (tmp_path / "reward").iterdir()) == [".json", ".safetensors", ".safetensors"]
    assert json.loads((tmp_path / "reward" / "meta.json").read_text())["pairs"] == 12


def test_a_reward_model_of_another_vocabulary_is_refused(tmp_path):
    text = [b"the cat sat on the mat and the dog sat on the log " * 4]
    bpe = BpeTokenizer.train(text, 270)
    RewardModel.of(small(vocab=270), bpe).save(tmp_path / "bpe")
    with pytest.raises(VocabularyMismatch, match="270 tokens of kind 'bpe', the policy writes 256 of kind 'bytes'"):
        RewardModel.load(tmp_path / "bpe", BYTES)
    other = BpeTokenizer.train([b"a quick brown fox jumps over a lazy dog and runs off " * 4], 270)
    with pytest.raises(VocabularyMismatch, match="with other merges"):
        RewardModel.load(tmp_path / "bpe", other)
    check_vocabulary(RewardModel.load(tmp_path / "bpe"), bpe)
    with pytest.raises(VocabularyMismatch, match="tokenizer 270"):
        RewardModel.of(small(), bpe)
    with pytest.raises(VocabularyMismatch, match="token 300"):
        rewarding().score([np.array([5, 300])])
    with pytest.raises(VocabularyMismatch, match="members"):
        Ensemble([rewarding(), RewardModel.of(small(vocab=270), bpe)])


def test_what_is_no_reward_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "run", small().state_dict(), {}, {"step": 3})
    with pytest.raises(CheckpointError, match="no reward model"):
        RewardModel.load(tmp_path / "run")
    rewarding().save(tmp_path / "reward")
    weights = tmp_path / "reward" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointDamaged):
        RewardModel.load(tmp_path / "reward")
    model = rewarding()
    save_checkpoint(tmp_path / "odd", model.state_dict(), {}, {"kind": "reward_model", "model": {"width": "wide"}})
    with pytest.raises(CheckpointError, match="does not hold"):
        RewardModel.load(tmp_path / "odd")


def test_rows_that_cannot_be_scored_are_refused():
    with pytest.raises(PreferenceError, match="row 1 is empty"):
        rewarding().score([row("a"), row("")])
    with pytest.raises(PromptTooLong, match="33 tokens, the reward model reads 32"):
        rewarding().score([row("a" * 33)])
    with pytest.raises(PreferenceError, match="no pairs"):
        fit_reward(rewarding(), [], FitConfig())
    with pytest.raises(PreferenceError, match="epochs = 0"):
        FitConfig(epochs=0)


def test_annotators_prefer_with_the_probability_that_their_utilities_say():
    annotator = Annotator(quality_weight=2.0, length_weight=0.5, longest=6)
    utility = annotator.utility(np.array([1.0, 0.0, 0.0]), np.array([2, 6, 60]))
    assert utility.tolist() == [3.0, 3.0, 3.0]
    first, second = np.full(20_000, 1.2), np.full(20_000, 0.2)
    share = annotator.prefers(first, second, np.random.default_rng(0)).mean()
    assert share == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.012)  # four deviations
    with pytest.raises(PreferenceError, match="not both 0"):
        Annotator(0.0, 0.0)


def test_pairs_hold_two_different_answers_to_one_prompt():
    prompts = [row("p"), row("q")]
    answers = [[row("a"), row("a"), row("bb"), row("ccc")], [row("x"), row("y"), row("x"), row("y")]]
    quality = [[0, 0, 1, 1], [1, 0, 1, 0]]
    certain = Annotator(quality_weight=1000.0)
    pairs = [pair for seed in range(20) for pair in sampled_pairs(prompts, answers, quality, certain, seed)]
    texts = {(chr(p.prompt[0]), bytes(p.chosen.tolist()), bytes(p.rejected.tolist())) for p in pairs}
    assert ("q", b"x", b"y") in texts
    assert ("q", b"y", b"x") not in texts
    assert all(chosen != rejected for _, chosen, rejected in texts)
    assert not any(q == "p" and rejected in (b"bb", b"ccc") and chosen == b"a" for q, chosen, rejected in texts)
    with pytest.raises(PreferenceError, match="no two answers differ"):
        sampled_pairs([row("p")], [[row("a"), row("a")]], [[1, 1]], certain, 0)
    with pytest.raises(PreferenceError, match="do not belong together"):
        sampled_pairs(prompts, answers, quality[:1], certain, 0)


def test_an_ensemble_takes_the_mean_or_the_least_of_its_members():
    models = [rewarding(seed) for seed in range(3)]
    prompts, answers = [row("p")] * 4, [row(text) for text in ("a", "bb", "cc", "abc")]
    each = np.stack([Learned(model).rewards(prompts, answers) for model in models])
    assert Ensemble(models, "mean").rewards(prompts, answers) == pytest.approx(each.mean(0))
    assert Ensemble(models).rewards(prompts, answers) == pytest.approx(each.min(0))
    with pytest.raises(PreferenceError, match="'best'"):
        Ensemble(models, "best")


class Linear:
    """A reward that likes length by 0.7 a token, beside what it sees in the first token."""

    def rewards(self, prompts, answers):
        return np.array([0.7 * len(a) + float(a[0] % 2) for a in answers])


def test_the_liking_of_length_is_measured_and_taken_out():
    generator = np.random.default_rng(0)
    answers = [generator.integers(0, 256, int(length)) for length in generator.integers(1, 12, 4000)]
    prompts = [row("p")] * len(answers)
    found = WithoutLength.of(Linear(), prompts, answers, n=8)
    assert found.slope == pytest.approx(0.7, abs=0.01)
    rest = found.rewards(prompts, answers)
    length = np.array([len(a) for a in answers])
    assert abs(np.corrcoef(rest, length)[0, 1]) < 0.05
    with pytest.raises(PreferenceError, match="one length"):
        WithoutLength.of(Linear(), prompts[:4], [row("ab")] * 4, n=2)
    with pytest.raises(PreferenceError, match="multiple of n"):
        WithoutLength.of(Linear(), prompts[:3], answers[:3], n=2)
