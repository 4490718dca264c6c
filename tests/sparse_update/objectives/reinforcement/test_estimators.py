"""Estimators against their exact expectation over all outputs of a toy policy, and their weights against autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_update.objectives.reinforcement.advantages import STD_EPS, advantages, all_equal, overlong_penalty
from sparse_update.objectives.reinforcement.settings import (
    PRESETS,
    UNBOUNDED,
    EstimatorConfig,
    ReinforcementError,
    RlConfig,
    preset,
)
from sparse_update.objectives.reinforcement.surrogate import Sampled, clipped_share, k3, surrogate, token_weights
from tests.sparse_update.objectives.reinforcement.toy import MASK, OUTPUTS, log_probabilities, logits, rewards

TRUE = EstimatorConfig(advantage="rloo", normalise="constant", clip_low=1.0, clip_high=UNBOUNDED)


def sampled(
    rows: Sequence[int] | np.ndarray, logp: Tensor, advantage: np.ndarray, n: int, reference: Tensor | None = None
) -> Sampled:
    """Groups of `n` outputs, by their numbers in `OUTPUTS`."""
    group = torch.arange(len(rows)) // n
    groups = int(group[-1]) + 1
    sizes = torch.full((groups,), n)
    kept = None if reference is None else reference[rows].detach()
    return Sampled(MASK[rows], logp[rows].detach(), torch.from_numpy(advantage), groups, group, sizes, 0, kept)


def expected(cfg: EstimatorConfig, n: int, seed: int, reference: Tensor | None = None) -> Tensor:
    """Mean of an estimator's gradient, over all groups of `n` outputs with their probabilities."""
    table = logits(seed)
    logp = log_probabilities(table)
    chance = logp.sum(1).exp().detach()
    reward = rewards(seed).numpy()
    groups = np.array(list(itertools.product(range(len(OUTPUTS)), repeat=n)))
    rows = groups.ravel()
    advantage = advantages(reward[rows], np.repeat(np.arange(len(groups)), n), cfg.advantage)
    found = replace(sampled(rows, logp, advantage, n, reference), prompts=1)
    c = token_weights(logp[rows].detach(), found, cfg)
    together = chance[groups].prod(1).repeat_interleave(n)
    weights = torch.zeros_like(logp).index_add(0, torch.from_numpy(rows), c * together[:, None])
    (gradient,) = torch.autograd.grad((weights * logp).sum(), table)
    return gradient


def exact(seed: int, value: Tensor | None = None) -> Tensor:
    """Gradient of the expected reward, or of another value of each output, by autograd through the sum over all outputs."""
    table = logits(seed)
    reward = rewards(seed) if value is None else value
    (gradient,) = torch.autograd.grad((log_probabilities(table).sum(1).exp() * reward).sum(), table)
    return gradient


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_is_unbiased(n: int, seed: int) -> None:
    torch.testing.assert_close(expected(TRUE, n, seed), exact(seed), rtol=0, atol=1e-14)


def test_any_constant_baseline_is_unbiased() -> None:
    for baseline in (0.0, 0.7):
        found = np.array([1.0, 0.0])
        np.testing.assert_array_equal(advantages(found, np.array([0, 0]), "reinforce", baseline), found - baseline)
    torch.testing.assert_close(expected(replace(TRUE, advantage="reinforce"), 1, 0), exact(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3])
def test_the_groups_mean_as_baseline_scales_the_gradient(n: int) -> None:
    """Dr. GRPO's advantage holds the output itself in its baseline: (n - 1) / n of the gradient, in the same direction."""
    found = expected(replace(TRUE, advantage="centred"), n, 1)
    torch.testing.assert_close(found, exact(1) * (n - 1) / n, rtol=0, atol=1e-14)


def test_division_by_length_is_biased_as_its_closed_form_says() -> None:
    """GRPO's mean over an output's tokens: (n - 1) / n (E[w r g] - E[r] E[w g]), with w one over the length."""
    table = logits(2)
    logp = log_probabilities(table)
    chance, reward, weight = logp.sum(1).exp().detach(), rewards(2), 1 / MASK.sum(1).double()
    mean = (chance * reward).sum()
    value = (chance * weight * (reward - mean))[:, None] * logp
    (closed,) = torch.autograd.grad(0.5 * value.sum(), table)
    found = expected(replace(TRUE, advantage="centred", normalise="output"), 2, 2)
    torch.testing.assert_close(found, closed, rtol=0, atol=1e-14)
    true = exact(2) / 2
    assert float((found - true).norm() / true.norm()) > 0.05  # not the gradient of the expected reward


