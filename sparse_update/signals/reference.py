"""Signals against another model: a fixed reference, a lagging copy, two copies of different age.

Shape letters: N windows offered, B windows of a step, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_update.data.records import Batch
from sparse_update.loop.checkpoint import load_checkpoint
from sparse_update.loop.stored_model import stored_model, stored_shape
from sparse_update.signals.base import Seen, Signal, SignalContext, SignalError, register_signal
from sparse_update.signals.memory import VisitProgress
from sparse_update.signals.proxies import forward_flops, model_loss
from sparse_update.transformer import ModelConfig, Transformer


def load_reference(folder: str, context: SignalContext) -> Transformer:
    """The Transformer of a checkpoint folder, frozen. No code of it can run (`checkpoint.load_checkpoint`).

    Raises CheckpointError from reading, also for a folder without `model`; SignalError for another vocabulary or a shorter
    context.
    """
    found = load_checkpoint(folder)
    cfg = stored_shape(found)
    if cfg.vocab_size != context.vocab_size:
        raise SignalError(
            f"the reference model {folder} has a vocabulary of {cfg.vocab_size}, this run has {context.vocab_size}: losses "
            "do not compare; train a reference with the same tokenizer"
        )
    if cfg.context < context.context:
        raise SignalError(
            f"the reference model {folder} has a context of {cfg.context}, shorter than this run's {context.context}: "
            "lower model.context or train a reference with a longer one"
        )
    if cfg.attention == "auto":
        cfg.attention = "sdpa"
    return stored_model(found, cfg).to(context.device).requires_grad_(False).eval()


def _flops(model: nn.Module, windows: int, length: int) -> int:
    cfg = getattr(model, "cfg", None)
    if isinstance(cfg, ModelConfig):
        return forward_flops(cfg, windows)
    return 2 * windows * length * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


class _Against(Signal):
    """Loss of the model minus that of `other`. `before`: asked before the forward, at the price of two extra forwards;
    otherwise read out of the training forward, at the price of one."""

    needs = "forward"
    other: nn.Module

    def __init__(self, context: SignalContext, before: bool = False) -> None:
        super().__init__(context)
        self._require(model=context.model)
        assert context.model is not None
        self.model = context.model
        self.needs = "tokens" if before else "forward"

    def score(self, batch: Batch) -> Tensor:
        if self.needs != "tokens":
            raise SignalError(
                f"signal {self.name!r} reads the training forward; give it the option before=true to ask first"
            )
        own = model_loss(self.model, batch.tokens, self.context.device)
        return own - model_loss(self.other, batch.tokens, self.context.device)

    def read(self, view: Seen, batch: Batch) -> Tensor:
        loss = view.loss_BT.detach().float()
        return loss - model_loss(self.other, batch.tokens, self.context.device).to(loss.device)

    @property
    def cost_key(self) -> str:
        return f"signal[{self.name}{':before' if self.needs == 'tokens' else ''}]"

    def flops(self, windows: int) -> int:
        other = _flops(self.other, windows, self.context.context)
        return other + (_flops(self.model, windows, self.context.context) if self.needs == "tokens" else 0)

    def probe(self, windows: int) -> Any:
        if self.needs == "tokens":
            return super().probe(windows)
        self.needs = "tokens"
        once = super().probe(windows)
        self.needs = "forward"
        first = self.score

        def other_only() -> None:
            # the model's own loss is the training forward's: only the other model is timed
            self.score = lambda batch: model_loss(self.other, batch.tokens, self.context.device)  # type: ignore[method-assign]
            try:
                once()
            finally:
                self.score = first  # type: ignore[method-assign]

        return other_only


@register_signal("excess")
class Excess(_Against):
    """Loss in excess of a fixed reference model's, nats: what is learnable and not yet learnt (RHO-LOSS, Mindermann et al.
    2022; per token: Rho-1, Lin et al. 2024)."""

    def __init__(self, context: SignalContext, before: bool = False) -> None:
        super().__init__(context, before)
        self._require(reference=context.reference)
        self.other = load_reference(context.reference, context)


class _Copying(_Against):
    def __init__(self, context: SignalContext, before: bool = False, every_steps: int = 100) -> None:
        super().__init__(context, before)
        self._positive(every_steps=every_steps)
        self.every_steps, self.steps = every_steps, 0
        self.other = copy.deepcopy(self.model).requires_grad_(False).eval()

    def observe(self, batch: Batch, loss_BT: Tensor, progress: float) -> None:
        self.steps += 1
        if self.steps % self.every_steps == 0:
            self._refresh()

    def _refresh(self) -> None:
        self.other.load_state_dict(self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        # cloned: parameters that are tied must not make two names of one tensor in the state
        return {"steps": self.steps, "other": {k: v.clone() for k, v in self.other.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.other.load_state_dict(state["other"])


@register_signal("lagging")
class Lagging(_Copying):
    """Loss in excess of a copy of the model as it was up to `every_steps` steps ago, nats: what it is forgetting."""


@register_signal("learning_progress")
class LearningProgress(Signal):
    """How far the loss of data falls, nats: high is being learnt, about 0 is noise or known by heart.

    between "visits": of a window or document (`by`), from the visit before the last to the last; free, before the forward.
    between "copies": of a token, from a copy up to `every_steps` steps old to the model now; one extra forward.
    """

    def __init__(
        self,
        context: SignalContext,
        between: str = "visits",
        by: str = "window",
        unseen: str = "mean",
        every_steps: int = 100,
    ) -> None:
        super().__init__(context)
        if between not in ("visits", "copies"):
            raise SignalError(f"signal 'learning_progress': between = {between!r}, one of visits, copies")
        self.between = between
        self.inner: Signal = (
            VisitProgress(context, by, unseen) if between == "visits" else _Copying(context, every_steps=every_steps)
        )
        self.level, self.needs = self.inner.level, self.inner.needs

    def score(self, batch: Batch) -> Tensor:
        return self.inner.score(batch) if self.between == "visits" else super().score(batch)

    def read(self, view: Seen, batch: Batch) -> Tensor:
        return -self.inner.read(view, batch) if self.between == "copies" else super().read(view, batch)

    def observe(self, batch: Batch, loss_BT: Tensor, progress: float) -> None:
        self.inner.observe(batch, loss_BT, progress)

    def flops(self, windows: int) -> int:
        return self.inner.flops(windows)

    @property
    def cost_key(self) -> str:
        return "signal[learning_progress:copies]" if self.between == "copies" else ""

    def probe(self, windows: int) -> Any:
        return self.inner.probe(windows) if self.between == "copies" else super().probe(windows)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)
