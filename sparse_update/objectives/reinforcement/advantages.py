"""From the rewards of a prompt's outputs to one advantage for each output.

Outputs of one prompt are a group. Groups may differ in size, as they do where a gate gives more outputs to some prompts.

Shape letters: R outputs, G groups.
"""

from __future__ import annotations

import math

import numpy as np

from sparse_update.objectives.reinforcement.settings import ADVANTAGES, ReinforcementError

STD_EPS = 1e-4
"""Added to the deviation that "grpo" divides by."""


def group_sums(values_R: np.ndarray, group_R: np.ndarray, groups: int) -> np.ndarray:
    """Sum of `values_R` over each group, float64 (G,)."""
    return np.bincount(group_R, weights=np.asarray(values_R, dtype=np.float64), minlength=groups)


def advantages(rewards_R: np.ndarray, group_R: np.ndarray, rule: str, baseline: float = 0.0) -> np.ndarray:
    """One advantage for each output, float64 (R,).

    Rules, with m, s and n the mean, the sample deviation (n - 1) and the size of the output's group:

    - "grpo": (r - m) / (s + 1e-4). Shao et al. 2024, arXiv 2402.03300.
    - "centred": r - m, without the division, which weighs prompts by 1 / s. Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.
      Its expectation is (n - 1) / n times that of "rloo".
    - "rloo": r less the mean of the other outputs of its group, n / (n - 1) times (r - m). Unbiased: the baseline does not
      depend on the output. Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.
    - "reinforce": r - `baseline`. Williams 1992.

    A group whose rewards are all equal has advantages of exactly 0 by the first three rules.

    Args:
        rewards_R: finite numbers.
        group_R: int, the number of each output's group, from 0.

    Raises:
        ReinforcementError: an unknown rule, arrays of different length, rewards that are NaN or infinite, and groups of one
            output where the rule needs others.
    """
    if rule not in ADVANTAGES:
        raise ReinforcementError(f"advantage rule {rule!r}: one of {', '.join(ADVANTAGES)}")
    reward_R, group_R = np.asarray(rewards_R, dtype=np.float64), np.asarray(group_R, dtype=np.int64)
    if reward_R.shape != group_R.shape or reward_R.ndim != 1:
        raise ReinforcementError(f"{reward_R.shape} rewards and {group_R.shape} group numbers: one of each for each output")
    if not np.isfinite(reward_R).all():
        place = int(np.flatnonzero(~np.isfinite(reward_R))[0])
        raise ReinforcementError(f"the reward of output {place} is {reward_R[place]}: rewards must be finite numbers")
    if rule == "reinforce" or not len(reward_R):
        return reward_R - baseline
    groups = int(group_R.max()) + 1
    size_G = np.bincount(group_R, minlength=groups)
    if (lonely := size_G[group_R] < 2).any():
        place = int(group_R[np.flatnonzero(lonely)[0]])
        raise ReinforcementError(
            f"group {place} has one output, and advantage rule {rule!r} compares outputs of a group: sample at least 2 "
            "outputs a prompt, or use rule 'reinforce'"
        )
    mean_G = group_sums(reward_R, group_R, groups) / np.maximum(size_G, 1)
    centred_R = np.where(all_equal(reward_R, group_R, groups)[group_R], 0.0, reward_R - mean_G[group_R])
    if rule == "centred":
        return centred_R
    if rule == "rloo":
        return centred_R * (size_G / np.maximum(size_G - 1, 1))[group_R]
    variance_G = group_sums(centred_R**2, group_R, groups) / np.maximum(size_G - 1, 1)
    return centred_R / (np.sqrt(variance_G) + STD_EPS)[group_R]


def all_equal(rewards_R: np.ndarray, group_R: np.ndarray, groups: int) -> np.ndarray:
    """bool (G,): groups whose rewards are all the same, which give no signal. Empty groups count as such."""
    low_G, high_G = np.full(groups, math.inf), np.full(groups, -math.inf)
    np.minimum.at(low_G, group_R, rewards_R)
    np.maximum.at(high_G, group_R, rewards_R)
    return low_G >= high_G


def overlong_penalty(lengths_R: np.ndarray, longest: int, margin: int) -> np.ndarray:
    """What is added to the reward of each output for its length, float64 (R,) in [-1, 0].

    0 up to `longest - margin` tokens, then a straight line down to -1 at `longest`, -1 beyond: the soft overlong punishment
    of Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13.

    Raises ReinforcementError unless 0 < margin <= longest.
    """
    if not 0 < margin <= longest:
        raise ReinforcementError(f"overlong margin {margin}: above 0, and at most the longest output, {longest}")
    length_R = np.asarray(lengths_R, dtype=np.float64)
    return np.clip((longest - margin - length_R) / margin, -1.0, 0.0)
