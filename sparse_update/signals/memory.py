"""Signals that remember: the last loss of a window or document, and how it fell between visits. Nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_update.data.records import Batch
from sparse_update.signals.base import Signal, SignalContext, SignalError, register_signal

NOT_SEEN = float("nan")


class LossTable:
    """The last two losses of each item by number, in tables that grow by doubling. Number -1 is never kept."""

    def __init__(self) -> None:
        self.last, self.before = torch.full((0,), NOT_SEEN), torch.full((0,), NOT_SEEN)

    def look(self, number: Tensor, table: Tensor) -> Tensor:
        """Entries of `table` at `number` (N,), NaN where never seen."""
        found = torch.full(number.shape, NOT_SEEN)
        known = (number >= 0) & (number < len(table))
        found[known] = table[number[known]]
        return found

    def put(self, number: Tensor, loss: Tensor) -> None:
        """Take in a visit; where an item occurs more than once, its mean counts."""
        number, loss = number[number >= 0].long(), loss[number >= 0].float()
        if not len(number):
            return
        if (top := int(number.max()) + 1) > len(self.last):
            more = torch.full((max(top, 2 * len(self.last)) - len(self.last),), NOT_SEEN)
            self.last, self.before = torch.cat((self.last, more)), torch.cat((self.before, more))
        item, place = number.unique(return_inverse=True)
        mean = torch.zeros(len(item)).index_add_(0, place, loss) / torch.bincount(place)
        self.before[item] = self.last[item]
        self.last[item] = mean

    def state_dict(self) -> dict[str, Tensor]:
        return {"last": self.last, "before": self.before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last, self.before = state["last"].clone(), state["before"].clone()


class Remembered(Signal):
    level = "sequence"

    def __init__(self, context: SignalContext, by: str = "window", unseen: str = "mean") -> None:
        super().__init__(context)
        if by not in ("window", "document"):
            raise SignalError(f"signal {self.name!r}: by = {by!r}, one of window, document")
        if unseen not in ("mean", "high"):
            raise SignalError(f"signal {self.name!r}: unseen = {unseen!r}, one of mean, high")
        self.by, self.unseen, self.table = by, unseen, LossTable()

    def _number(self, batch: Batch) -> Tensor:
        number = getattr(batch, self.by, None)
        if number is None:
            raise SignalError(f"signal {self.name!r}: by = {self.by!r}, but this stream does not number its {self.by}s")
        return number.cpu()

    def _filled(self, found: Tensor) -> Tensor:
        new = found.isnan()
        if self.unseen == "high":
            return found.masked_fill(new, float("inf"))
        known = self._all()
        known = known[~known.isnan()]
        return found.masked_fill(new, float(known.mean()) if len(known) else 0.0)

    def _all(self) -> Tensor:
        raise NotImplementedError

    @property
    def cost_key(self) -> str:
        return ""

    def observe(self, batch: Batch, loss_BT: Tensor, progress: float) -> None:
        self.table.put(self._number(batch), loss_BT.detach().float().mean(-1).cpu())

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.table.load_state_dict(state["table"])


@register_signal("stale_loss")
class StaleLoss(Remembered):
    """Loss, nats per token, that a window (or document) had when it was last trained on.

    What was never trained on gets the mean of what is known (`unseen` "mean": InfoBatch then keeps it), or infinity.
    """

    def score(self, batch: Batch) -> Tensor:
        return self._filled(self.table.look(self._number(batch), self.table.last))

    def _all(self) -> Tensor:
        return self.table.last


class VisitProgress(Remembered):
    """How far the loss fell from the visit before the last to the last, nats per token; see `learning_progress`."""

    def score(self, batch: Batch) -> Tensor:
        number = self._number(batch)
        return self._filled(self.table.look(number, self.table.before) - self.table.look(number, self.table.last))

    def _all(self) -> Tensor:
        return self.table.before - self.table.last