def test_division_by_the_deviation_weighs_prompts() -> None:
    """Two prompts: the rarer the success of one, the more GRPO's advantage of it exceeds the centred one."""
    reward = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=float)
    group = np.arange(16) // 8
    centred, divided = (advantages(reward, group, rule) for rule in ("centred", "grpo"))
    for number in (0, 1):
        members = group == number
        np.testing.assert_allclose(divided[members], centred[members] / (reward[members].std(ddof=1) + STD_EPS), rtol=1e-12)
    assert divided[8] / centred[8] > 2.5 > divided[0] / centred[0]


def test_k3_is_the_divergence_in_the_mean_and_never_negative() -> None:
    logp, reference = log_probabilities(logits(3)).detach(), log_probabilities(logits(4)).detach()
    chance = logp.sum(1).exp()
    found = k3(logp, reference, MASK)
    assert float(found.min()) >= 0
    divergence = (chance * (logp - reference).sum(1)).sum()
    torch.testing.assert_close((chance * found).sum(), divergence, rtol=0, atol=1e-14)


def test_gradient_of_k3_is_that_of_the_other_divergence() -> None:
    """As a term of a loss, k3's gradient is that of KL(reference || policy) of the next token, at prefixes that the policy
    comes to: known, and what its users get."""
    seed, reference = 5, log_probabilities(logits(6))
    no_reward = replace(TRUE, advantage="reinforce", kl=1.0)
    table = logits(seed)
    logp = log_probabilities(table)
    chance = logp.sum(1).exp().detach()
    rows = list(range(len(OUTPUTS)))
    found = sampled(rows, logp, np.zeros(len(rows)), 1, reference)
    c = token_weights(logp.detach(), found, no_reward) * len(rows)  # the mean over prompts is taken by chance instead
    (gradient,) = torch.autograd.grad((c * chance[:, None] * logp).sum(), table)
    other = logits(seed)
    log_policy, policy_reference = torch.log_softmax(other, -1), torch.softmax(logits(6), -1).detach()
    reached = _visits(logp.detach())
    divergence = (reached[:, None] * policy_reference * -log_policy).sum()
    (closed,) = torch.autograd.grad(divergence, other)
    torch.testing.assert_close(gradient, -closed, rtol=0, atol=1e-13)


def _visits(logp: Tensor) -> Tensor:
    """Probability that the policy comes to each prefix."""
    from tests.sparse_update.objectives.reinforcement.toy import PREFIXES

    found = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for number, prefix in enumerate(PREFIXES):
        match = next(i for i, output in enumerate(OUTPUTS) if output[: len(prefix)] == prefix)
        found[number] = logp[match, : len(prefix)].sum().exp()
    return found


ESTIMATORS = [
    *(preset(name) for name in PRESETS),
    preset("grpo", normalise="token", kl=0.3),
    preset("dr_grpo", ratio="sequence", constant=3.0, kl=0.1),
    preset("gspo", clip_low=0.2, clip_high=0.3),
]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ESTIMATORS))
def test_weights_are_the_gradient_of_the_surrogate(seed: int, cfg: EstimatorConfig) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    old, new, reference = (-2 * torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(6, generator=generator, dtype=torch.float64)
    group, sizes = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([2, 4, 3])
    found = Sampled(mask, old, advantage, 3, group, sizes, 0, reference)
    new = torch.where(mask, old + 0.3 * (new + 1), new).requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(new, found, cfg), new)
    torch.testing.assert_close(token_weights(new, found, cfg), -gradient, rtol=1e-12, atol=1e-14)


