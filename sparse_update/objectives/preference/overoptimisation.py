"""How far a learned reward can be followed: best-of-n exactly, distance to the reference, and the published form.

Gao et al. 2022 (arXiv 2210.10760) measure how far a policy has moved by d = sqrt(KL(policy || reference)) and find that
the true reward, less the reference's, follows

    best-of-n       R(d) = d (alpha - beta d)           turns at d = alpha / (2 beta)
    reinforcement   R(d) = d (alpha - beta log d)       turns at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so that the fit is a least-squares solution and not a search.

Shape letters: P prompts, N outputs of each, S sizes n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.reward import padded
from sparse_update.transformer import Transformer

FORMS = ("best_of_n", "reinforcement")


def best_of_n_kl(n: float) -> float:
    """KL divergence of best-of-n from its policy, log n - (n - 1) / n nats.

    Exact for outputs that never repeat (Hilton and Gao 2022); where outputs repeat it is an upper bound (Beirami et al.
    2024, arXiv 2401.01879). Raises PreferenceError below 1.
    """
    if not n >= 1:
        raise PreferenceError(f"best of n = {n}: at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy_PN: np.ndarray, values_PN: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Expected value of the output that the proxy likes best among n, for each prompt and size, float64 (P, S).

    It is the mean over all subsets of n of the N outputs (an unbiased estimate, by order statistics): with the outputs in
    ascending order of the proxy, output i is the best of C(i - 1, n - 1) of the C(N, n) subsets. Outputs with equal proxy
    share their mean value. `values_PN` is the true reward, or the proxy itself, or a length.

    Raises PreferenceError for arrays of other shapes, numbers that are not finite, and sizes outside 1 to N.
    """
    proxy_PN, values_PN = np.asarray(proxy_PN, dtype=np.float64), np.asarray(values_PN, dtype=np.float64)
    if proxy_PN.ndim != 2 or proxy_PN.shape != values_PN.shape or not proxy_PN.size:
        raise PreferenceError(f"proxy {proxy_PN.shape} and values {values_PN.shape}: both are (prompts, outputs)")
    if not (np.isfinite(proxy_PN).all() and np.isfinite(values_PN).all()):
        raise PreferenceError("proxy or values hold numbers that are not finite: leave those outputs out")
    count = proxy_PN.shape[1]
    if not len(sizes) or min(sizes) < 1 or max(sizes) > count:
        raise PreferenceError(f"sizes {list(sizes)[:8]}: each from 1 to the {count} outputs that there are of a prompt")
    weights_NS = np.stack([_subset_weights(count, int(n)) for n in sizes], axis=1)
    order_PN = np.argsort(proxy_PN, axis=1, kind="stable")
    found = np.empty((len(proxy_PN), len(sizes)))
    for row, order in enumerate(order_PN):
        ranked, values = proxy_PN[row, order], values_PN[row, order]
        group = np.concatenate(([0], np.cumsum(np.diff(ranked) != 0)))
        shared = np.bincount(group, values) / np.bincount(group)
        found[row] = shared[group] @ weights_NS
    return found


def _subset_weights(count: int, n: int) -> np.ndarray:
    """C(i - 1, n - 1) / C(count, n) for i = 1 ... count."""
    i = np.arange(n + 1, count + 1, dtype=np.float64)  # each weight over the one before is (i - 1) / (i - n)
    log = np.concatenate(([0.0], np.cumsum(np.log(i - 1) - np.log(i - n))))
    weight = np.exp(log - log[-1])
    return np.concatenate((np.zeros(n - 1), weight / weight.sum()))


@torch.no_grad()
def kl_per_row(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    batch_rows: int = 256,
) -> np.ndarray:
    """Divergence of the policy from the reference over each answer, nats, float64 (rows,).

    Each is the sum over the answer's tokens of the KL divergence between both models' distributions of that token. Over
    answers that the policy wrote, the mean is the divergence between the distributions of whole answers, with less noise
    than the mean of log-ratios, and never negative.
    """
    found = np.empty(len(prompts))
    lengths = np.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        tokens, length = padded([np.concatenate((prompts[i], answers[i])) for i in chosen], policy.embed.weight.device)
        place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        prompt = torch.tensor([len(prompts[i]) for i in chosen], device=tokens.device)
        mask = (place >= prompt[:, None] - 1) & (place < length[:, None] - 1)
        found[chosen] = (_divergence(policy, reference, tokens[:, :-1]) * mask).sum(1).double().cpu().numpy()
    return found


def _divergence(policy: Transformer, reference: Transformer, tokens_RT: Tensor) -> Tensor:
    logits = (model(tokens_RT) for model in (policy, reference))
    logp, other = (torch.log_softmax(x if x.dtype == torch.float64 else x.float(), -1) for x in logits)
    return (logp.exp() * (logp - other)).sum(-1)


@dataclass(frozen=True)
class Fit:
    """A fitted curve of the true reward's gain over d."""

    form: str
    """one of `FORMS`"""
    alpha: float
    beta: float
    explained: float
    """Share of the variance that the form explains, 1 - residual / total sum of squares about the mean."""
    points: int

    def at(self, d: np.ndarray | float) -> np.ndarray:
        """Gain at these distances."""
        d = np.asarray(d, dtype=np.float64)
        return self.alpha * d - self.beta * _bent(self.form, d)

    @property
    def turning_point(self) -> float | None:
        """The distance at which the true reward is highest; None where the fit never turns down."""
        if self.beta <= 0 or (self.form == "best_of_n" and self.alpha <= 0):
            return None
        exponent = self.alpha / self.beta - 1
        return self.alpha / (2 * self.beta) if self.form == "best_of_n" else math.exp(exponent) if exponent < 700 else None

    @property
    def peak(self) -> float | None:
        """The highest gain, None where the fit never turns down."""
        return None if self.turning_point is None else float(self.at(self.turning_point))


def _bent(form: str, d: np.ndarray) -> np.ndarray:
    return d * d if form == "best_of_n" else d * np.log(np.where(d > 0, d, 1.0))


def fit_form(form: str, distance: Sequence[float], gain: Sequence[float]) -> Fit:
    """Least squares of a published form.

    Args:
        form: one of `FORMS`.
        distance: d = sqrt(KL), not negative.
        gain: true reward less the reference's, at each.

    Raises PreferenceError for an unknown form, fewer than three distances above 0 that differ, or numbers that are not
    finite.
    """
    if form not in FORMS:
        raise PreferenceError(f"form {form!r}: one of {', '.join(FORMS)}")
    d, r = np.asarray(distance, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if d.shape != r.shape or d.ndim != 1 or not (np.isfinite(d).all() and np.isfinite(r).all()) or (d < 0).any():
        raise PreferenceError("distances and gains must be finite numbers, one each, and no distance negative")
    if len(np.unique(d[d > 0])) < 3:
        raise PreferenceError(
            f"{len(np.unique(d[d > 0]))} different distances above 0: two numbers are fitted to three at least"
        )
    terms = np.stack((d, -_bent(form, d)), axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, r, rcond=None)
    residual = float(((terms @ (alpha, beta) - r) ** 2).sum())
    total = float(((r - r.mean()) ** 2).sum())
    explained = 1 - residual / total if total > 0 else float(residual == 0)
    return Fit(form, float(alpha), float(beta), explained, len(d))
