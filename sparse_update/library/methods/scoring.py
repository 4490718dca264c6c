"""Losses of a model that only looks: a reference beside the user's model, or the user's own before its step.

Nothing here has a gradient, dropout is off, and every submodule is left in the mode that it was in.

Shape letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.data.records import Batch
from sparse_update.library.tracking.rows import GateError
from sparse_update.signals import Signal, SignalContext, SignalError
from sparse_update.signals.base import Seen
from sparse_update.signals.reference import load_reference

GIVEN = "given"
"""In the place of a reference model: its losses are given to each `gate.loss`, or come with each batch."""
NO_LABEL = -100
Losses = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> losses per token (B, T), NaN for a token without a label, or per sequence (B,)."""


class ExcessOver(Signal):
    """Loss in excess of a reference's, nats, from losses that somebody else took: the entry "reference" of the view
    (RHO-LOSS, Mindermann et al. 2022; per token: Rho-1, Lin et al. 2024)."""

    needs = "forward"
    want = frozenset({"reference"})

    def read(self, view: Seen, batch: Batch) -> Tensor:
        return view.loss_BT.detach().float() - view.signals["reference"].to(view.loss_BT.device).float()


def reference_model(given: nn.Module | str | Path | None, model: nn.Module, vocab_size: int) -> nn.Module | None:
    """The reference as a module in eval mode, None where its losses are given.

    `given`: a module with the outputs of the user's own, the folder of a checkpoint that `spikegate train` wrote, or
    "given". Raises GateError for the user's own model, or what is no model.
    """
    if given is None or given == GIVEN:
        return None
    if isinstance(given, (str, Path)):
        found: nn.Module = load_reference(str(given), SignalContext(vocab_size, 0))
        at = next(iter(model.parameters()), None)
        return found if at is None else found.to(at.device)
    if not isinstance(given, nn.Module):
        raise GateError(
            f"reference = {type(given).__name__}: an nn.Module with the outputs of your model, a checkpoint's folder, or "
            f"{GIVEN!r} where you give its losses"
        )
    shared = {id(p) for p in model.parameters()}
    if given is model or any(id(p) in shared for p in given.parameters()):
        raise GateError(
            "the reference shares parameters with the model that is trained, so its losses would move with it: give a "
            "copy, copy.deepcopy(model), taken before attach"
        )
    return given.eval()


@contextmanager
def looking(module: nn.Module) -> Iterator[None]:
    """No gradient and no dropout; every submodule's mode comes back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def output_losses(module: nn.Module, tokens_BT: Tensor, labels_BT: Tensor, **given: Any) -> Tensor:
    """Loss of each token under `module`, nats, float32 (B, T), NaN where the label is -100.

    `module(tokens)` is (B, T, V), or has `logits` of that form, as transformers' models. Raises SignalError otherwise.
    """
    at = next(iter(module.parameters()), tokens_BT).device
    with looking(module):
        out = module(tokens_BT.to(at), **{key: value.to(at) for key, value in given.items()})
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != labels_BT.shape:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SignalError(
            f"{type(module).__name__} gives {shape} for tokens {tuple(tokens_BT.shape)}: outputs (B, T, V), or with "
            "`logits` of that form, are needed; or give its losses yourself"
        )
    labels = labels_BT.to(at).long()
    if int(labels.max()) >= logits.shape[-1]:
        raise SignalError(
            f"{type(module).__name__} knows {logits.shape[-1]} tokens, a label is {int(labels.max())}: losses under "
            "another vocabulary do not compare"
        )
    flat = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NO_LABEL)
    return flat.view(labels.shape).masked_fill(labels == NO_LABEL, float("nan"))


def batch_losses(module: nn.Module, batch: Any, key: str = "") -> Tensor:
    """Losses (B, T) of next tokens in a batch, NaN where there is none to predict; see `output_losses`.

    A tensor (B, T) predicts its own next tokens; a tuple whose second tensor has the first one's shape is (inputs, labels);
    a mapping's `key` holds the inputs, "labels" the labels where it has them (they are the inputs, as with transformers)
    and "attention_mask" says which tokens count and goes to the model.
    """
    if isinstance(batch, Mapping):
        tokens = batch[key]
        labels = batch.get("labels", tokens)[:, 1:]
        mask = batch.get("attention_mask")
        extra = {} if mask is None else {"attention_mask": mask[:, :-1]}
        if mask is not None:
            labels = labels.masked_fill(mask[:, 1:] == 0, NO_LABEL)
        return output_losses(module, tokens[:, :-1], labels, **extra)
    if isinstance(batch, (tuple, list)):
        tokens, *rest = batch
        if rest and rest[0].shape == tokens.shape and not rest[0].is_floating_point():
            return output_losses(module, tokens, rest[0])
        batch = tokens
    return output_losses(module, batch[:, :-1], batch[:, 1:])


def mean_of(score: Tensor) -> Tensor:
    """(B,) of scores (B,) or (B, T): the mean over tokens that have one."""
    return score.nanmean(-1) if score.dim() == 2 else score
