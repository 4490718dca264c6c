"""The gate as a callback of Lightning and of the Hugging Face Trainer. Both libraries load only when a callback is made."""

from __future__ import annotations

import copy
import json
import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hardware.documents import json_of
from hardware.text import quoted
from sparse_update.library.attach import Gate, Reference, attach
from sparse_update.library.optimizers import inner, saved_gate
from sparse_update.library.rowloss import plain_loss
from sparse_update.library.settings import AttachConfig
from sparse_update.library.tracking.rows import GateError
from sparse_update.nested import pack, unpack

INSTALL = {"lightning": "pip install 'spikegate[lightning]'", "transformers": "pip install 'spikegate[hub]'"}

FILE = "gate.safetensors"
"""The gate's state in a checkpoint folder of the Hugging Face Trainer; see `load_gate_state`."""


class _Holder:
    """The gate between start and end of a training."""

    def __init__(self, config: AttachConfig | Mapping[str, Any], reference: Reference | None = None) -> None:
        self.config = config if isinstance(config, AttachConfig) else AttachConfig.from_dict(config)
        self.reference = reference
        self.gate: Gate | None = None
        self.state: Mapping[str, Any] | None = None

    def start(
        self, model: nn.Module, optimizers: list[Any], steps: int = 0, file: str | None = None, total: float = 0
    ) -> None:
        """Attach, where a resumed training was: by the optimizer's state, what a callback was given, or the saved file.

        `total`: optimizer steps of the whole training, for settings that end before it does; 0 or infinite: not known.
        """
        self.end()  # of a training that an error left unfinished
        model = getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model
        if self.config.before.signal != "none":
            raise ValueError(
                "before.signal: a callback cannot exchange the data loader. Choose sequences with a gate of their own: "
                "give the "
                "trainer `gate.filter(loader)`, or leave before.signal at none"
            )
        config = copy.copy(self.config)
        if not config.total_steps and 0 < total < float("inf"):
            config.total_steps = int(total)
        self.gate = attach(model, config, reference=self.reference)
        try:
            loaded = (saved_gate(inner(optimizer)) for optimizer in optimizers)
            state = next((found for found in loaded if found is not None), self.state)
            if state is None and file is not None:
                state = load_gate_state(file)
            if state is not None:
                self.gate.load_state_dict(state)
            elif steps:
                self._seek(self.gate, steps)
            self.gate.adopt(*optimizers)
        except BaseException:
            self.gate.detach()
            self.gate = None
            raise
        self.state = None

    def _seek(self, gate: Gate, steps: int) -> None:
        if self.config.weights.scored:
            raise GateError(
                f"weights.policy = {self.config.weights.policy!r} chooses by what it saw, and the checkpoint of step "
                f"{steps} holds no state of a gate: resume from a folder with {FILE} or an optimizer's state, or begin anew"
            )
        gate.seek(steps)

    def stepped(self, optimizers: list[Any], how: str) -> None:
        assert self.gate is not None
        if self.config.backward.unit != "none" and not self.gate.losses:
            raise GateError(f"backward.unit = {self.config.backward.unit!r}, but the gate never saw a loss: {how}")
        self.gate.step(*optimizers)

    def end(self) -> None:
        if self.gate is not None:
            _clip_without(self.gate)
            self.state = self.gate.state_dict()
            self.gate.detach()
            self.gate = None


def lightning_callback(config: AttachConfig | Mapping[str, Any], reference: Reference | None = None) -> Any:
    """A Lightning callback that attaches at the start of a fit and detaches at its end; its state goes into checkpoints.

    `reference`: as for `attach`, for methods that count losses from another model's.
    For gates of the backward, `training_step` returns `callback.loss(logits, labels)`, `Gate.loss` with its arguments.
    Works with `pytorch_lightning` and `lightning`, whichever the program imported, with automatic and manual optimization.
    `gradient_clip_val` and `self.clip_gradients(optimizer, ...)` clip all that is trained by one norm. With manual
    optimization and a scored policy, clear the gradients at the beginning of `training_step`, not after the step.
    The gate counts the batches after which an optimizer has stepped, but not those whose step a gradient scaler left out.
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
            self.holder = _Holder(config, reference)
            self._steps = 0
            self._scale = 0.0

        @property
        def gate(self) -> Gate | None:
            """The gate while a fit runs."""
            return self.holder.gate

        def loss(self, logits: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
            """`Gate.loss`; outside of training the plain mean."""
            return _loss(self.holder, logits, labels, **options)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.holder.start(pl_module, trainer.optimizers, 0, None, trainer.estimated_stepping_batches)
            self._steps, self._scale = trainer.global_step, _scale(trainer)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step > self._steps:  # not within an accumulation
                self._steps = trainer.global_step
                before, self._scale = self._scale, _scale(trainer)
                if self._scale < before:
                    return  # the gradients overflowed
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


def trainer_callback(config: AttachConfig | Mapping[str, Any], reference: Reference | None = None) -> Any:
    """A callback of transformers' Trainer: `Trainer(..., callbacks=[callback], compute_loss_func=callback.loss)`.

    It attaches when training begins, when the optimizer exists, and detaches at its end. A resumed training goes on to
    the bit: the saved optimizer holds the gate's state. So does the file gate.safetensors beside it, for a checkpoint
    without optimizer (`save_only_model`) that lies in the output folder.

    `reference`: as for `attach`, for methods that count losses from another model's.
    While it trains, accelerate's clip of the model's parameters, which the trainer calls, takes the strips in: one norm
    over all that is trained, and the logged one. A step that was skipped for an overflow is none of the gate.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(f"trainer_callback needs transformers: {INSTALL['transformers']}") from error

    class GateCallback(TrainerCallback):
        def __init__(self) -> None:
            self.holder = _Holder(config, reference)
            self._model: Any = None
            self._optimizer: Any = None

        @property
        def gate(self) -> Gate | None:
            """The gate while a training runs."""
            return self.holder.gate

        def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            """The trainer's `compute_loss_func`. Labels of causal language models are their inputs, as everywhere in
            transformers; those of other models (encoder-decoder, masked, classifying) stand where their logits do. A
            router's balance that the model returns counts with the weight in the model's config, on all rows. The trainer
            takes labels out of the batch, so an encoder-decoder needs decoder_input_ids in it, which transformers'
            DataCollatorForSeq2Seq(model=...) puts there."""
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
            shift = labels.dim() > 1 and _shifts(outputs, self._model)
            options = {"normaliser": num_items_in_batch, "others": _balance(outputs, self._model)}
            return _loss(self.holder, logits, labels, shift=shift, **options)

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._optimizer, self._model = given["optimizer"], given["model"]
            file = _checkpoint_file(args, state) if state.global_step else None
            self.holder.start(given["model"], [self._optimizer], state.global_step, file, state.max_steps)
            assert self.holder.gate is not None
            _clip_with(self.holder.gate)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.holder.stepped([self._optimizer], "Trainer(..., compute_loss_func=callback.loss)")

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            file = _checkpoint_file(args, state, new=True)
            if self.holder.gate is not None and state.is_world_process_zero and file is not None:
                _save_gate_state(self.holder.gate.state_dict(), file)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.holder.end()

    return GateCallback()


