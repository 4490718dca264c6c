"""Calibration against known probabilities; DPO against its closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sparse_update.data.tokens import ByteTokenizer
from sparse_update.objectives.preference.calibration import calibration, log_odds
from sparse_update.objectives.preference.dpo import answer_logp, dpo_loss, fit_dpo
from sparse_update.objectives.preference.errors import PreferenceError, VocabularyMismatch
from sparse_update.objectives.preference.pairs import Pair
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.training import FitConfig
from sparse_update.transformer import ModelConfig, Transformer


def judged(times, count=4000, seed=0):
    """Log-odds of the chosen answer, `times` too sure, of pairs that were chosen by the right ones."""
    generator = np.random.default_rng(seed)
    odds = generator.normal(0, 1.5, count)
    chosen = generator.random(count) < 1 / (1 + np.exp(-odds))
    return times * np.where(chosen, odds, -odds)


def test_right_probabilities_show_the_error_of_finite_bins_and_no_more():
    found = calibration(judged(1.0))
    assert found.error < 2 * found.floor
    assert found.floor < 0.02
    odds = np.abs(np.random.default_rng(1).normal(0, 1.5, 400_000))
    best = float((1 / (1 + np.exp(-odds))).mean())  # accuracy of whoever knows the probabilities
    assert found.accuracy == pytest.approx(best, abs=0.03)
    assert found.accuracy_interval[0] < best < found.accuracy_interval[1]
    assert sum(each.pairs for each in found.bins) == found.pairs == 4000


def test_a_model_that_is_too_sure_shows_the_gap_of_its_probabilities():
    odds = np.abs(np.random.default_rng(1).normal(0, 1.5, 400_000))
    gap = float((1 / (1 + np.exp(-3 * odds)) - 1 / (1 + np.exp(-odds))).mean())
    found = calibration(judged(3.0))
    assert found.error == pytest.approx(gap, abs=0.02)
    assert found.error_interval[0] > 5 * found.floor
    assert found.accuracy == calibration(judged(1.0)).accuracy


def test_log_odds_are_those_before_calibrating(tmp_path):
    torch.manual_seed(0)
    model = RewardModel.of(tiny(), ByteTokenizer())
    torch.nn.init.normal_(model.reward.weight)
    pairs = [Pair(np.array([65]), np.array([i, 3]), np.array([i + 1, 3])) for i in range(60, 90)]
    before = log_odds(model, pairs)
    model.calibrate([row for pair in pairs for row in pair.rows])
    assert log_odds(model, pairs) == pytest.approx(before, abs=1e-5)
    with pytest.raises(PreferenceError, match="10 bins"):
        calibration(before[:5])


def test_the_minimiser_of_dpo_is_the_tilted_reference():
    """Over all pairs of six answers, weighed by their probabilities: ref exp(R / beta) / Z."""
    torch.manual_seed(0)
    beta, reward, reference = 0.5, torch.randn(6).double(), torch.log_softmax(torch.randn(6).double(), 0)
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    first, second = (torch.tensor(side) for side in zip(*itertools.permutations(range(6), 2), strict=True))
    weight = torch.sigmoid(reward[first] - reward[second])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        logp = torch.log_softmax(logits, 0)
        loss = (weight * dpo_loss(logp[first], logp[second], reference[first], reference[second], beta)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.softmax(reference + reward / beta, 0)
    assert torch.allclose(torch.softmax(logits, 0), expected, atol=1e-6)


def test_the_gradient_of_dpo_is_the_published_one():
    torch.manual_seed(1)
    chosen, rejected, ref_chosen, ref_rejected = (torch.randn(5).double() for _ in range(4))
    chosen.requires_grad_(True)
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3).sum().backward()
    margin = 0.3 * ((rejected - ref_rejected) - (chosen - ref_chosen))
    assert torch.allclose(chosen.grad, (-0.3 * torch.sigmoid(margin)).detach())


def tiny(seed=0, vocab=256):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(width=16, layers=1, heads=2, context=16, vocab_size=vocab, attention="explicit"))
    torch.nn.init.normal_(model.blocks[0].attn.o.weight, std=0.3)
    return model


def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens_alone():
    model = tiny()
    prompts, answers = [np.array([65, 66, 67]), np.array([65])], [np.array([70, 3]), np.array([70, 71, 72, 3])]
    found = answer_logp(model, prompts, answers)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        log = torch.log_softmax(model(torch.from_numpy(np.concatenate((prompt, answer)))[None]), -1)[0]
        each = [log[len(prompt) + i - 1, int(token)] for i, token in enumerate(answer)]
        assert float(found[number].detach()) == pytest.approx(float(sum(each).detach()), abs=1e-5)


def test_fitting_prefers_what_was_chosen_and_leaves_the_reference_alone():
    policy, reference = tiny(), tiny()
    pairs = [Pair(np.array([65]), np.array([70, 3]), np.array([71, 3]))] * 32
    before = [p.clone() for p in reference.parameters()]
    losses = fit_dpo(policy, reference, pairs, FitConfig(epochs=6, batch_pairs=16, lr=3e-3))
    assert losses[0] <= np.log(2) + 1e-6
    assert losses[-1] < losses[0]
    ours = answer_logp(policy, [np.array([65])] * 2, [pairs[0].chosen, pairs[0].rejected]).detach()
    theirs = answer_logp(reference, [np.array([65])] * 2, [pairs[0].chosen, pairs[0].rejected]).detach()
    assert float((ours[0] - theirs[0]) - (ours[1] - theirs[1])) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))
    with pytest.raises(PreferenceError, match="beta = 0"):
        fit_dpo(policy, reference, pairs, FitConfig(), beta=0)
    with pytest.raises(VocabularyMismatch, match="300"):
        fit_dpo(policy, tiny(vocab=300), pairs, FitConfig())
