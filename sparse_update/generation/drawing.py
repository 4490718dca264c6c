"""From logits and a uniform number to a token: temperature, top-p, inverse distribution function.

Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits_RV: Tensor, uniform_R: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row.

    The token is the first whose cumulative probability exceeds the row's uniform number, so a number decides it alone.
    With `top_p` the likeliest tokens are kept whose probabilities first reach it, among equals the lower number first.

    Args:
        logits_RV: any float type; computed in float32 or wider.
        uniform_R: float64 in [0, 1).
        temperature: 0 takes the likeliest token, the lowest number among equals.

    Returns:
        tokens (R,) int64, and (3, R): log-probability under the model, under what was drawn from, and the entropy of the
        model's distribution; nats.
    """
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    logp_RV = torch.log_softmax(logits_RV, dim=-1)
    p_RV = logp_RV.exp()
    entropy_R = -(p_RV * logp_RV.clamp(min=-1e30)).sum(-1)
    if temperature == 0:
        token_R = logits_RV.argmax(dim=-1)
        logp_R = logp_RV.gather(1, token_R[:, None])[:, 0]
        return token_R, torch.stack((logp_R, torch.zeros_like(logp_R), entropy_R))
    q_RV = p_RV if temperature == 1 else torch.softmax(logits_RV / temperature, dim=-1)
    if top_p < 1:
        sorted_RV, order_RV = q_RV.sort(dim=-1, descending=True, stable=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        q_RV = torch.zeros_like(q_RV).scatter(1, order_RV, sorted_RV * (before_RV < top_p))
    reached_RV = q_RV.double().cumsum(-1)
    total_R1 = reached_RV[:, -1:]
    first_R = (reached_RV <= uniform_R[:, None] * total_R1).sum(-1)
    last_R = (reached_RV < total_R1).sum(-1)  # the last token of any probability
    token_R = torch.minimum(first_R, last_R)
    at_R1 = token_R[:, None]
    logp_R = logp_RV.gather(1, at_R1)[:, 0]
    drawn_R = (q_RV.gather(1, at_R1).double() / total_R1).log()[:, 0]
    return token_R, torch.stack((logp_R, drawn_R.to(logp_R.dtype), entropy_R))
