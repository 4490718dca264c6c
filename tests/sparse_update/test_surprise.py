"""The n-gram table against a plain dictionary that follows the formula, and what it is for."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.surprise import NgramTable


class Dictionary:
    """The same predictive rule with exact counts, one token at a time."""

    def __init__(self, vocab, orders, strength):
        self.vocab, self.orders, self.strength = vocab, orders, strength
        self.pairs, self.contexts = Counter(), Counter()

    def score(self, window):
        out = []
        for t in range(1, len(window)):
            p = 1 / self.vocab
            for order in self.orders:
                if t >= order - 1:
                    context = (order, *window[t - order + 1 : t])
                    pair = self.pairs[(*context, window[t])]
                    p = (pair + self.strength * p) / (self.contexts[context] + self.strength)
            out.append(-math.log(p))
        return out

    def update(self, window):
        for t in range(1, len(window)):
            for order in self.orders:
                if t >= order - 1:
                    context = (order, *window[t - order + 1 : t])
                    self.pairs[(*context, window[t])] += 1
                    self.contexts[context] += 1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=12),
    st.sampled_from([(1,), (1, 2), (2, 3), (1, 2, 4), (3,)]),
    st.sampled_from([0.3, 1.0]),
)
def test_scores_equal_an_exact_dictionary(windows, orders, strength):
    table = NgramTable(1000, orders, bits=24, strength=strength)  # orders 1 and 2 exact, the rest hashed into a wide table
    exact = Dictionary(1000, orders, strength)
    for window in windows:
        found = table.score_and_update(torch.tensor([window]))[0]
        assert found.tolist() == pytest.approx(exact.score(window), abs=1e-5)
        exact.update(window)
    twice = torch.tensor(windows)
    torch.testing.assert_close(table.score(twice), torch.tensor([exact.score(w) for w in windows]), atol=1e-5, rtol=1e-5)


def test_an_empty_table_is_uniform():
    surprise = NgramTable(50).score(torch.randint(0, 50, (3, 20)))
    torch.testing.assert_close(surprise, torch.full((3, 19), math.log(50)))


def test_noise_lies_above_text_and_repeats_below():
    generator = torch.Generator().manual_seed(0)
    step = torch.rand(64, 64, generator=generator).pow(8)  # a Markov chain with few likely successors
    text = torch.zeros(2000, 65, dtype=torch.int64)
    text[:, 0] = torch.randint(0, 64, (2000,), generator=generator)
    for t in range(64):
        text[:, t + 1] = torch.multinomial(step[text[:, t]], 1, generator=generator)[:, 0]
    table = NgramTable(64)
    table.update(text[:1500])
    fresh = table.score(text[1500:]).mean(1)
    repeated = table.score(text[1000:1500]).mean(1)
    shuffled = table.score(text[1500:][:, torch.randperm(65, generator=generator)]).mean(1)
    noise = table.score(torch.randint(0, 64, (500, 65), generator=generator)).mean(1)
    assert repeated.max() < fresh.min()
    assert shuffled.min() > fresh.max()
    assert noise.min() > fresh.max()


def test_state_round_trip_and_foreign_state():
    table, other = NgramTable(50, bits=12), NgramTable(50, bits=12)
    windows = torch.randint(0, 50, (20, 17))
    table.update(windows)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.score(windows), table.score(windows))
    with pytest.raises(ValueError, match="orders"):
        NgramTable(50, orders=(1, 2), bits=12).load_state_dict(table.state_dict())


@pytest.mark.parametrize("kw", [{"orders": ()}, {"orders": (2, 1)}, {"orders": (0, 1)}, {"bits": 40}, {"strength": 0.0}])
def test_bad_tables_are_refused(kw):
    with pytest.raises(ValueError, match="n-gram"):
        NgramTable(50, **kw)
