"""Signals that the training forward gives away: nothing is computed twice. Also "random", the control.

Shape letters: B windows, T tokens, L layers, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_update.data.records import Batch
from sparse_update.signals.base import Seen, Signal, SignalContext, SignalError, register_signal


def entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, float32, (B, T)."""
    log_p = logits_BTV.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def last_layer_gradient_norm(logits_BTV: Tensor, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """Norm of a token's loss gradient for the head's weight (V, D): |softmax - onehot| |h|, exact, float32 (B, T).

    The gradient is the outer product of both vectors (Katharopoulos and Fleuret 2018 bound the whole norm by it).
    """
    error_BTV = logits_BTV.float().softmax(-1)
    # the difference itself, not sum(p^2) - 2 p + 1, which cancels where the target is nearly certain
    error_BTV = error_BTV.scatter_add(
        -1, targets_BT[..., None], torch.full_like(targets_BT[..., None], -1, dtype=torch.float32)
    )
    return error_BTV.norm(dim=-1) * hidden_BTD.float().norm(dim=-1)


@register_signal("random")
class Random(Signal):
    """The control: uniform draws in [0, 1), one a window, or one a token out of the forward."""

    level = "sequence"

    def __init__(self, context: SignalContext) -> None:
        super().__init__(context)
        self.generator = torch.Generator().manual_seed(context.seed)

    def score(self, batch: Batch) -> Tensor:
        return torch.rand(len(batch.tokens), generator=self.generator)

    def read(self, view: Seen, batch: Batch) -> Tensor:
        return torch.rand(view.loss_BT.shape, generator=self.generator).to(view.loss_BT.device)

    @property
    def cost_key(self) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class _Free(Signal):
    needs = "forward"

    def _entry(self, view: Seen, key: str) -> Tensor:
        if key not in view.signals:
            raise SignalError(
                f"signal {self.name!r} needs {key!r} from the forward, which gave {sorted(view.signals) or 'nothing'}: "
                f"put it into the step plan's `want`"
            )
        return view.signals[key].detach().float()


@register_signal("token_loss")
class TokenLoss(_Free):
    """Loss of each token in nats."""

    def read(self, view: Seen, batch: Batch) -> Tensor:
        return view.loss_BT.detach().float()


@register_signal("excess_entropy")
class ExcessEntropy(_Free):
    """Loss minus the entropy of the prediction, nats: how much worse than the model itself expected. About 0 for noise
    that the model knows to be noise."""

    want = frozenset({"entropy"})

    def read(self, view: Seen, batch: Batch) -> Tensor:
        return view.loss_BT.detach().float() - self._entry(view, "entropy")

    def flops(self, windows: int) -> int:
        return windows * self.context.context * 2 * self.context.vocab_size


@register_signal("gradient_norm")
class GradientNorm(_Free):
    """Exact norm of the token's gradient for the last layer."""

    want = frozenset({"gradient_norm"})

    def read(self, view: Seen, batch: Batch) -> Tensor:
        return self._entry(view, "gradient_norm")

    def flops(self, windows: int) -> int:
        width = getattr(getattr(self.context.model, "cfg", None), "width", 0)
        return windows * self.context.context * 2 * (self.context.vocab_size + width)


@register_signal("update")
class Update(_Free):
    """Magnitude of what layers add to the residual stream: of `layer` (-1 the last), or their mean (None)."""

    want = frozenset({"update"})

    def __init__(self, context: SignalContext, layer: int | None = None) -> None:
        super().__init__(context)
        self.layer = layer

    def read(self, view: Seen, batch: Batch) -> Tensor:
        update_LBT = self._entry(view, "update")
        if self.layer is None:
            return update_LBT.mean(0)
        if not -len(update_LBT) <= self.layer < len(update_LBT):
            raise SignalError(f"signal 'update': layer = {self.layer}, but the model has layers 0 to {len(update_LBT) - 1}")
        return update_LBT[self.layer]

    def flops(self, windows: int) -> int:
        cfg = getattr(self.context.model, "cfg", None)
        return windows * self.context.context * 3 * cfg.width * cfg.layers if cfg else 0
