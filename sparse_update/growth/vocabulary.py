"""Vocabulary order: at first a model predicts the first tokens of an order alone, later all of them.

A step that predicts K tokens multiplies its hidden states with the K rows of the head that belong to them, so the head
costs K / V of its products. Targets outside of the K have no loss: the model learns the distribution of the next token,
given that it is one of the K, which is what it predicts later, cut to these tokens and made to sum to 1. All tokens are
read from the first step on, since reading one is the lookup of a row.

The number that a model predicts grows as in "Scaling LLM Pre-training with Vocabulary Curriculum" (Yu 2025, arXiv
2502.17910), where the tokenizer grows too. Here it stays: with another tokenizer the windows, their order and the unit of
the loss would not be those of the run that this one is compared with.

Shape letters: B sequence, T token, V vocabulary, K tokens that are predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.data.hashing import draw, key
from sparse_update.transformer import Transformer

ORDERS = ("frequent", "random")
NOTHING = -100
"""Target without a loss."""
COUNTED_AT_ONCE = 1 << 22
"""Tokens of a text that are in memory while it is counted."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a vocabulary in an order.

    `order_V`: int64 (V,), tokens, the first that are predicted first; `share_V`: float64 (V,), share of the training text
    that the first 1, 2, ... of them make up.
    """

    order_V: Tensor
    share_V: Tensor

    def first(self, count: int) -> Tensor:
        """int64 (K,): the first `count` tokens, ascending."""
        return self.order_V[:count].sort().values

    def places(self, count: int) -> Tensor:
        """int64 (V,): place of each token among `first(count)`, `NOTHING` for the others."""
        found_V = torch.full_like(self.order_V, NOTHING)
        found_V[self.first(count)] = torch.arange(count, device=found_V.device)
        return found_V

    def share(self, count: int) -> float:
        """Share of the training text that the first `count` tokens make up."""
        return float(self.share_V[count - 1])

    def to(self, device: torch.device) -> Vocabulary:
        return Vocabulary(self.order_V.to(device), self.share_V)

    def state_dict(self) -> dict[str, Any]:
        """What tells this order from another."""
        content = self.order_V.cpu().numpy().astype("<i8").tobytes()
        return {"size": len(self.order_V), "sha256": hashlib.sha256(content).hexdigest()}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for the state of another order."""
        if dict(state) != self.state_dict():
            raise ValueError(
                "the checkpoint's run took the tokens of its vocabulary in another order: resume with its text, seed and "
                "trainer.vocabulary_order"
            )


def make_vocabulary(tokens: Any, size: int, order: str, seed: int) -> Vocabulary:
    """The order of a vocabulary of `size` tokens.

    Args:
        tokens: the training text, an array of tokens or anything that gives arrays for slices.
        order: "frequent": the commonest tokens of the text first, equals by number | "random": drawn by `seed`, those that
            the text lacks behind the others.
    """
    count_V = np.zeros(size, dtype=np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        count_V += np.bincount(np.asarray(tokens[start : start + COUNTED_AT_ONCE]), minlength=size)
    drawn_V = np.argsort(draw(key(seed, "vocabulary"), np.arange(size)), kind="stable")
    if order == "random":
        order_V = drawn_V[np.argsort(count_V[drawn_V] == 0, kind="stable")]
    else:
        order_V = np.argsort(-count_V, kind="stable")
    share_V = np.cumsum(count_V[order_V]) / max(1, len(tokens))
    return Vocabulary(torch.from_numpy(order_V), torch.from_numpy(share_V))


def partial_logits(model: Transformer, tokens_BT: Tensor, predicted_K: Tensor) -> Tensor:
    """Logits of some tokens alone, (B, T, K): the forward's with the other rows of the head left out."""
    return F.linear(model.hidden(tokens_BT), model.head.weight[predicted_K])


def partial_loss(logits_BTK: Tensor, places_BT: Tensor, share: float) -> Tensor:
    """Cross-entropy among the K tokens in nats, float32 or wider, over `share`, (B, T); 0 where the target is none of them.

    Args:
        places_BT: place of the target among the K, or `NOTHING`.
        share: of the text that the K tokens make up, so that the mean over a batch is that of the targets which are there,
            up to the batch's own share. It is the same for all batches, so pieces and processes add up to the whole.
    """
    logits = logits_BTK if logits_BTK.dtype == torch.float64 else logits_BTK.float()
    lost = F.cross_entropy(logits.flatten(0, 1), places_BT.flatten(), reduction="none", ignore_index=NOTHING)
    return lost.view(places_BT.shape) / share
