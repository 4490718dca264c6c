"""Best-of-n, distances and fits against enumeration, closed forms and published numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.overoptimisation import (
    best_of_n,
    best_of_n_kl,
    fit_form,
    kl_per_row,
)
from sparse_update.transformer import ModelConfig, Transformer


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=7),
    st.integers(1, 7),
)
def test_best_of_n_is_the_mean_over_all_subsets_ties_shared(pairs, n):
    n = min(n, len(pairs))
    proxy, values = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    expected = []
    for chosen in itertools.combinations(range(len(pairs)), n):
        # The best of the subset; which of several equal ones is taken is drawn from all that have this proxy.
        top = proxy[list(chosen)].max()
        expected.append(values[proxy == top].mean())
    assert best_of_n(proxy[None], values[None], [n])[0, 0] == pytest.approx(np.mean(expected), abs=1e-9)


def test_best_of_n_of_uniform_numbers_has_the_known_mean_at_any_size():
    sizes = [1, 2, 10, 1000, 4000]
    grid = (np.arange(4000) + 1.0)[None] / 4001  # the expected order statistics of uniform numbers
    found = best_of_n(grid, grid, sizes)[0]
    assert found == pytest.approx([n / (n + 1) for n in sizes], abs=1e-9)


def test_the_distance_of_best_of_n_is_that_of_the_density_of_a_maximum():
    for n in (1, 2, 3.5, 100):
        u = (np.arange(2_000_000) + 0.5) / 2_000_000
        log_density = np.log(n) + (n - 1) * np.log(u)  # of the largest of n uniform numbers, against 1
        assert best_of_n_kl(n) == pytest.approx(float((np.exp(log_density) * log_density).mean()), abs=2e-5)
    with pytest.raises(PreferenceError, match="at least 1"):
        best_of_n_kl(0.5)


def test_what_best_of_n_cannot_take_is_refused():
    ok = np.zeros((2, 3))
    for proxy, values, sizes in ((ok, ok[:1], [1]), (ok, ok, [4]), (ok, ok, [0]), (ok, ok, []), (ok, ok * np.nan, [1])):
        with pytest.raises(PreferenceError):
            best_of_n(proxy, values, sizes)


def policy(seed):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(width=16, layers=1, heads=2, context=8, vocab_size=3, attention="explicit"))
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return model.double()


def test_the_distance_is_the_divergence_over_all_answers_by_enumeration():
    ours, reference = policy(0), policy(1)
    prompt = np.array([0, 1, 0])
    answers = [  # 2 closes an answer, three tokens at most: every answer there is
        np.array(tokens)
        for length in (1, 2, 3)
        for tokens in itertools.product(range(3), repeat=length)
        if 2 not in tokens[:-1] and (tokens[-1] == 2 or length == 3)
    ]

    @torch.no_grad()
    def logp(model):
        found = []
        for answer in answers:
            tokens = torch.from_numpy(np.concatenate((prompt, answer)))[None]
            log = torch.log_softmax(model(tokens[:, :-1]), -1)[0]
            found.append(sum(float(log[len(prompt) - 1 + i, int(token)]) for i, token in enumerate(answer)))
        return np.array(found)

    p, q = logp(ours), logp(reference)
    assert np.exp(p).sum() == pytest.approx(1, abs=1e-12)
    rows = kl_per_row(ours, reference, [prompt] * len(answers), answers, batch_rows=4)
    assert (rows >= 0).all()
    assert float(np.exp(p) @ rows) == pytest.approx(float(np.exp(p) @ (p - q)), abs=1e-9)


@pytest.mark.parametrize(("form", "alpha", "beta"), [("best_of_n", 0.9, 0.3), ("reinforcement", 0.5, 0.2)])
def test_a_fit_finds_the_curve_and_where_it_turns(form, alpha, beta):
    d = np.linspace(0.05, 4, 40)
    gain = d * (alpha - beta * (d if form == "best_of_n" else np.log(d)))
    fit = fit_form(form, d, gain)
    assert (fit.alpha, fit.beta, fit.explained) == pytest.approx((alpha, beta, 1.0))
    fine = np.linspace(1e-3, 60, 2_000_000)
    values = fit.at(fine)
    assert fit.turning_point == pytest.approx(fine[values.argmax()], abs=1e-4)
    assert fit.peak == pytest.approx(values.max(), abs=1e-6)


def test_what_a_fit_explains_is_the_share_of_the_variance():
    generator = np.random.default_rng(0)
    d = np.linspace(0.1, 3, 200)
    clean = d * (1 - 0.25 * d)
    noisy = clean + generator.normal(0, 0.3 * clean.std(), 200)
    fit = fit_form("best_of_n", d, noisy)
    assert fit.explained == pytest.approx(1 / 1.09, abs=0.02)
    assert fit.explained == pytest.approx(1 - np.var(noisy - fit.at(d)) / np.var(noisy), abs=1e-3)


def test_a_curve_that_never_turns_has_no_turning_point():
    d = np.linspace(0.1, 3, 20)
    assert fit_form("best_of_n", d, d * (1 + 0.1 * d)).turning_point is None
    assert fit_form("reinforcement", d, d).turning_point is None
    assert math.isclose(fit_form("best_of_n", [0, 0.5, 1, 2], [0, 0.5, 1, 2]).alpha, 1)


def test_what_cannot_be_fitted_is_refused():
    for distance, gain in (
        ([1, 1, 1], [1, 2, 3]),
        ([1, 2], [1, 2]),
        ([-1, 1, 2], [0, 0, 0]),
        ([1, 2, math.nan], [1, 2, 3]),
    ):
        with pytest.raises(PreferenceError):
            fit_form("best_of_n", distance, gain)
    with pytest.raises(PreferenceError, match="form 'cubic'"):
        fit_form("cubic", [1, 2, 3], [1, 2, 3])
