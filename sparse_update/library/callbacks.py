"""The gate as a callback of Lightning and of the Hugging Face Trainer. Both libraries load only when a callback is made."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_update.library.attach import Gate, attach
from sparse_update.library.linear import GateError
from sparse_update.library.rowloss import plain_loss
from sparse_update.library.settings import AttachConfig

INSTALL = {"lightning": "pip install 'spikegate[lightning]'", "transformers": "pip install 'spikegate[hub]'"}


class _Holder:
    """The gate between start and end of a training."""

    def __init__(self, config: AttachConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, AttachConfig) else AttachConfig.from_dict(config)
        self.gate: Gate | None = None
        self.state: Mapping[str, Any] | None = None

    def start(self, model: nn.Module, optimizers: list[Any], steps: int = 0) -> None:
        model = getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model
        if self.config.before.signal != "none":
            raise ValueError(
                "before.signal: a callback cannot exchange the data loader. Choose sequences with a gate of their own: "
                "give the "
                "trainer `gate.filter(loader)`, or leave before.signal at none"
            )
        self.gate = attach(model, self.config)
        if self.state is not None:
            self.gate.load_state_dict(self.state)
            self.state = None
        elif steps:
            self.gate.seek(steps)
        self.gate.adopt(*optimizers)

    def stepped(self, optimizers: list[Any], how: str) -> None:
        assert self.gate is not None
        if self.config.backward.unit != "none" and not self.gate.losses:
            raise GateError(f"backward.unit = {self.config.backward.unit!r}, but the gate never saw a loss: {how}")
        self.gate.step(*optimizers)

    def end(self) -> None:
        if self.gate is not None:
            self.state = self.gate.state_dict()
            self.gate.detach()
            self.gate = None


def lightning_callback(config: AttachConfig | Mapping[str, Any]) -> Any:
    """A Lightning callback that attaches at the start of a fit and detaches at its end; its state goes into checkpoints.

    For gates of the backward, `training_step` returns `callback.loss(logits, labels)`, `Gate.loss` with its arguments.
    Works with `pytorch_lightning` and `lightning`, whichever the program imported.
    """
    name = "lightning.pytorch" if "lightning.pytorch" in sys.modules else "pytorch_lightning"
    try:
        if name == "pytorch_lightning":
            import pytorch_lightning as pl
        else:
            pl = sys.modules[name]
    except ImportError as error:
        raise ImportError(f"lightning_callback needs Lightning: {INSTALL['lightning']}") from error

    class GateCallback(pl.Callback):
        def __init__(self) -> None:
            self.holder = _Holder(config)
            self._steps = 0

        def loss(self, logits: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
            """`Gate.loss`; outside of training the plain mean."""
            return _loss(self.holder, logits, labels, **options)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.holder.start(pl_module, trainer.optimizers)
            self._steps = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step > self._steps:  # not within an accumulation
                self._steps = trainer.global_step
                self.holder.stepped(trainer.optimizers, "return callback.loss(logits, labels) from training_step")

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.holder.end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.holder.end()

        def state_dict(self) -> dict[str, Any]:
            gate = self.holder.gate
            state = gate.state_dict() if gate is not None else self.holder.state
            return {} if state is None else dict(state)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.holder.state = state_dict or None

    return GateCallback()


def trainer_callback(config: AttachConfig | Mapping[str, Any]) -> Any:
    """A callback of transformers' Trainer: `Trainer(..., callbacks=[callback], compute_loss_func=callback.loss)`.

    It attaches when training begins, when the optimizer exists, and detaches at its end. A resumed training finds the
    strips of the interrupted one by the number of steps; the draws of random rows start anew.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(f"trainer_callback needs transformers: {INSTALL['transformers']}") from error

    class GateCallback(TrainerCallback):
        def __init__(self) -> None:
            self.holder = _Holder(config)
            self._optimizer: Any = None

        def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            """The trainer's `compute_loss_func`: labels are the inputs, as everywhere in transformers."""
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
            return _loss(self.holder, logits, labels, shift=True, normaliser=num_items_in_batch)

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._optimizer = given["optimizer"]
            # The turn follows from the step, so a resumed training has the strips of the one that was interrupted.
            self.holder.start(given["model"], [self._optimizer], state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            # The trainer clips model.parameters(), which strips are not: they are clipped by a norm of their own.
            gate = self.holder.gate
            if gate is not None and gate.turns.strips.leaves and args.max_grad_norm and args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(gate.turns.strips.leaves.values(), args.max_grad_norm)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.holder.stepped([self._optimizer], "Trainer(..., compute_loss_func=callback.loss)")

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.holder.end()

    return GateCallback()


def _loss(holder: _Holder, logits: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    if holder.gate is not None:
        return holder.gate.loss(logits, labels, **options)
    return plain_loss(logits, labels, options.get("shift", False), options.get("normaliser"))
