"""A state of training that can be taken back: all weights and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_update.weights.optimizer import Optimizer


class Undo:
    """Copies and restores the state of `model` and `optimizer`, to the bit. The active weights must not change between."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def save(self) -> dict[str, Any]:
        """A copy of everything that a step moves: nested dicts of tensors and plain values."""
        return {"model": _copied(self.model.state_dict()), "optimizer": _copied(self.optimizer.state_dict())}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `save` gave; `saved` may be used again."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(_copied(saved["optimizer"]))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value
