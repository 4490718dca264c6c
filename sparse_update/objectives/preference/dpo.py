"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): a policy from pairs, without a reward model.

The loss of a pair is -log sigmoid(beta ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r)))) for the chosen answer c and
the rejected one r. Where preferences are Bradley and Terry's for a reward R, its minimiser is ref exp(R / beta) / Z, the
policy with the highest mean of R - beta KL. It is the control of everything here that learns a reward first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.objectives.preference.errors import PreferenceError, VocabularyMismatch
from sparse_update.objectives.preference.pairs import Pair
from sparse_update.objectives.preference.reward import padded
from sparse_update.objectives.preference.training import FitConfig, fit
from sparse_update.transformer import Transformer, token_loss


def dpo_loss(chosen_R: Tensor, rejected_R: Tensor, ref_chosen_R: Tensor, ref_rejected_R: Tensor, beta: float) -> Tensor:
    """Loss of each pair, nats, (R,), from log-probabilities of whole answers under the policy and the reference."""
    return F.softplus(-beta * ((chosen_R - ref_chosen_R) - (rejected_R - ref_rejected_R)))


def answer_logp(model: Transformer, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> Tensor:
    """Log-probability of each answer after its prompt, nats, (rows,), with a graph."""
    rows = [np.concatenate((prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, length = padded(rows, model.embed.weight.device)
    place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    prompt = torch.tensor([len(p) for p in prompts], device=tokens.device)
    mask = (place >= prompt[:, None] - 1) & (place < length[:, None] - 1)
    return -(token_loss(model(tokens[:, :-1]), tokens[:, 1:]) * mask).sum(1)


def fit_dpo(
    policy: Transformer, reference: Transformer, pairs: Sequence[Pair], cfg: FitConfig, beta: float = 0.1
) -> list[float]:
    """Train the policy in place; the mean loss of each epoch, nats a pair (log 2 where it equals the reference).

    Raises PreferenceError for a beta that is not positive or no pairs, VocabularyMismatch for a reference of other tokens.
    """
    if not beta > 0:
        raise PreferenceError(f"dpo.beta = {beta}: a positive number")
    if policy.cfg.vocab_size != reference.cfg.vocab_size:
        raise VocabularyMismatch(
            f"the policy has {policy.cfg.vocab_size} tokens, the reference {reference.cfg.vocab_size}: take the policy as "
            "it was before this training"
        )

    def logp(model: Transformer, batch: Sequence[Pair]) -> Tensor:
        prompts = [pair.prompt for pair in batch for _ in range(2)]
        return answer_logp(model, prompts, [answer for pair in batch for answer in (pair.chosen, pair.rejected)])

    def loss_of(batch: Sequence[Pair]) -> Tensor:
        ours = logp(policy, batch)
        with torch.no_grad():
            theirs = logp(reference, batch)
        return dpo_loss(ours[::2], ours[1::2], theirs[::2], theirs[1::2], beta)

    return fit(list(policy.parameters()), pairs, loss_of, cfg)
