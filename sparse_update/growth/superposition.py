"""Token superposition: a model reads bags of neighbouring tokens, and predicts the next bag, before it reads single ones.

A bag of s tokens is one position: the mean of their embeddings goes in, and the loss of a position is the mean
cross-entropy of the tokens of the next bag (a multi-hot target with 1 / s for each). The model stays what it is, so that
ordinary training goes on with the same weights afterwards.

Source: Peng, Gigant and Quesnelle 2026, "Efficient Pre-Training with Token Superposition", arXiv 2605.06546, where a
sequence has as many bags as it has tokens afterwards. Here a window of text stays a sequence, with fewer positions, and a
step takes s times as many windows.

Shape letters: B sequence, L token of a sequence, s token of a bag, T = L / s bag, V vocabulary, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOTHING = -100
"""Target that is not there: a window ends one token behind its last bag."""


def bags_of(tokens_BL: Tensor, next_BL: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(bags, what follows each of them), int64 (B, T, s); `NOTHING` where the window ended.

    Args:
        tokens_BL: int64 (B, L).
        next_BL: int64 (B, L), the token behind each of them.
        size: s, tokens of a bag.

    Raises ValueError where bags of that size do not tile a sequence.
    """
    batch, length = tokens_BL.shape
    if size < 1 or length % size:
        raise ValueError(f"bags of {size} tokens do not tile a sequence of {length}: the size must divide the length")
    behind_BL = F.pad(next_BL, (0, size - 1), value=NOTHING)[:, size - 1 :]
    return tokens_BL.reshape(batch, -1, size), behind_BL.reshape(batch, -1, size)


def bag_embeddings(embedding: nn.Module, bags_BTs: Tensor) -> Tensor:
    """Mean of the embeddings of each bag's tokens, (B, T, D): the input of a model that takes embeddings."""
    return embedding(bags_BTs).mean(-2)


def bag_loss(logits_BTV: Tensor, targets_BTs: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens of each position's next bag, float32 or wider, (B, T).

    The mean is over the targets that are there; a position without any has loss 0.
    """
    wide_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    there_BTs = targets_BTs != NOTHING
    hit_BTs = wide_BTV.gather(-1, targets_BTs.clamp_min(0))
    lost_BTs = (torch.logsumexp(wide_BTV, -1, keepdim=True) - hit_BTs) * there_BTs
    return lost_BTs.sum(-1) / there_BTs.sum(-1).clamp_min(1)