def test_clip_higher_keeps_what_the_even_bounds_hold_back() -> None:
    """A token at 1.25 times its old probability: pushed on by DAPO's upper bound of 0.28, not by 0.2."""
    old = torch.log(torch.tensor([[0.4], [0.4]], dtype=torch.float64))
    new = torch.log(torch.tensor([[0.5], [0.3]], dtype=torch.float64))
    found = Sampled(
        torch.ones(2, 1, dtype=torch.bool),
        old,
        torch.tensor([1.0, -1.0]).double(),
        1,
        torch.zeros(2).long(),
        torch.tensor([2]),
    )
    even, higher = (preset(name, kl=0.0, advantage="centred") for name in ("grpo", "dapo"))
    assert token_weights(new, found, even).tolist() == [[0.0], [0.0]]
    assert token_weights(new, found, higher)[0, 0] == pytest.approx(0.5 * 1.25)
    assert token_weights(new, found, higher)[1, 0] == 0
    assert clipped_share(new, found, even) == 1.0
    assert clipped_share(new, found, higher) == 0.5


def test_a_part_of_what_was_sampled_keeps_its_scale() -> None:
    """A step in two pieces adds up to the step on all, whatever the terms are divided by."""
    rows, n = [3, 8, 1, 11], 2
    logp = log_probabilities(logits(7)).detach()
    advantage = advantages(np.array([1.0, 0.0, 0.0, 1.0]), np.array([0, 0, 1, 1]), "rloo")
    whole = sampled(rows, logp, advantage, n)
    whole = replace(whole, tokens=int(whole.mask_RN.sum()))
    for normalise in ("output", "token", "constant"):
        cfg = replace(TRUE, normalise=normalise)
        pieces = [
            token_weights(
                logp[rows][part],
                replace(
                    whole, mask_RN=whole.mask_RN[part], old_logp_RN=whole.old_logp_RN[part],
                    advantage_R=whole.advantage_R[part], group_R=whole.group_R[part],
                ),
                cfg,
            )
            for part in (slice(0, 3), slice(3, 4))
        ]  # fmt: skip
        torch.testing.assert_close(torch.cat(pieces), token_weights(logp[rows], whole, cfg), rtol=0, atol=0)


@given(st.integers(0, 1000), st.sampled_from(["grpo", "centred", "rloo"]))
@settings(max_examples=50, deadline=None)
def test_advantages_of_groups_of_any_size(seed: int, rule: str) -> None:
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(5), generator.integers(2, 6, size=5))
    order = generator.permutation(len(group))
    reward = generator.random(len(group)).round(1)
    reward[group == 2] = 0.1 + 0.2  # no signal, at a number that sums do not give exactly
    found = advantages(reward[order], group[order], rule)
    for number in range(5):
        one = found[group[order] == number]
        assert abs(one.sum()) < 1e-12
        alone = advantages(reward[order][group[order] == number], np.zeros(len(one), dtype=int), rule)
        np.testing.assert_allclose(one, alone, rtol=1e-12, atol=1e-15)
    assert (found[group[order] == 2] == 0).all()
    assert all_equal(reward, group, 5)[2]


def test_overlong_punishment() -> None:
    found = overlong_penalty(np.array([1, 16, 18, 20, 24]), longest=20, margin=4)
    assert found.tolist() == [0, 0, -0.5, -1, -1]
    with pytest.raises(ReinforcementError, match="margin 0"):
        overlong_penalty(np.array([1]), 20, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: advantages(np.array([1.0, float("nan")]), np.array([0, 0]), "rloo"), "output 1 is nan"),
        (lambda: advantages(np.array([1.0]), np.array([0]), "rloo"), "at least 2"),
        (lambda: advantages(np.array([1.0, 0.0]), np.array([0]), "rloo"), "one of each"),
        (lambda: advantages(np.array([1.0]), np.array([0]), "best"), "one of grpo"),
        (lambda: preset("ppo"), "one of grpo, dr_grpo"),
        (lambda: preset("grpo", epsilon=0.1), "no setting epsilon"),
        (lambda: EstimatorConfig(kl=-1.0), "kl = -1.0"),
        (lambda: EstimatorConfig(clip_low=1.5), "at most 1"),
        (lambda: RlConfig(allocate="uncertain", n_least=90), "must ascend"),
    ],
)
def test_what_no_step_can_be_taken_with_is_refused(call, says: str) -> None:
    with pytest.raises(ReinforcementError, match=says):
        call()


def test_a_divergence_without_a_reference_is_refused() -> None:
    logp = log_probabilities(logits(0)).detach()
    with pytest.raises(ReinforcementError, match="reference policy"):
        token_weights(logp[[0, 1]], sampled([0, 1], logp, np.zeros(2), 2), preset("grpo"))
