"""Which known windows are replayed while a model learns something new: those whose text it is forgetting.

A small probe of known text goes through the model now and then. Each token's loss, less its loss when the run began, says
what was lost in which context. That is averaged over the last tokens of a context, from short to long as an n-gram table
does, and so foretells for any window what of it was lost, for one look-up in a table. How much is lost over all says how
many windows are replayed.

Shape letters: N windows offered, M windows of the probe, T tokens, Q slots of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_update.surprise import mix

ORDERS = (1, 2, 3)
"""Lengths of the runs of tokens that losses are averaged over, the predicted one last."""
SLOTS_BITS = 14
STRENGTH = 4.0
"""Tokens that the shorter run's mean counts for in the longer one's."""
FADES = 0.5
"""What earlier probes count for beside the latest: what is forgotten changes as the rate falls."""


def probe_windows(known: Tensor, count: int, context: int) -> Tensor:
    """At most `count` windows, evenly spread over known text (tokens,): int64 (M, context + 1), M >= 1.

    Raises ValueError where the text holds not one window.
    """
    windows = (len(known) - 1) // context
    if windows < 1:
        raise ValueError(
            f"gate.replay = forgotten: the known text has {len(known)} tokens, fewer than a window of {context + 1}"
        )
    count = min(count, windows)
    starts = (2 * torch.arange(count) + 1) * windows // (2 * count) * context
    return known[starts[:, None] + torch.arange(context + 1)].long()


class Forgetting:
    """What is lost of known text, in nats per token: over all (`mean`), and by the last tokens of a context.

    Pure; its state is plain. `probe_MT1`: windows of known text, int64 (M, T + 1).
    """

    def __init__(self, probe_MT1: Tensor) -> None:
        self.probe_MT1 = probe_MT1
        self.before_MT = torch.zeros(0)
        """losses when the run began"""
        self.mean = 0.0
        self.probes = 0
        self.lost_Q = [torch.zeros(1 << SLOTS_BITS) for _ in ORDERS]
        self.seen_Q = [torch.zeros(1 << SLOTS_BITS) for _ in ORDERS]

    def measure(self, loss_MT: Tensor) -> None:
        """Take in the losses of the probe, (M, T) nats; the first ones are what is lost against. Losses that are not finite
        say nothing."""
        loss_MT = loss_MT.detach().float().cpu()
        if not len(self.before_MT):
            self.before_MT = loss_MT.clone()
            return
        lost_MT = loss_MT - self.before_MT
        if not bool(lost_MT.isfinite().all()):
            return
        self.probes += 1
        self.mean = float(lost_MT.mean())
        for order, lost_Q, seen_Q in zip(ORDERS, self.lost_Q, self.seen_Q, strict=True):
            slot = _slots(self.probe_MT1, order).flatten()
            lost_Q.mul_(FADES).index_add_(0, slot, lost_MT.flatten())
            seen_Q.mul_(FADES).index_add_(0, slot, torch.ones(len(slot)))

    def score(self, tokens_NT1: Tensor) -> Tensor:
        """What was lost of windows, as far as the probe foretells it: nats per token, float32 (N,)."""
        found_NT = torch.full((len(tokens_NT1), tokens_NT1.shape[1] - 1), self.mean)
        for order, lost_Q, seen_Q in zip(ORDERS, self.lost_Q, self.seen_Q, strict=True):
            slot_NT = _slots(tokens_NT1.cpu(), order)
            found_NT = (lost_Q[slot_NT] + STRENGTH * found_NT) / (seen_Q[slot_NT] + STRENGTH)
        return found_NT.mean(1)

    def share(self, most: float, limit_nats: float) -> float:
        """The share to replay: `most` where at least `limit_nats` are lost, in proportion below; `most` always where the
        limit is 0."""
        return most if limit_nats <= 0 else most * min(1.0, max(0.0, self.mean / limit_nats))

    def state_dict(self) -> dict[str, Any]:
        return {
            "before": self.before_MT,
            "mean": self.mean,
            "probes": self.probes,
            **{f"lost.{n}": q for n, q in zip(ORDERS, self.lost_Q, strict=True)},
            **{f"seen.{n}": q for n, q in zip(ORDERS, self.seen_Q, strict=True)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before_MT, self.mean, self.probes = state["before"].clone(), float(state["mean"]), int(state["probes"])
        for order, lost_Q, seen_Q in zip(ORDERS, self.lost_Q, self.seen_Q, strict=True):
            lost_Q.copy_(state[f"lost.{order}"])
            seen_Q.copy_(state[f"seen.{order}"])


def _slots(tokens_NT1: Tensor, order: int) -> Tensor:
    """Slot of the `order` tokens that end with each predicted one, int64 (N, T). Where a window begins there are fewer."""
    key = torch.zeros_like(tokens_NT1[:, 1:])
    for back in range(order - 1, -1, -1):
        shifted = tokens_NT1.roll(back, 1)
        shifted[:, :back] = -1
        key = mix(key + shifted[:, 1:] + 2)
    return (key >> 20) & ((1 << SLOTS_BITS) - 1)
