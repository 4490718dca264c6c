"""Which tokens of the outputs are updated on: the rest of an output adds nothing to the gradient.

Shape letters: R outputs, N tokens of an output at most.
"""

from __future__ import annotations

import numpy as np

from sparse_update.objectives.reinforcement.settings import TOKEN_GATES, ReinforcementError


def kept_tokens(
    kind: str,
    keep_fraction: float,
    mask_RN: np.ndarray,
    advantage_R: np.ndarray,
    logp_RN: np.ndarray,
    entropy_RN: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """bool (R, N): the tokens that stay, `keep_fraction` of those whose output has an advantage, one at least.

    Tokens of outputs without an advantage never stay: their gradient is 0.

    Args:
        kind: "none": all of them | "entropy": the broadest distributions (Wang et al. 2025, arXiv 2506.01939) |
            "advantage_surprise": the largest |advantage| x -log p, which bounds the token's share of the gradient's norm
            where it was likely | "random".
        logp_RN: of each token when it was sampled; nats.
        entropy_RN: of the distribution that it was drawn from; nats.

    Ties go to the earlier output, then to the earlier token. Raises ReinforcementError for another kind.
    """
    if kind not in TOKEN_GATES:
        raise ReinforcementError(f"rl.tokens.kind = {kind!r}: one of {', '.join(TOKEN_GATES)}")
    live_RN = mask_RN & (np.asarray(advantage_R) != 0)[:, None]
    count = int(live_RN.sum())
    if kind == "none" or not count or keep_fraction >= 1:
        return live_RN
    if kind == "entropy":
        score_RN = np.asarray(entropy_RN, dtype=np.float64)
    elif kind == "advantage_surprise":
        score_RN = np.abs(advantage_R)[:, None] * -np.asarray(logp_RN, dtype=np.float64)
    else:
        score_RN = generator.random(mask_RN.shape)
    places = np.flatnonzero(live_RN)
    order = np.argsort(-score_RN.ravel()[places], kind="stable")[: max(1, round(keep_fraction * count))]
    kept_RN = np.zeros(mask_RN.size, dtype=bool)
    kept_RN[places[order]] = True
    return kept_RN.reshape(mask_RN.shape)