def _loss(holder: _Holder, logits: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    if holder.gate is not None:
        return holder.gate.loss(logits, labels, **options)
    others = options.get("others")
    loss = plain_loss(logits, labels, options.get("shift", False), options.get("normaliser"))
    return loss if others is None else loss + others


def _shifts(outputs: Any, model: Any) -> bool:
    """Whether row t of the logits predicts labels[:, t + 1]: of causal language models, by the class of their outputs or,
    of classes that do not tell, by the model."""
    kind = type(outputs).__name__
    if "Causal" in kind:
        return True
    if any(word in kind for word in ("Seq2Seq", "Masked", "Classif")):
        return False
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def _balance(outputs: Any, model: Any) -> Tensor | None:
    """A mixture of experts' balance, weighted as its own loss weights it; None where there is none."""
    balance = outputs.get("aux_loss") if isinstance(outputs, Mapping) else getattr(outputs, "aux_loss", None)
    if not isinstance(balance, Tensor) or not balance.requires_grad:
        return None
    config = getattr(model, "config", None)
    weight = getattr(config, "router_aux_loss_coef", None)
    if weight is None:
        weight = getattr(getattr(config, "text_config", None), "router_aux_loss_coef", None)
    if weight is None:
        raise GateError(
            "the model returns aux_loss, and its config has no router_aux_loss_coef: set model.config.router_aux_loss_coef "
            "(0 for none)"
        )
    return balance * weight


def load_gate_state(file: str) -> dict[str, Any]:
    """What `Gate.load_state_dict` takes, from the file that `trainer_callback` puts into a checkpoint folder.

    Raises GateError where the file holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            outline = (opened.metadata() or {}).get("gate")
            if outline is None:
                raise GateError(f"{file} is no state of a gate: it lacks the outline that trainer_callback writes")
            nested = json_of(outline, f"{file}: the outline of the gate's state", GateError)
            return dict(unpack(nested, {name: opened.get_tensor(name) for name in list(opened.keys())}))
    except (SafetensorError, TypeError, ValueError) as error:  # TypeError: unpack's own, and an outline of another form
        raise GateError(f"{file} is no state of a gate, or a damaged one: {quoted(str(error))}") from error


def _save_gate_state(state: Mapping[str, Any], file: str) -> None:
    from safetensors.torch import save_file

    tensors, outline = pack(dict(state))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"gate": json.dumps(outline)})


def _scale(trainer: Any) -> float:
    """Factor of Lightning's gradient scaler, which falls where a step was left out; 0 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 0.0 if scaler is None else float(scaler.get_scale())


def _checkpoint_file(args: Any, state: Any, new: bool = False) -> str | None:
    """The gate's file in the trainer's checkpoint of this step, where there is one (or, `new`, its folder)."""
    folders = [os.path.join(args.output_dir, f"checkpoint-{state.global_step}")]
    if not new and isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, args.resume_from_checkpoint)
    there = (os.path.join(f, FILE) for f in folders if os.path.exists(f if new else os.path.join(f, FILE)))
    return next(there, None)


_CLIPPED: weakref.WeakSet[Gate] = weakref.WeakSet()
"""Gates whose strips accelerate's clip takes in, where it is given their weights."""
_PLAIN_CLIP: list[Any] = []


def _clip_with(gate: Gate) -> None:
    from accelerate import Accelerator

    _CLIPPED.add(gate)
    if _PLAIN_CLIP:
        return
    _PLAIN_CLIP.append(plain := Accelerator.clip_grad_norm_)

    def clip(accelerator: Any, parameters: Tensor | Iterable[nn.Parameter], *args: Any, **options: Any) -> Any:
        trained: Any = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for each in _CLIPPED:
            trained = list(each.turns.trained(trained))
        return plain(accelerator, trained, *args, **options)

    Accelerator.clip_grad_norm_ = clip


def _clip_without(gate: Gate) -> None:
    _CLIPPED.discard(gate)
    if not _CLIPPED and _PLAIN_CLIP:
        from accelerate import Accelerator

        Accelerator.clip_grad_norm_ = _PLAIN_CLIP.pop()
