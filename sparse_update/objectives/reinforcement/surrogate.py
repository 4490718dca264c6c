"""The surrogate of a policy gradient, as weights of tokens.

Every estimator here has a loss whose gradient is a weighted sum of gradients of log-probabilities:

    d loss = - sum over outputs r and tokens t of c[r, t] * d log p(token t of output r)

So an estimator is a function that gives `c` (`token_weights`), and whoever can weigh the tokens of a likelihood step can
take its step. `surrogate` is the same loss written out for autograd, and a test compares the two.

Shape letters: R outputs, N tokens of an output at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_update.objectives.reinforcement.settings import EstimatorConfig, ReinforcementError


@dataclass(frozen=True, eq=False)
class Sampled:
    """What an estimator knows of outputs. All tensors have one float type."""

    mask_RN: Tensor
    """bool: which columns are tokens that may be updated on"""
    old_logp_RN: Tensor
    """nats: log-probabilities under the policy that sampled, at the sampling temperature"""
    advantage_R: Tensor
    prompts: int
    """groups that the mean is taken over; those without a signal count, or the step would grow as they do"""
    group_R: Tensor
    """int64: the group of each output"""
    group_size_G: Tensor
    """int64: outputs that were sampled of each group, those that are left out of the step included"""
    tokens: int = 0
    """all tokens of the outputs that count, for "token"; 0 for those of the mask. Where a step takes a part of what was
    sampled, this keeps its scale"""
    reference_logp_RN: Tensor | None = None
    """under the reference policy, where there is a KL term"""


def scale(sampled: Sampled, cfg: EstimatorConfig) -> Tensor:
    """What each token's term of the loss is multiplied by, (R, N); 0 where there is none.

    - "output" (GRPO, arXiv 2402.03300): 1 / (prompts x outputs of its group x its output's tokens): a token of a long
      output counts less.
    - "token" (DAPO, arXiv 2503.14476): 1 / (all tokens of what was sampled).
    - "constant" (Dr. GRPO, arXiv 2503.20783): 1 / (prompts x outputs of its group x `cfg.constant`), the same for all
      lengths. With constant 1 this is the gradient of the expected reward itself.
    """
    mask = sampled.mask_RN.to(sampled.old_logp_RN.dtype)
    if cfg.normalise == "token":
        return mask / (sampled.tokens or mask.sum().clamp(min=1))
    each_R = 1 / (sampled.prompts * sampled.group_size_G.to(mask.dtype)[sampled.group_R])
    if cfg.normalise == "output":
        return mask * (each_R / mask.sum(1).clamp(min=1))[:, None]
    return mask * (each_R / cfg.constant)[:, None]


def log_ratio(logp_RN: Tensor, sampled: Sampled, cfg: EstimatorConfig) -> Tensor:
    """Logarithm of the importance ratio of each token, (R, N); nats.

    "token": its own. "sequence": the mean over its output's tokens, the same for all of them (Zheng et al. 2025, GSPO,
    arXiv 2507.18071).
    """
    mask = sampled.mask_RN.to(logp_RN.dtype)
    found = (logp_RN - sampled.old_logp_RN) * mask
    if cfg.ratio == "token":
        return found
    mean_R1 = found.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean_R1 * mask


def surrogate(logp_RN: Tensor, sampled: Sampled, cfg: EstimatorConfig) -> Tensor:
    """The loss, a scalar with a graph to `logp_RN`: minus the clipped surrogate, plus `cfg.kl` times the KL term.

    A token's term is min(ratio x A, clip(ratio, 1 - clip_low, 1 + clip_high) x A) (Schulman et al. 2017; one bound for each
    side: DAPO's clip-higher). The KL term is the k3 estimator, exp(d) - d - 1 with d = log p_reference - log p, which is
    unbiased and never negative (Schulman 2020, "Approximating KL divergence").
    """
    ratio = log_ratio(logp_RN, sampled, cfg).exp()
    advantage = sampled.advantage_R[:, None]
    kept = torch.minimum(ratio * advantage, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage)
    if cfg.kl:
        d = (_reference(sampled) - logp_RN) * sampled.mask_RN
        kept = kept - cfg.kl * (d.exp() - d - 1)
    return -(kept * scale(sampled, cfg)).sum()


def token_weights(logp_RN: Tensor, sampled: Sampled, cfg: EstimatorConfig) -> Tensor:
    """`c` of the module's docstring, (R, N), at the log-probabilities that the model gives now; no graph.

    The clipped surrogate has a gradient where the ratio is inside of its bounds or the advantage pulls it back:
    ratio x A there, else 0. The KL term adds kl x (exp(d) - 1).
    """
    with torch.no_grad():
        ratio = log_ratio(logp_RN, sampled, cfg).exp()
        advantage = sampled.advantage_R[:, None]
        held = (advantage > 0) & (ratio > 1 + cfg.clip_high) | (advantage < 0) & (ratio < 1 - cfg.clip_low)
        factor = scale(sampled, cfg)
        term = torch.where(held, torch.zeros_like(ratio), ratio * advantage) * factor
        if cfg.ratio == "sequence":  # each token's ratio moves with the mean of all of its output
            mask = sampled.mask_RN.to(term.dtype)
            term = mask * (term.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1))
        if cfg.kl:
            d = (_reference(sampled) - logp_RN) * sampled.mask_RN
            term = term + cfg.kl * (d.exp() - 1) * factor
        return term


def clipped_share(logp_RN: Tensor, sampled: Sampled, cfg: EstimatorConfig) -> float:
    """Share of the tokens whose term has no gradient because their ratio is outside of its bounds."""
    ratio = log_ratio(logp_RN, sampled, cfg).exp()
    advantage = sampled.advantage_R[:, None]
    held = (advantage > 0) & (ratio > 1 + cfg.clip_high) | (advantage < 0) & (ratio < 1 - cfg.clip_low)
    return float((held & sampled.mask_RN).sum()) / max(1, int(sampled.mask_RN.sum()))


def k3(logp_RN: Tensor, reference_RN: Tensor, mask_RN: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per output, (R,) nats, from tokens that the policy sampled: never negative."""
    d = (reference_RN - logp_RN) * mask_RN
    return (d.exp() - d - 1).sum(1)


def _reference(sampled: Sampled) -> Tensor:
    if sampled.reference_logp_RN is None:
        raise ReinforcementError("rl.kl is above 0 and the reference policy's log-probabilities are missing")
    return sampled.reference_logp_RN
