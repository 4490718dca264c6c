"""Held-out loss, whole and split by difficulty and by document; and weights to start from.

Shape letters: N windows, T predicted tokens of a window, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_update.loop.checkpoint import checkpoint_of, load_checkpoint
from sparse_update.surprise import NgramTable
from sparse_update.transformer import Transformer, token_loss

DIFFICULTIES = 4
"""Parts of equal size that held-out tokens are cut into by their n-gram surprise."""
ORDERS, BITS = (1, 2, 3, 5), 22
"""n-gram orders and log2 of counters: with longer ones, colliding counters made the easiest tokens of 5 M look known."""
FITTED_TOGETHER = 1 << 18
"""Tokens of one update of the n-gram table."""


def evaluate(model: torch.nn.Module, windows_NT1: Tensor, batch: int = 64) -> float:
    """Mean loss in nats per token over held-out windows, int64 (N, T + 1), in the parameters' own precision."""
    return sum(float(part.double().sum()) for part in _losses(model, windows_NT1, batch)) / windows_NT1[:, 1:].numel()


def token_losses(model: torch.nn.Module, windows_NT1: Tensor, batch: int = 64) -> Tensor:
    """Loss of every held-out token, nats, float32 (N, T) on the CPU."""
    return torch.cat([part.float().cpu() for part in _losses(model, windows_NT1, batch)])


@torch.no_grad()
def _losses(model: torch.nn.Module, windows_NT1: Tensor, batch: int) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    for part in windows_NT1.split(batch):
        tokens = part.to(device)
        yield token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    model.train(training)


def surprise_of(windows_NT1: Tensor, training: Tensor, vocab_size: int) -> Tensor:
    """n-gram surprise of every held-out token, nats, float32 (N, T): how hard it is for a table of `ORDERS` that has
    counted all the training text, int64 (tokens,)."""
    table = NgramTable(vocab_size, ORDERS, BITS)
    for part in training.split(FITTED_TOGETHER):
        if len(part) > 1:
            table.update(part[None])
    return table.score(windows_NT1)


def by_difficulty(loss_NT: Tensor, surprise_NT: Tensor, parts: int = DIFFICULTIES) -> list[dict[str, float]]:
    """Mean loss of the tokens between one quantile of their surprise and the next, from easy to hard."""
    order = surprise_NT.flatten().argsort(stable=True)
    loss, surprise = loss_NT.flatten()[order].double(), surprise_NT.flatten()[order]
    return [
        {"loss_nats": float(a.mean()), "tokens": len(a), "surprise_from": float(b[0]), "surprise_to": float(b[-1])}
        for a, b in zip(loss.tensor_split(parts), surprise.tensor_split(parts), strict=True)
        if len(a)
    ]


def by_document(loss_NT: Tensor, document_NT: Tensor, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean loss of each document's tokens; `document_NT`: number of the document that a target lies in."""
    place, loss = document_NT.flatten(), loss_NT.flatten().double()
    total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, place, loss)
    count = torch.bincount(place, minlength=len(names))
    return {
        name: {"loss_nats": float(total[i] / count[i]), "tokens": int(count[i])} for i, name in enumerate(names) if count[i]
    }


def start_from(model: Transformer, folder: str | Path) -> None:
    """Load the weights of a run folder or checkpoint, read safely. Raises CheckpointError, or ValueError for a model of
    another shape or vocabulary."""
    weights = load_checkpoint(checkpoint_of(folder)).model
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights or weights[name].shape != tensor.shape:
            have = tuple(weights[name].shape) if name in weights else "nothing"
            what = "vocabulary" if name in ("embed.weight", "head.weight") else "shape"
            raise ValueError(
                f"trainer.init_from = {folder}: its {name} is {have}, this model's {tuple(tensor.shape)}: a model "
                f"of another {what}; train with the settings of that run (model, data.tokenizer, data.vocab_size)"
            )
    model.load_state_dict(weights)
