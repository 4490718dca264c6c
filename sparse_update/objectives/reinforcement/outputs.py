"""How many outputs each prompt is given, and which of them are learnt from.

Shape letters: P prompts, R outputs, N tokens of an output at most.
"""

from __future__ import annotations

import numpy as np

from sparse_update.objectives.reinforcement.settings import ReinforcementError


def allocate(weight_P: np.ndarray, total: int, least: int, most: int) -> np.ndarray:
    """Share out `total` outputs in proportion to `weight_P`, int64 (P,).

    Every prompt has `least` to `most` outputs, and the sum is `total` exactly. What the bounds leave over goes to the
    others, again in proportion; fractions go to the largest remainders, among equals to the earlier prompt.

    Args:
        weight_P: not negative, such as expected rate x (1 - rate). All 0 means: evenly.

    Raises ReinforcementError where `total` does not lie between `least` and `most` a prompt, and for weights that are
    negative or not finite.
    """
    weight_P = np.asarray(weight_P, dtype=np.float64)
    prompts = len(weight_P)
    if not least * prompts <= total <= most * prompts:
        raise ReinforcementError(f"{total} outputs for {prompts} prompts: each is to have {least} to {most}")
    if not np.isfinite(weight_P).all() or (weight_P < 0).any():
        raise ReinforcementError("weights of prompts must be finite and not negative")
    if not weight_P.sum():
        weight_P = np.ones(prompts)
    weight_P = np.maximum(weight_P, 1e-12 * weight_P.max())
    low, high = 0.0, most / weight_P.min()
    for _ in range(200):  # the scale at which the bounded shares add up to the total
        middle = (low + high) / 2
        if np.clip(middle * weight_P, least, most).sum() < total:
            low = middle
        else:
            high = middle
    share_P = np.clip(high * weight_P, least, most)
    found_P = np.floor(share_P + 1e-9).astype(np.int64)
    for sign in (1, -1):  # rounding of the scale may leave one too many, never more than fractions
        while sign * (total - int(found_P.sum())) > 0:
            room_P = found_P < most if sign > 0 else found_P > least
            order = np.argsort(-sign * np.where(room_P, share_P - found_P, -sign * np.inf), kind="stable")
            found_P[order[0]] += sign
    return found_P


def best_of(reward_R: np.ndarray, group_R: np.ndarray) -> np.ndarray:
    """The output of the highest reward of each group, int64 (P,), the earliest among equals: best-of-n."""
    order = np.lexsort((np.arange(len(reward_R)), -np.asarray(reward_R), group_R))
    first = np.ones(len(order), dtype=bool)
    first[1:] = group_R[order][1:] != group_R[order][:-1]
    return order[first]


def accepted(reward_R: np.ndarray, group_R: np.ndarray, threshold: float, keep: str, outputs: list[bytes]) -> np.ndarray:
    """Outputs that rejection sampling fine-tunes on, ascending int64.

    Args:
        threshold: the reward that an output needs.
        keep: "all" of those that reach it | "distinct": of equal outputs of a prompt the first (Yuan et al. 2023, RFT,
            arXiv 2308.01825) | "best": one for each prompt, the best (best-of-n distilled; Stiennon et al. 2020).
        outputs: what was sampled, to tell equal ones by.

    Raises ReinforcementError for another `keep`.
    """
    good_R = np.asarray(reward_R) >= threshold
    if keep == "all":
        return np.flatnonzero(good_R)
    if keep == "best":
        best = best_of(reward_R, group_R)
        return np.sort(best[good_R[best]])
    if keep != "distinct":
        raise ReinforcementError(f"rejection.keep = {keep!r}: one of all, distinct, best")
    seen: set[tuple[int, bytes]] = set()
    found = []
    for row in np.flatnonzero(good_R):
        known = (int(group_R[row]), outputs[row])
        if known not in seen:
            seen.add(known)
            found.append(int(row))
    return np.array(found, dtype=np.int64)
