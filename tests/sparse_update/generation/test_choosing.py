"""Votes and searches against brute force, a numeric integral, and the sampler's own counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_update.generation import GenerateConfig, GenerationError, Sampler
from sparse_update.generation.choosing import best, flops, lead_is_safe, majority, search, vote
from sparse_update.generation.rounds import vote_in_rounds
from sparse_update.transformer import ModelConfig, Transformer

ANSWERS = st.lists(st.sampled_from("abc"), min_size=1, max_size=14)


@given(ANSWERS)
def test_majority_has_no_answer_before_it(answers):
    taken = majority(answers)
    counts = {answer: answers.count(answer) for answer in answers}
    assert counts[answers[taken]] == max(counts.values())
    assert answers.index(answers[taken]) == taken
    rivals = [answer for answer in counts if counts[answer] == max(counts.values())]
    assert min(answers.index(answer) for answer in rivals) == taken


@given(ANSWERS, st.floats(0.5, 1), st.integers(1, 4))
def test_a_vote_sees_a_prefix_and_stops_at_the_first_safe_lead(answers, sure, least):
    found = vote(answers, sure, least)
    assert found.output == majority(answers[: found.used])
    if found.used < len(answers):
        counts = sorted((answers[: found.used].count(a) for a in set(answers[: found.used])), reverse=True)
        assert lead_is_safe(counts[0], counts[1] if len(counts) > 1 else 0) >= sure
        assert found.used >= least
    assert vote([*answers, "z"], sure, least).used >= found.used  # what comes later changes nothing that was decided
    assert vote(answers, 1.0).used == len(answers)


@pytest.mark.parametrize(("first", "second"), [(1, 0), (3, 1), (4, 4), (9, 2)])
def test_the_lead_is_the_integral_of_the_posterior(first, second):
    p = (np.arange(200000) + 0.5) / 200000
    density = p**first * (1 - p) ** second
    assert lead_is_safe(first, second) == pytest.approx(density[p > 0.5].sum() / density.sum(), abs=1e-6)


def test_search_and_best():
    assert search([0.2, 1.0, 0.5]) == search([0.2, 1.0])
    assert (search([0.2, 0.7, 0.5]).output, search([0.2, 0.7, 0.5]).used) == (1, 3)
    assert search([0.2, 0.7, 0.5], enough=0.6).used == 2
    assert best([1.0, 2.0, 2.0]) == 1
    for scores in ([], [1.0, math.nan]):
        with pytest.raises(GenerationError, match="no best one"):
            best(scores)
    with pytest.raises(GenerationError, match="vote of no outputs"):
        majority([])


def test_later_samples_are_those_behind_the_first_ones_and_their_flops_add_up():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=32, layers=1, heads=2, context=48, vocab_size=20))
    prompts = [[1, 2, 3], [4, 5]]
    whole = Sampler(model, GenerateConfig(new_tokens=6, n=8), stop=range(6)).sample(prompts)
    later = Sampler(model, GenerateConfig(new_tokens=6, n=3), stop=range(6)).sample(prompts, first=5)
    np.testing.assert_array_equal(whole.tokens_RN.reshape(2, 8, 6)[:, 5:], later.tokens_RN.reshape(2, 3, 6))
    lengths = whole.lengths_R.reshape(2, 8)
    assert sum(flops(model.cfg, len(p), lengths[i].tolist(), 8) for i, p in enumerate(prompts)) == whole.flops
    one = Sampler(model, GenerateConfig(new_tokens=6, temperature=0.0), stop=range(6)).sample(prompts[:1])
    both = flops(model.cfg, 3, lengths[0].tolist(), 2, greedy=int(one.lengths_R[0]))
    alone = flops(model.cfg, 3, lengths[0].tolist(), 2)
    assert both - alone == one.flops - flops(model.cfg, 3, [1], 1)  # the prompt is read once for all of them


def test_rounds_give_more_outputs_where_they_disagree_and_the_samples_of_one_call():
    torch.manual_seed(1)
    model = Transformer(ModelConfig(width=32, layers=1, heads=2, context=48, vocab_size=20))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    prompts = [np.array([1 + i, 2, 3 * i]) for i in range(6)]
    sampler = Sampler(model, GenerateConfig(new_tokens=1, temperature=0.3, seed=2))
    found = vote_in_rounds(sampler, prompts, lambda row: str(row[0]), ids=range(6), first=2, most=16, sure=0.85)
    whole = Sampler(model, GenerateConfig(new_tokens=1, temperature=0.3, seed=2, n=16)).sample(prompts, range(6))
    assert set(found.outputs_P) <= {2, 4, 8, 16}
    assert len(set(found.outputs_P)) > 1
    for number, used in enumerate(found.outputs_P):
        answers = [str(row[0]) for row in whole.tokens_RN[number * 16 : number * 16 + used]]
        assert found.answers[number] == answers[majority(answers)]
        assert found.shares[number] == answers.count(found.answers[number]) / used
        counts = sorted((answers.count(a) for a in set(answers)), reverse=True)
        assert used == 16 or lead_is_safe(counts[0], counts[1] if len(counts) > 1 else 0) >= 0.85
    assert sampler.cfg.n == 1
    everyone = vote_in_rounds(sampler, prompts, str, first=2, most=8, sure=1.0)
    assert everyone.outputs_P.tolist() == [8] * 6
    for settings, message in (({"first": 1}, "at least 2 first"), ({"first": 9, "most": 4}, "no more than most")):
        with pytest.raises(GenerationError, match=message):
            vote_in_rounds(sampler, prompts, str, **settings)
    with pytest.raises(GenerationError, match="temperature 0"):
        vote_in_rounds(Sampler(model, GenerateConfig(temperature=0.0)), prompts, str)
